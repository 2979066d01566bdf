# SPDX-License-Identifier: Apache-2.0
# MuJoCo's compiled module has no type stubs.
# pyright: reportAttributeAccessIssue=false
"""Batched MuJoCo in one process.

`RolloutPhysics` steps N copies of a model on MuJoCo's threads; `MujocoVectorEnv` turns that into a Gymnasium
vector environment with SameStep autoreset, per-environment random streams and exact save and restore.

What an environment does next depends on its own FULLPHYSICS state (time, qpos, qvel, act, plugins) and
control alone: the constraint solver starts cold at each control step, so results don't depend on the
neighbours in the batch, on the number of threads, or on whether a state was restored from a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from mujoco import rollout

from robopost.errors import EnvError

from .batching import check_actions, per_env_seeds
from .threads import default_threads

Array = np.ndarray
FULLPHYSICS = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)


class RolloutPhysics:
    """N copies of one model, stepped together by `mujoco.rollout` with preallocated arrays.

    Args:
        model: the compiled model, shared by all copies.
        num_envs: N.
        nstep: physics steps per control step.
        nthread: threads of MuJoCo's pool; 0 = one per core, at most N. 1 runs on the calling thread.

    Attributes:
        state: (N, nstate) float64, the FULLPHYSICS state of every copy.
        qpos, qvel: views into `state`, (N, nq) and (N, nv).
        sensordata: (N, nsensordata) float64. MuJoCo evaluates sensors before it integrates, so after a
            step they describe the beginning of the last physics step; after `set_physics` they are exact.
    """

    def __init__(self, model: mujoco.MjModel, num_envs: int, nstep: int, nthread: int = 0) -> None:
        if num_envs < 1 or nstep < 1:
            raise EnvError(f"num_envs={num_envs} and nstep={nstep} must be at least 1")
        self.model, self.num_envs, self.nstep = model, num_envs, nstep
        threads = min(nthread or default_threads(num_envs), num_envs)
        self.nthread = threads
        self._pool = rollout.Rollout(nthread=0 if threads == 1 else threads)
        self._models = [model] * num_envs
        self._data = [mujoco.MjData(model) for _ in range(threads)]
        nstate = mujoco.mj_stateSize(model, FULLPHYSICS)
        self._trace = np.zeros((num_envs, nstep, nstate))
        self._sensor_trace = np.zeros((num_envs, nstep, model.nsensordata))
        self._ctrl = np.zeros((num_envs, nstep, model.nu))
        self.state = np.zeros((num_envs, nstate))
        self.sensordata = np.zeros((num_envs, model.nsensordata))
        start = mujoco.mj_stateSize(model, int(mujoco.mjtState.mjSTATE_TIME))
        self.qpos = self.state[:, start : start + model.nq]
        self.qvel = self.state[:, start + model.nq : start + model.nq + model.nv]
        self._scratch = mujoco.MjData(model)
        self.set_physics(
            np.arange(num_envs), np.tile(model.qpos0, (num_envs, 1)), np.zeros((num_envs, model.nv))
        )

    def step_physics(self, ctrl: Array) -> tuple[Array, Array]:
        """Advance every copy by `nstep` physics steps.

        Args:
            ctrl: (N, nu), held over the control step, or (N, nstep, nu), one row per physics step.

        Returns:
            `(state, sensordata)`: the object's own arrays, overwritten by the next call.
        """
        self._ctrl[:] = ctrl[:, None] if ctrl.ndim == 2 else ctrl
        self._pool.rollout(
            self._models,
            self._data,
            self.state,
            self._ctrl,
            skip_checks=True,
            nstep=self.nstep,
            state=self._trace,
            sensordata=self._sensor_trace,
        )
        self.state[:] = self._trace[:, -1]
        self.sensordata[:] = self._sensor_trace[:, -1]
        return self.state, self.sensordata

    def set_physics(self, indices: Array, qpos: Array, qvel: Array) -> None:
        """Put copies `indices` (n,) at time 0 with `qpos` (n, nq) and `qvel` (n, nv); exact sensors."""
        for row, index in enumerate(indices):
            mujoco.mj_resetData(self.model, self._scratch)
            self._scratch.qpos[:] = qpos[row]
            self._scratch.qvel[:] = qvel[row]
            mujoco.mj_forward(self.model, self._scratch)
            mujoco.mj_getState(self.model, self._scratch, self.state[index], FULLPHYSICS)
            self.sensordata[index] = self._scratch.sensordata

    def load_into(self, index: int, data: mujoco.MjData) -> None:
        """Write copy `index` into `data` and update its kinematics, for rendering."""
        mujoco.mj_setState(self.model, data, self.state[index], FULLPHYSICS)
        mujoco.mj_kinematics(self.model, data)
        mujoco.mj_camlight(self.model, data)

    def close(self) -> None:
        """Stop the thread pool."""
        if self._pool.rollout_ is not None:
            self._pool.close()


def pack_generator(generator: np.random.Generator) -> Array:
    """State of a PCG64 generator as (6,) uint64."""
    state = generator.bit_generator.state
    values = []
    for number in (state["state"]["state"], state["state"]["inc"]):
        values += [number >> 64, number & (2**64 - 1)]
    return np.array([*values, state["has_uint32"], state["uinteger"]], dtype=np.uint64)


def unpack_generator(packed: Array) -> np.random.Generator:
    """Generator in the state `pack_generator` stored."""
    words = [int(value) for value in packed]
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": words[0] << 64 | words[1], "inc": words[2] << 64 | words[3]},
        "has_uint32": words[4],
        "uinteger": words[5],
    }
    return np.random.Generator(bits)


class MujocoVectorEnv(gym.vector.VectorEnv, ABC):
    """Gymnasium vector environment on `RolloutPhysics`.

    A subclass samples initial states, maps actions to controls, observes and scores, always for the whole
    batch. Episodes end by termination or at `max_steps` (truncation) and restart in the same step: the
    returned observation is the next episode's first, `info["final_obs"]` holds the true last one (arrays
    (N, ...), valid where `info["_final_obs"]`), and reward, `terminated`, `truncated` and `info["success"]`
    belong to the step just done.

    Environment i's episodes depend only on its seed: `reset(seed=s)` gives it s + i, `reset(seed=[...])` its
    own.

    Args:
        model, num_envs, nstep, nthread: as in `RolloutPhysics`.
        max_steps: time limit in environment steps, 0 = none.
        observation_space, action_space: of one environment.
        autoreset: False leaves a finished environment in its last state (single-environment wrappers).
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        nstep: int,
        *,
        observation_space: gym.spaces.Dict,
        action_space: gym.spaces.Box,
        max_steps: int = 0,
        nthread: int = 0,
        autoreset: bool = True,
    ) -> None:
        self.metadata = {
            "autoreset_mode": AutoresetMode.SAME_STEP if autoreset else AutoresetMode.DISABLED,
            "render_modes": ["rgb_array"],
            "render_fps": round(1.0 / (nstep * model.opt.timestep)),
            "control_hz": 1.0 / (nstep * model.opt.timestep),
        }
        self.num_envs = num_envs
        self.max_steps = max_steps
        self.physics = RolloutPhysics(model, num_envs, nstep, nthread)
        self.single_observation_space = observation_space
        self.single_action_space: gym.spaces.Box = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.elapsed = np.zeros(num_envs, dtype=np.int64)
        self.rngs: list[np.random.Generator] = []
        self._autoreset = autoreset
        self._done = np.zeros(num_envs, bool)  # whose episode has ended in the step being observed

    @abstractmethod
    def _reset_envs(self, indices: Array) -> None:
        """Start new episodes in environments `indices`, drawing only from `self.rngs[i]`."""

    @abstractmethod
    def _control(self, action: Array) -> Array:
        """Map actions (N, A), finite and within bounds, to (N, nu) or (N, nstep, nu) controls."""

    @abstractmethod
    def _evaluate(self, action: Array) -> tuple[Array, Array, dict[str, Any]]:
        """After the step: reward (N,), terminated (N,) bool, info ("success" (N,) bool if there is one)."""

    @abstractmethod
    def _observe(self, indices: Array | None = None) -> dict[str, Array]:
        """Fresh observation arrays of environments `indices` (None = all), in that order."""

    def _extra_state(self) -> dict[str, Array]:
        """Further per-environment arrays (N, ...) of a subclass, by reference, restored in place."""
        return {}

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Start new episodes everywhere; without `seed` the random streams go on."""
        if seed is not None or not self.rngs:
            seeds = per_env_seeds(seed, self.num_envs)
            self.rngs = [np.random.Generator(np.random.PCG64(value)) for value in seeds]
        indices = np.arange(self.num_envs)
        self.elapsed[:] = 0
        self._reset_envs(indices)
        return self._observe(), self._reset_info()

    def _reset_info(self) -> dict[str, Any]:
        """Info returned by `reset`."""
        return {}

    def step(self, actions: Array) -> tuple[dict[str, Array], Array, Array, Array, dict[str, Any]]:
        """Advance every environment by one control step; actions outside the bounds are clipped.

        Raises:
            EnvError: an action has the wrong shape or is not finite, or the physics diverged.
        """
        if not self.rngs:
            raise EnvError("step was called before reset: call reset(seed=...) first")
        space = self.single_action_space
        checked = check_actions(actions, self.num_envs, space.shape[0]).astype(np.float64)
        action = np.clip(checked, space.low, space.high)
        self.physics.step_physics(self._control(action))
        self.elapsed += 1
        reward, terminated, info = self._evaluate(action)
        truncated = ~terminated & (self.elapsed >= self.max_steps if self.max_steps else False)
        done = self._done = terminated | truncated
        obs = self._observe()
        if self._autoreset and done.any():
            indices = np.flatnonzero(done)
            info["final_obs"] = {key: value.copy() for key, value in obs.items()}
            info["_final_obs"] = done.copy()
            self.elapsed[indices] = 0
            self._reset_envs(indices)
            for key, value in self._observe(indices).items():
                obs[key][indices] = value
        return obs, reward, terminated, truncated, info

    def get_state(self) -> dict[str, Array]:
        """Copies of everything that determines the future: physics, sensors, counters, random streams."""
        if not self.rngs:
            raise EnvError("get_state was called before reset: call reset(seed=...) first")
        return {
            "physics": self.physics.state.copy(),
            "sensordata": self.physics.sensordata.copy(),
            "elapsed": self.elapsed.copy(),
            "rng": np.stack([pack_generator(generator) for generator in self.rngs]),
            **{key: value.copy() for key, value in self._extra_state().items()},
        }

    def set_state(self, state: dict[str, Array]) -> None:
        """Restore `get_state` output; the continuation is bitwise the same.

        Raises:
            EnvError: an array is missing or has another shape (other task, other num_envs).
        """
        targets = {
            "physics": self.physics.state,
            "sensordata": self.physics.sensordata,
            "elapsed": self.elapsed,
            **self._extra_state(),
        }
        for key, target in {**targets, "rng": np.empty((self.num_envs, 6))}.items():
            if key not in state or state[key].shape != target.shape:
                found = state[key].shape if key in state else "nothing"
                raise EnvError(f"environment state {key!r}: expected shape {target.shape}, found {found}")
        for key, target in targets.items():
            target[:] = state[key]
        self.rngs = [unpack_generator(row) for row in state["rng"]]

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the thread pool (called by `close`)."""
        self.physics.close()
