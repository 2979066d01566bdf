# SPDX-License-Identifier: Apache-2.0
"""One face for every vectorised environment: dict observations, true final observations, checked numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from robopost.config import EnvConfig
from robopost.data.batch import Spec, below
from robopost.errors import EnvError
from robopost.registry import ENVS

Arrays = dict[str, np.ndarray]


@dataclass
class Step:
    """Result of one vectorised step; N is the number of environments.

    Attributes:
        obs: what the policy acts on next: for an environment whose episode just ended, the first observation of
            its next episode.
        next_obs: the true next observation: for an ended episode, its final observation.
        reward: (N,) float32.
        terminated, truncated: (N,) bool.
        success: (N,) bool, or None where the task has no success predicate.
    """

    obs: Arrays
    next_obs: Arrays
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray | None

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: the episode ended, either way."""
        return self.terminated | self.truncated


class VecEnv:
    """Wraps a SAME_STEP gymnasium vector environment. `history` > 1 stacks observations, oldest first.

    Raises:
        EnvError: the environment resets in another mode, or gives NaN or infinite numbers.
    """

    def __init__(self, env: VectorEnv, *, history: int = 1, max_steps: int = 0) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise EnvError(
                f"environment {env!r} has autoreset_mode={mode}, robopost needs AutoresetMode.SAME_STEP. "
                "Fix: pass vector_kwargs/autoreset_mode=AutoresetMode.SAME_STEP when making it"
            )
        self.env = env
        self.num_envs = env.num_envs
        self.history = history
        space = env.single_observation_space
        self._dict = isinstance(space, gym.spaces.Dict)
        self.spec = make_spec(space, env.single_action_space, max_steps)
        self._first_choice = int(getattr(env.single_action_space, "start", 0))
        self._stack: Arrays = {}

    @property
    def can_save(self) -> bool:
        """True when the environment offers `get_state` / `set_state` for exact resume."""
        return hasattr(self.env, "get_state") and hasattr(self.env, "set_state")

    def reset(self, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None) -> Arrays:
        """Start new episodes everywhere; `seed` is one base seed or one per environment."""
        self.want_images(None)  # whoever resets looks at the first observation of all
        seeds = list(seed) if isinstance(seed, (list, tuple, np.ndarray, range)) else seed
        raw, _ = self.env.reset(seed=cast(Any, seeds), options=options)
        obs = self._to_dict(raw)
        self._check("observation after reset", obs)
        self._stack = {key: np.repeat(value[:, None], self.history, axis=1) for key, value in obs.items()}
        return self._stacked(obs)

    def step(self, action: np.ndarray) -> Step:
        """Execute `action` (N, A) in environment units; a discrete one is rounded to the nearest index."""
        if self.spec.choices:
            action = np.rint(action[:, 0]).astype(np.int64) + self._first_choice
        raw, reward, terminated, truncated, info = self.env.step(action)
        obs = self._to_dict(raw)
        reward = np.asarray(reward, dtype=np.float32)
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        done = terminated | truncated
        ended = bool(done.any())
        true_next = self._final(obs, info, done) if ended else obs
        self._check("observation", true_next)
        if not math.isfinite(reward.sum()) and not np.isfinite(reward).all():
            raise EnvError(
                f"reward is {reward[~np.isfinite(reward)][0]} in environment {_first(~np.isfinite(reward))}"
            )
        next_obs = true_next
        if self.history > 1:
            rolled = {
                key: np.concatenate([self._stack[key][:, 1:], true_next[key][:, None]], 1) for key in obs
            }
            next_obs = rolled
            self._stack = rolled
            if ended:
                self._stack = {key: value.copy() for key, value in rolled.items()}
                for key, value in self._stack.items():
                    value[done] = obs[key][done][:, None]
            obs = self._stack
        success = info.get("success", info.get("is_success"))
        if success is not None:
            success = np.asarray(success).astype(bool)
        if ended and "final_info" in info:
            success = _final_success(success, info, done)
        return Step(obs, next_obs, reward, terminated, truncated, success)

    def get_state(self) -> Arrays:
        """State for an exact resume: physics, counters, random streams and the history stack."""
        state = {f"env/{key}": value for key, value in cast(Any, self.env).get_state().items()}
        return state | {f"stack/{key}": value for key, value in self._stack.items()}

    def set_state(self, state: Arrays) -> None:
        """Restore `get_state` output."""
        cast(Any, self.env).set_state(below(state, "env/"))
        self._stack = below(state, "stack/")

    def want_images(self, wanted: np.ndarray | None) -> None:
        """Say in which environments (N,) bool the next steps' images will be looked at; None = in all.

        A policy that executes chunks looks once per chunk, and rendering takes most of a step. Environments that make
        use of it repeat their last image where nobody looks, but the true one at an episode's end.
        """
        if hasattr(self.env, "wanted") and self.history == 1:
            cast(Any, self.env).wanted = wanted

    def render(self, indices: Sequence[int] | None = None) -> list[np.ndarray]:
        """RGB frames (H, W, 3) uint8 of the environments in `indices` (default all)."""
        try:
            frames = cast(Any, self.env).render(indices)
        except TypeError:
            frames = self.env.render()
            frames = frames if indices is None or frames is None else [frames[i] for i in indices]
        if frames is None:
            raise EnvError(
                "the environment was made without a render mode. Fix: make it with render='rgb_array'"
            )
        return [np.asarray(frame) for frame in cast(Any, frames)]

    def close(self) -> None:
        """Free the environment."""
        self.env.close()

    def _to_dict(self, raw: Any) -> Arrays:
        items = raw.items() if self._dict else (("state", raw),)
        out = {}
        for key, value in items:
            value = np.asarray(value)
            # Copies: vector environments reuse their output buffers.
            out[key] = value.astype(np.float32) if value.dtype.kind == "f" else value.copy()
        return out

    def _stacked(self, obs: Arrays) -> Arrays:
        return obs if self.history == 1 else {key: value.copy() for key, value in self._stack.items()}

    def _final(self, obs: Arrays, info: dict[str, Any], done: np.ndarray) -> Arrays:
        """Replace the rows of ended episodes by the observation before the automatic reset."""
        if "final_obs" not in info:
            raise EnvError(
                "an episode ended and info has no 'final_obs': the environment breaks SAME_STEP autoreset"
            )
        final = info["final_obs"]
        out = {key: value.copy() for key, value in obs.items()}
        if isinstance(final, dict):
            for key in out:
                out[key][done] = final[key][done]
        elif final.dtype == object:
            for i in np.flatnonzero(done):
                for key in out:
                    out[key][i] = final[i][key] if self._dict else final[i]
        else:
            out["state"][done] = final[done]
        return out

    def _check(self, what: str, obs: Arrays) -> None:
        for key, value in obs.items():
            # A finite sum is far cheaper than isfinite().all() and misses nothing that matters at float32 sizes.
            if value.dtype.kind == "f" and not math.isfinite(value.sum()):
                bad = np.asarray(~np.isfinite(value).reshape(len(value), -1).all(axis=1))
                if bad.any():
                    raise EnvError(f"{what} {key!r} holds NaN or infinity in environment {_first(bad)}")


def make_spec(obs_space: gym.Space, action_space: gym.Space, max_steps: int = 0) -> Spec:
    """Spec of gymnasium spaces (Box or flat Dict of Box observations, Box or Discrete actions).

    Raises:
        EnvError: another kind of space.
    """
    choices = int(action_space.n) if isinstance(action_space, gym.spaces.Discrete) else 0
    if choices < 2 and not (isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1):
        raise EnvError(
            f"action space {action_space} is not supported: robopost needs a one-dimensional Box, or a Discrete "
            "of at least 2 actions"
        )
    spaces = dict(obs_space.items()) if isinstance(obs_space, gym.spaces.Dict) else {"state": obs_space}
    obs: dict[str, tuple[tuple[int, ...], str]] = {}
    for key, space in spaces.items():
        if not isinstance(space, gym.spaces.Box):
            raise EnvError(
                f"observation {key!r} is a {space}: robopost needs Box observations or a flat Dict of them"
            )
        dtype = "float32" if space.dtype.kind == "f" else str(space.dtype)  # type: ignore[union-attr]
        obs[key] = (tuple(space.shape), dtype)
    if not isinstance(action_space, gym.spaces.Box):
        return Spec(obs, 1, (0.0,), (choices - 1.0,), max_steps, choices)
    low = tuple(float(v) for v in action_space.low)
    high = tuple(float(v) for v in action_space.high)
    return Spec(obs, action_space.shape[0], low, high, max_steps)


def make_vec(config: EnvConfig, num_envs: int, *, history: int = 1, render: str | None = None) -> VecEnv:
    """Make the environment `config.name` with `num_envs` copies, keeping `config.obs_keys` (empty = all)."""
    env = ENVS.get(config.name).target(config, num_envs, render=render)
    max_steps = config.max_steps or int(getattr(env, "max_steps", 0) or 0)
    if not max_steps and getattr(env, "spec", None) is not None:
        max_steps = int(env.spec.max_episode_steps or 0)
    return VecEnv(env, history=history, max_steps=max_steps)


def to_torch(obs: Arrays, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Arrays to tensors on `device`; shares memory on CPU."""
    return {key: torch.from_numpy(np.ascontiguousarray(value)).to(device) for key, value in obs.items()}


def _first(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask.reshape(len(mask), -1).any(axis=1))[0])


def _final_success(success: np.ndarray | None, info: dict[str, Any], done: np.ndarray) -> np.ndarray | None:
    """Under gymnasium's own SAME_STEP, infos of the ending step sit in `final_info`."""
    final = info["final_info"]
    value = final.get("success", final.get("is_success")) if isinstance(final, dict) else None
    if value is None:
        return success
    out = np.zeros(len(done), bool) if success is None else success.copy()
    out[done] = np.asarray(value).astype(bool)[done]
    return out
