# SPDX-License-Identifier: Apache-2.0
"""Steps a list of Gymnasium environment objects one after the other, SAME_STEP autoreset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from robopost.errors import EnvError

from ..batching import check_actions, check_choices, per_env_seeds
from .observations import ObservationAdapter, Observe, select, stack
from .rendering import fast_frames

SuccessFn = Callable[[dict[str, Any]], bool | None]


def info_success(info: dict[str, Any]) -> bool | None:
    """`success` or `is_success` of an info dict, None where there is neither."""
    value = info.get("success", info.get("is_success"))
    return None if value is None else bool(value)


def control_rate(env: gym.Env) -> dict[str, float]:
    """`control_hz` of an environment that tells its control period as `dt` (MuJoCo's do), else nothing."""
    period = getattr(env.unwrapped, "dt", None)
    known = isinstance(period, float | np.floating) and period > 0
    return {"control_hz": 1.0 / float(cast(float, period))} if known else {}


class InProcessVecEnv(VectorEnv):
    """Vector environment over environment objects, for every simulator that has no batched path.

    `info` holds `success` (N,) bool where the environments tell it, `final_obs` and `_final_obs` on steps
    that end an episode, and the (N,) arrays named in `info_keys`. All belong to the step just done, never to
    the reset.

    Args:
        make: makes one environment; called `num_envs` times.
        num_envs: number of copies.
        obs_keys: observations to keep, empty = all.
        success: reads success off an info dict.
        info_keys: numbers of the info dict that are passed on.
        per_env_option: reset option of which every environment may get its own value.
        observe: makes the mapping from an environment's observations to the dict contract.
        fast_render: MuJoCo frames without shadows, reflections, skybox and multisampling.
    """

    def __init__(
        self,
        make: Callable[[], gym.Env],
        num_envs: int,
        *,
        obs_keys: Sequence[str] = (),
        success: SuccessFn = info_success,
        info_keys: Sequence[str] = (),
        per_env_option: str = "",
        observe: Callable[[gym.Space], Observe] = ObservationAdapter,
        fast_render: bool = True,
    ) -> None:
        self.envs = [make() for _ in range(num_envs)]
        first = self.envs[0]
        self.num_envs = num_envs
        self.spec = first.spec
        self.max_steps = int((first.spec.max_episode_steps if first.spec else 0) or 0)
        self.metadata = {**control_rate(first), **first.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = first.render_mode
        self._adapters = [observe(env.observation_space) for env in self.envs]
        self.single_observation_space = select(self._adapters[0].space, list(obs_keys))
        self.single_action_space = first.action_space
        space = first.action_space
        self._discrete = isinstance(space, gym.spaces.Discrete)
        if not self._discrete and not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            raise EnvError(f"action space {space} is not supported: robopost needs a flat Box or a Discrete")
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._action_dim = 1 if self._discrete else cast(Any, space.shape)[0]
        self._keys = list(self.single_observation_space.spaces)
        self._success, self._info_keys, self._fast_render = success, list(info_keys), fast_render
        self._option = per_env_option
        self._has_success: bool | None = None
        self._started = False

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: one per environment, a base seed (environment i gets `seed + i`), or None.
            options: passed to every environment. The value of `per_env_option` may be a list or a 2-D array
                with one entry per environment.
        """
        seeds = per_env_seeds(seed, self.num_envs)
        each = self._split_options(options)
        rows = []
        for env, adapter, single, opts in zip(self.envs, self._adapters, seeds, each, strict=True):
            obs, _ = env.reset(seed=single, options=opts)
            rows.append(adapter(obs))
        self._started = True
        return stack(rows, self._keys), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment; ended ones are reset in the same step. Discrete actions are integers (N,)."""
        if not self._started:
            raise EnvError("step() before reset(). Fix: call reset() first")
        if self._discrete:
            actions = check_choices(
                actions, self.num_envs, cast(gym.spaces.Discrete, self.single_action_space)
            )
        else:
            actions = check_actions(actions, self.num_envs, self._action_dim)
        rows: list[dict[str, np.ndarray]] = []
        finals: list[dict[str, np.ndarray]] = []
        reward = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        success = np.zeros(self.num_envs, bool)
        info: dict[str, Any] = {key: np.zeros(self.num_envs) for key in self._info_keys}
        for i, (env, adapter) in enumerate(zip(self.envs, self._adapters, strict=True)):
            raw, reward[i], terminated[i], truncated[i], single = env.step(actions[i])
            row = adapter(raw)
            finals.append(row)
            value = self._success(single)
            self._has_success = self._has_success or value is not None
            success[i] = bool(value)
            for key in self._info_keys:
                info[key][i] = single.get(key, np.nan)
            if terminated[i] or truncated[i]:
                row = adapter(env.reset()[0])
            rows.append(row)
        done = terminated | truncated
        if done.any():
            info["final_obs"], info["_final_obs"] = stack(finals, self._keys), done
        if self._has_success:
            info["success"] = success
        return stack(rows, self._keys), reward, terminated, truncated, info

    def render(self, indices: Sequence[int] | None = None) -> tuple[Any, ...] | None:
        """Frames (H, W, 3) of the environments in `indices` (default all), or None without a render mode."""
        if self.render_mode is None:
            return None
        chosen = range(self.num_envs) if indices is None else indices
        return tuple(
            fast_frames(self.envs[i]) if self._fast_render else self.envs[i].render() for i in chosen
        )

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()

    def _split_options(self, options: dict[str, Any] | None) -> list[dict[str, Any] | None]:
        if not options or self._option not in options:
            return [options] * self.num_envs
        value = options[self._option]
        if not isinstance(value, list) and np.ndim(value) < 2:
            return [options] * self.num_envs
        if isinstance(value, list) and np.isscalar(value[0]):
            return [options] * self.num_envs
        if len(value) != self.num_envs:
            raise EnvError(
                f"options[{self._option!r}] has {len(value)} entries for {self.num_envs} environments"
            )
        return [{**options, self._option: entry} for entry in value]
