# SPDX-License-Identifier: Apache-2.0
"""Gymnasium's MuJoCo v5 tasks, vectorised in one process, with bit for bit Gymnasium's numbers.

A team of threads calls `mj_step` (MuJoCo releases the GIL), each on one MjData that stays in its cache. An
environment is a row of numbers, written into the thread's MjData before a step and read back after it. The
row holds the solver's warm start, and fields derived from the state (contact forces, body positions, which
lag the state by a Runge-Kutta stage) are read right after the step, so results are Gymnasium's own;
`mujoco.rollout` keeps neither between calls. Python touches each environment for about two microseconds per
step; rewards and observations are computed for the whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from robopost.errors import EnvError

from .adapters.observations import select
from .adapters.rendering import fast_frames
from .batching import check_actions, per_env_seeds
from .mujoco_v5_tasks import TASKS, Task
from .mujoco_vec import pack_generator, unpack_generator
from .threads import ThreadTeam, default_threads

# Everything a step depends on. Other inputs (applied forces, mocap bodies) keep the model's values.
STATE = int(
    mujoco.mjtState.mjSTATE_FULLPHYSICS | mujoco.mjtState.mjSTATE_WARMSTART | mujoco.mjtState.mjSTATE_CTRL
)
STANDARD_WRAPPERS = ("TimeLimit", "OrderEnforcing", "PassiveEnvChecker")


def find_task(env: gym.Env) -> type[Task] | None:
    """The batched task of a made Gymnasium environment, or None when it is not one of the v5 tasks.

    Wrappers that change what the environment does (anything but the ones `gym.make` adds) rule it out.
    """
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        kind = type(layer)
        if kind.__name__ not in STANDARD_WRAPPERS or not kind.__module__.startswith("gymnasium."):
            return None
        layer = layer.env
    return TASKS.get(f"{type(layer).__module__}.{type(layer).__qualname__}")


class MujocoV5VecEnv(VectorEnv):
    """Vector environment over one of Gymnasium's MuJoCo v5 tasks, SAME_STEP autoreset.

    Observations are `{"state": (N, D)}`; `info["final_obs"]` has the same form on steps that end an episode,
    with `info["_final_obs"]` (N,) bool saying which rows hold. Environment i seeded with s starts exactly
    where `gym.make(id).reset(seed=s)` does, and its later resets draw from the same random stream.

    Args:
        env: the environment `gym.make(id, **kwargs)` gave; owned and closed by this object from now on.
        num_envs: number of copies.
        max_steps: time limit in steps; 0 = the environment's own.
        threads: stepping threads, 0 = all CPUs of the process.
        obs_keys: must be empty or `["state"]`.
        fast_render: frames without shadows, reflections, skybox and multisampling.
        dtype: of observations; float64 gives Gymnasium's numbers unrounded.

    Raises:
        EnvError: `env` is not one of the v5 tasks, or an action has the wrong shape or is not finite.
    """

    def __init__(
        self,
        env: gym.Env,
        num_envs: int,
        *,
        max_steps: int = 0,
        threads: int = 0,
        obs_keys: Sequence[str] = (),
        fast_render: bool = True,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> None:
        task = find_task(env)
        if task is None:
            raise EnvError(f"{env} is not one of Gymnasium's MuJoCo v5 tasks. Fix: env.fast=false")
        self._env: Any = env.unwrapped
        self._wrapped = env
        self._task = task(self._env)
        self.spec = env.spec
        self.num_envs = num_envs
        self.render_mode = env.render_mode
        self.max_steps = max_steps or int((env.spec.max_episode_steps if env.spec else 0) or 0)
        self.metadata = {
            **self._env.metadata,
            "autoreset_mode": AutoresetMode.SAME_STEP,
            "control_hz": 1.0 / self._env.dt,
        }
        state = gym.spaces.Box(-np.inf, np.inf, (self._task.obs_dim,), dtype)
        self.single_observation_space = select(gym.spaces.Dict({"state": state}), list(obs_keys))
        self._fast_render = fast_render
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = env.action_space
        self.action_space = batch_space(env.action_space, num_envs)

        self._dtype = dtype
        self._model = self._env.model
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._state = np.zeros((num_envs, mujoco.mj_stateSize(self._model, STATE)))
        self._ctrl = self._columns(mujoco.mjtState.mjSTATE_CTRL)
        self._views = {
            "qpos": self._columns(mujoco.mjtState.mjSTATE_QPOS),
            "qvel": self._columns(mujoco.mjtState.mjSTATE_QVEL),
            "ctrl": self._ctrl,
        }
        derived = self._task.derived(self._env.data)
        self._views |= {name: np.zeros((num_envs, view.size)) for name, view in derived.items()}
        self._before = np.zeros((num_envs, self._task.carry_dim))
        self._read_template = self._reader(self._env.data)
        count = min(threads or default_threads(num_envs), num_envs)
        self._team = ThreadTeam([self._make_work() for _ in range(count)])
        self._started = False

    @property
    def threads(self) -> int:
        """Threads that step, the calling one included."""
        return len(self._team)

    def _columns(self, part: mujoco.mjtState) -> np.ndarray:
        """Columns of `part` in the state rows: parts follow each other in the order of their bits."""
        start = mujoco.mj_stateSize(self._model, STATE & (int(part) - 1))
        return self._state[:, start : start + mujoco.mj_stateSize(self._model, int(part))]

    def _reader(self, data: mujoco.MjData) -> Callable[[int], None]:
        """A function that copies `data` into row i of all buffers. Everything it touches is bound once."""
        get, model, rows = mujoco.mj_getState, self._model, list(self._state)
        fields = [(list(self._views[name]), view) for name, view in self._task.derived(data).items()]

        def read(i: int) -> None:
            get(model, data, rows[i], STATE)
            for buffer, view in fields:
                buffer[i][:] = view

        return read

    def _make_work(self) -> Callable[[Iterator[int]], None]:
        """The hot loop of one thread, with an MjData of its own."""
        put, step, model, rows = mujoco.mj_setState, mujoco.mj_step, self._model, list(self._state)
        frame_skip, contact_forces = int(self._env.frame_skip), self._task.contact_forces
        data = mujoco.MjData(model)
        read = self._reader(data)

        def work(jobs: Iterator[int]) -> None:
            for i in jobs:
                put(model, data, rows[i], STATE)
                step(model, data, frame_skip)
                if contact_forces:
                    mujoco.mj_rnePostConstraint(model, data)
                read(i)

        return work

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict]:
        """Step every environment; ended ones are reset in the same step.

        Args:
            actions: (N, A), float32 or float64.

        Returns:
            Observations, reward (N,) float64, terminated, truncated (N,) bool, info.
        """
        if not self._started:
            raise EnvError("step() before reset(). Fix: call reset() first")
        actions = check_actions(actions, self.num_envs, self._ctrl.shape[1])
        self._ctrl[:] = actions
        self._team.run(range(self.num_envs))
        self._elapsed += 1
        task, views = self._task, self._views
        reward, terminated = task.reward(views, self._before, actions)
        state = np.empty((self.num_envs, task.obs_dim), dtype=self._dtype)
        task.observe(views, state)
        self._before[:] = task.position(views)
        truncated = self._elapsed >= self.max_steps if self.max_steps else np.zeros(self.num_envs, dtype=bool)
        info: dict[str, Any] = {}
        done = terminated | truncated
        if done.any():
            info["final_obs"], info["_final_obs"] = {"state": state.copy()}, done
            self._reset(np.flatnonzero(done), state)
        return {"state": state}, reward, terminated, truncated, info

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: one seed per environment, a base seed (environment i gets `seed + i`), or None to go on
                with the random streams.
            options: `reset_mask` (N,) bool resets only the environments where it is true.
        """
        seeds = per_env_seeds(seed, self.num_envs)
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)), dtype=bool)
        if mask.shape != (self.num_envs,):
            raise EnvError(f"reset_mask has shape {mask.shape}, expected ({self.num_envs},)")
        if not self._started and not mask.all():
            raise EnvError("the first reset must reset every environment")
        for i in np.flatnonzero(mask):
            if seeds[i] is not None or self._rngs[i] is None:
                self._rngs[i], _ = seeding.np_random(seeds[i])
        state = np.empty((self.num_envs, self._task.obs_dim), dtype=self._dtype)
        self._task.observe(self._views, state)
        self._reset(np.flatnonzero(mask), state)
        self._started = True
        return {"state": state}, {}

    def _reset(self, indices: np.ndarray, state: np.ndarray) -> None:
        """Reset with Gymnasium's own `reset_model`; writes the rows of `state` and of all buffers."""
        env = self._env
        for i in indices:
            env._np_random = self._rngs[i]
            mujoco.mj_resetData(self._model, env.data)
            state[i] = env.reset_model()
            self._read_template(i)
        self._elapsed[indices] = 0
        rows = {name: view[indices] for name, view in self._views.items()}
        self._before[indices] = self._task.position(rows)

    def get_state(self) -> dict[str, np.ndarray]:
        """All a bitwise resume needs: physics with the solver's warm start, counters, random streams."""
        if not self._started:
            raise EnvError("get_state() before reset(). Fix: call reset() first")
        return {
            "physics": self._state.copy(),
            "elapsed": self._elapsed.copy(),
            "before": self._before.copy(),
            "rng": np.stack([pack_generator(rng) for rng in self._rngs if rng is not None]),
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore `get_state` output.

        Raises:
            EnvError: it comes from another task or another number of environments.
        """
        found, expected = state["physics"].shape, self._state.shape
        if found != expected:
            raise EnvError(f"saved physics has shape {found}, this environment needs {expected}")
        self._state[:] = state["physics"]
        self._elapsed[:] = state["elapsed"]
        self._before[:] = state["before"]
        self._rngs = [unpack_generator(row) for row in state["rng"]]
        self._started = True

    def render(self, indices: Sequence[int] | None = None) -> tuple[np.ndarray, ...] | None:
        """Frames (H, W, 3) of the environments in `indices` (default all), or None without a render mode."""
        if self.render_mode is None:
            return None
        frames = []
        for i in range(self.num_envs) if indices is None else indices:
            mujoco.mj_setState(self._model, self._env.data, self._state[i], STATE)
            mujoco.mj_forward(self._model, self._env.data)
            frames.append(fast_frames(self._env) if self._fast_render else self._env.render())
        return tuple(frames)

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads and free the renderer."""
        self._team.close()
        self._wrapped.close()
