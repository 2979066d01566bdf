# SPDX-License-Identifier: Apache-2.0
"""Isaac Lab tasks (ManagerBasedRLEnv, DirectRLEnv) as a SAME_STEP vector environment.

Isaac Lab resets ended environments inside `step` and returns their first new observation, which is
SAME_STEP. The final observation comes from one of two places:

* newer releases publish it in `extras["final_obs"]` when the task's config sets `compute_final_obs`, which
the adapter
  does;
* Isaac Lab 2.3 does not keep it. There the adapter computes the observations just before `_reset_idx` runs
inside a
  step: after physics and rewards, before anything is reset. Observation histories are not advanced by it; a
      noise
  model draws once more than it would.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from robopost.config import EnvConfig
from robopost.errors import ConfigError, EnvError, require, unknown
from robopost.registry import ENVS

from ..batching import check_actions
from .observations import BatchAdapter, select

if TYPE_CHECKING:
    from torch import Tensor

_app: Any = None  # Isaac Sim starts once per process
_open: set[int] = set()  # ids of environments not closed yet; Isaac Lab allows one simulation per process


@dataclass
class IsaacLabConfig(EnvConfig):
    """An Isaac Lab task by id, e.g. `Isaac-Lift-Cube-Franka-v0`; the simulator runs on `device`.

    `obs_group` is the group the policy sees. Manager-based tasks declare unbounded actions: `action_limit` >
    0 declares and clips to +-action_limit. `success_term` names the termination term that means success.
    """

    name: str = "isaaclab"
    id: str = ""
    device: str = "cuda:0"
    obs_group: str = "policy"
    action_limit: float = 0.0
    success_term: str = "success"
    headless: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action_limit < 0:
            raise ConfigError(
                f"env.action_limit={self.action_limit} must be 0 (as the task says) or positive"
            )


@dataclass
class TensorStep:
    """One step on the simulator's device: what `IsaacLabVecEnv.step_tensors` returns.

    `final_obs` is None on steps that end no episode; its rows count where `terminated | truncated`.
    """

    obs: dict[str, Tensor]
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: dict[str, Tensor] | None
    success: Tensor | None


@ENVS.register("isaaclab", IsaacLabConfig)
def make(config: IsaacLabConfig, num_envs: int, *, render: str | None = None) -> VectorEnv:
    """Isaac Lab tasks by id (needs Isaac Sim and a GPU); all copies in one simulation."""
    require("isaaclab", "isaaclab")
    if not config.id:
        raise ConfigError("env.id is empty. Fix: env.id=Isaac-Cartpole-v0, or another Isaac Lab task")
    if _open:
        raise EnvError(
            "Isaac Lab runs one simulation per process and one is open. "
            "Fix: close it first, or evaluate with `robopost eval` after training"
        )
    _launch(config, render)
    # Only importable once the simulator runs.
    require("isaaclab_tasks", "isaaclab")
    parse = require("isaaclab_tasks.utils", "isaaclab").parse_env_cfg
    try:
        cfg = parse(config.id, device=config.device, num_envs=num_envs)
    except gym.error.Error as error:
        raise ConfigError(f"env.id={config.id!r}: {' '.join(str(error).split())}") from error
    if hasattr(cfg, "compute_final_obs"):
        cfg.compute_final_obs = True
    if config.max_steps:
        # Half a step less: Isaac Lab rounds the quotient up, and floating point may push it over.
        cfg.episode_length_s = (config.max_steps - 0.5) * cfg.sim.dt * cfg.decimation
    env = gym.make(config.id, cfg=cfg, render_mode=render, **config.kwargs)
    return IsaacLabVecEnv(
        env,
        obs_group=config.obs_group,
        obs_keys=config.obs_keys,
        action_limit=config.action_limit,
        success_term=config.success_term,
    )


def _launch(config: IsaacLabConfig, render: str | None) -> None:
    global _app
    if _app is None:
        launcher = require("isaaclab.app", "isaaclab").AppLauncher
        _app = launcher(headless=config.headless, enable_cameras=render is not None, device=config.device).app


class IsaacLabVecEnv(VectorEnv):
    """Vector environment over a made Isaac Lab environment.

    `step` speaks numpy, as every environment of robopost; `step_tensors` stays on the device.
    `info["success"]` is there when the task has the termination term `success_term`, or puts a (N,) tensor
    `success` into its extras.

    Args:
        env: what `gym.make` gave; owned and closed by this object from now on.
        obs_group: observation group, `policy` in all stock tasks.
        obs_keys: observations to keep, empty = all.
        action_limit: symmetric bound for tasks with unbounded actions, 0 = none.
        success_term: termination term that means success.

    Raises:
        EnvError: the group does not exist, or final observations can't be had from this Isaac Lab version.
    """

    def __init__(
        self,
        env: Any,
        *,
        obs_group: str = "policy",
        obs_keys: Sequence[str] = (),
        action_limit: float = 0.0,
        success_term: str = "success",
    ) -> None:
        import torch

        _open.add(id(self))
        self._env = env
        self._base = base = env.unwrapped
        self.num_envs = int(base.num_envs)
        self.device = torch.device(base.device)
        self.max_steps = int(base.max_episode_length)
        self.metadata = {**base.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = base.render_mode
        self.spec = env.spec
        groups = base.single_observation_space
        if obs_group not in groups.spaces:
            raise unknown("env.obs_group", obs_group, groups.spaces, EnvError)
        self._group, self._adapter = obs_group, BatchAdapter(_with_images(groups[obs_group]))
        self.single_observation_space = select(self._adapter.space, list(obs_keys))
        self._keys = list(self.single_observation_space.spaces)
        self.single_action_space, self._limit = _action_space(base.single_action_space, action_limit)
        self._action_dim = int(np.prod(self.single_action_space.shape))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._success_term = success_term
        self._in_step = False
        self._captured: dict[str, Any] | None = None
        self._publishes = bool(getattr(base.cfg, "compute_final_obs", False))
        if not self._publishes:
            self._capture_before_reset()

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start new episodes everywhere. Isaac Lab has one random stream: only the first seed is used."""
        first = seed if seed is None or isinstance(seed, int | np.integer) else next(iter(seed))
        obs, _ = self._env.reset(seed=None if first is None else int(first))
        return self._to_numpy(self._select(obs)), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment; ended ones are reset in the same step."""
        import torch

        actions = check_actions(actions, self.num_envs, self._action_dim)
        result = self.step_tensors(torch.as_tensor(actions, dtype=torch.float32, device=self.device))
        terminated, truncated = _numpy(result.terminated), _numpy(result.truncated)
        info: dict[str, Any] = {}
        if result.final_obs is not None:
            info["final_obs"], info["_final_obs"] = self._to_numpy(result.final_obs), terminated | truncated
        if result.success is not None:
            info["success"] = _numpy(result.success)
        return self._to_numpy(result.obs), _numpy(result.reward), terminated, truncated, info

    def step_tensors(self, actions: Tensor) -> TensorStep:
        """`step` without leaving the device.

        Args:
            actions: (N, A) on `device`.
        """
        if self._limit:
            actions = actions.clamp(-self._limit, self._limit)
        self._captured, self._in_step = None, True
        try:
            obs, reward, terminated, truncated, extras = self._env.step(actions)
        finally:
            self._in_step = False
        terminated, truncated = terminated.bool().clone(), truncated.bool().clone()
        final = None
        if (terminated | truncated).any():
            raw = extras.get("final_obs") if self._publishes else self._captured
            if raw is None:
                raise EnvError(
                    "Isaac Lab ended an episode without its final observation: its version is not supported"
                )
            final = self._select(raw)
        return TensorStep(
            self._select(obs), reward.clone(), terminated, truncated, final, self._success(extras)
        )

    def render(self, indices: Sequence[int] | None = None) -> tuple[np.ndarray, ...] | None:
        """The viewport's frame once per asked environment: Isaac Lab has one camera over the whole scene."""
        frame = self._env.render()
        count = self.num_envs if indices is None else len(indices)
        return None if frame is None else (np.asarray(frame),) * count

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environment; the simulator itself runs until the process ends."""
        _open.discard(id(self))
        self._env.close()

    def _capture_before_reset(self) -> None:
        """Compute the observations before `_reset_idx` of a step, for versions that don't publish them."""
        base = self._base
        manager = getattr(base, "observation_manager", None)
        if manager is None:
            observe = self._observe_direct
        elif "update_history" in inspect.signature(manager.compute).parameters:
            observe = lambda: manager.compute(update_history=False)  # noqa: E731
        else:
            raise EnvError("this Isaac Lab can't observe without advancing its histories. Fix: isaaclab>=2.3")
        original = base._reset_idx

        def reset_idx(env_ids: Any) -> Any:
            if self._in_step:
                self._captured = _clone(observe())
            return original(env_ids)

        base._reset_idx = reset_idx

    def _observe_direct(self) -> dict[str, Any]:
        """What the end of `DirectRLEnv.step` does, noise included."""
        obs = self._base._get_observations()
        if getattr(self._base.cfg, "observation_noise_model", None):
            obs["policy"] = self._base._observation_noise_model(obs["policy"])
        return obs

    def _select(self, obs: dict[str, Any]) -> dict[str, Tensor]:
        adapted = self._adapter(obs[self._group])
        return {key: adapted[key] for key in self._keys}

    def _success(self, extras: dict[str, Any]) -> Tensor | None:
        manager = getattr(self._base, "termination_manager", None)
        if manager is not None and self._success_term in manager.active_terms:
            return manager.get_term(self._success_term).bool().clone()
        value: Any = extras.get("success")
        if getattr(value, "shape", None) == (self.num_envs,):
            return value.bool().clone()
        return None

    def _to_numpy(self, obs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        return {key: _numpy(value) for key, value in obs.items()}


def _action_space(space: gym.spaces.Box, limit: float) -> tuple[gym.spaces.Box, float]:
    bounded = np.isfinite(space.low).all() and np.isfinite(space.high).all()
    if bounded or not limit:
        return space, 0.0
    return gym.spaces.Box(-limit, limit, space.shape, np.float32), limit


def _with_images(space: gym.Space) -> gym.Space:
    """Isaac Lab declares camera observations as unbounded floats; they hold uint8 images."""
    if isinstance(space, gym.spaces.Dict):
        return gym.spaces.Dict({key: _with_images(value) for key, value in space.spaces.items()})
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 3 and space.shape[-1] in (1, 3, 4):
        return gym.spaces.Box(0, 255, space.shape, np.uint8)
    return space


def _numpy(value: Tensor) -> np.ndarray:
    # A copy also on CPU: Isaac Lab reuses its buffers.
    return value.detach().cpu().numpy().copy()


def _clone(obs: Any) -> Any:
    return {key: _clone(value) for key, value in obs.items()} if isinstance(obs, dict) else obs.clone()
