# SPDX-License-Identifier: Apache-2.0
"""The continuous combination lock: sparse reward behind a chain of choices, all copies stepped at once.

Dynamics of Song et al. 2023, "Hybrid RL" (arXiv 2210.06718), with the continuous actions of Zhou et al. 2023 (arXiv
2311.08384): latent states A, B and C; in A and B one of the discrete actions keeps the episode alive and every other
one leads to C for good. The released environment is `YifeiZhou02/HNPG`, file `lock_continuous.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from robopost.config import EnvConfig
from robopost.errors import ConfigError, EnvError, unknown
from robopost.registry import ENVS

from .batching import check_actions, per_env_seeds

Array = np.ndarray
LATENTS = 3  # A, B and C
DEAD = 2  # C
COMBINATION_STREAM, EXPERT_STREAM = 11, 12  # apart from other users of the same seed


@dataclass
class LockConfig(EnvConfig):
    """Open a combination lock: one right choice per step, a reward only at the last.

    Attributes:
        horizon: H, steps of every episode.
        actions: n, discrete actions and size of the continuous action.
        combination: seed of the right actions; training, evaluation and recorded data have to share it.
        temperature: of the softmax that turns a continuous action into the probabilities of the discrete ones.
        switch: probability that a right action changes A to B or B to A.
        consolation: paid with probability `consolation_rate` for a wrong last action.
        noise: std of the observation noise.
    """

    name: str = "lock"
    horizon: int = 5
    actions: int = 10
    combination: int = 0
    temperature: float = 0.1
    switch: float = 0.5
    consolation: float = 0.1
    consolation_rate: float = 0.5
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("horizon", 1), ("actions", 2), ("combination", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"env.{name}={getattr(self, name)} must be at least {least}")
        for name in ("switch", "consolation_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"env.{name}={getattr(self, name)} must lie in 0..1")
        if not self.temperature > 0:
            raise ConfigError(f"env.temperature={self.temperature} must be above 0")
        if not (0 <= self.noise < math.inf and math.isfinite(self.consolation)):
            raise ConfigError(
                f"env.noise={self.noise} must be 0 or more and env.consolation={self.consolation} finite"
            )
        for key in self.obs_keys:
            if key != "state":
                raise unknown("env.obs_keys entry", key, ["state"])
        if self.max_steps not in (0, self.horizon):
            raise ConfigError(
                f"env.max_steps={self.max_steps}: an episode of the lock has env.horizon={self.horizon} steps. "
                "Fix: env.horizon alone"
            )


def combination(config: LockConfig) -> Array:
    """The right discrete action in A (row 0) and in B (row 1) at every step: (2, H) int64."""
    rng = np.random.default_rng([COMBINATION_STREAM, config.combination])
    return rng.integers(0, config.actions, (2, config.horizon))


def hadamard(size: int) -> Array:
    """Sylvester's Hadamard matrix (size, size), `size` a power of 2; symmetric, its square is size * identity."""
    out = np.ones((1, 1))
    while len(out) < size:
        out = np.block([[out, out], [out, -out]])
    return out


def observation_dim(horizon: int) -> int:
    """Smallest power of 2 that holds three latent states and steps 0..H."""
    return 2 ** math.ceil(math.log2(horizon + LATENTS + 1))


class LockVectorEnv(gym.vector.VectorEnv):
    """N locks in one process; an environment's episodes depend on its own seed alone.

    Everything random in an episode but the agent's own draws is drawn at its start. The observation is a Hadamard
    matrix times (one-hot latent state + one-hot step + noise). An episode ends (terminates) after exactly H steps;
    `info["success"]` (N,) says that the optimal reward 1 was paid.
    """

    def __init__(self, config: LockConfig, num_envs: int, *, render: str | None = None) -> None:
        if render is not None:
            raise ConfigError(
                f"render={render!r}: the lock has nothing to show. Fix: track.video_episodes=0, video=0"
            )
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.config, self.num_envs, self.max_steps = config, num_envs, config.horizon
        dim = observation_dim(config.horizon)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (dim,), np.float32)
        self.single_action_space: gym.spaces.Box = gym.spaces.Box(0.0, 1.0, (config.actions,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.combination = combination(config)
        self.rotation = hadamard(dim)
        self.latent = np.zeros(num_envs, np.int64)
        self.elapsed = np.zeros(num_envs, np.int64)
        # Of the running episodes: draws for the discrete action, the switch and the consolation; observations
        # without their latent state.
        self._uniform = np.zeros((num_envs, config.horizon, 3))
        self._background = np.zeros((num_envs, config.horizon + 1, dim))
        self._rngs: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start new episodes everywhere; without `seed` the random streams go on."""
        if seed is not None or not self._rngs:
            seeds = per_env_seeds(seed, self.num_envs)
            self._rngs = [np.random.Generator(np.random.PCG64(value)) for value in seeds]
        self._begin(np.arange(self.num_envs))
        return self._observe(), {}

    def _begin(self, indices: Array) -> None:
        horizon, known = self.config.horizon, self.config.horizon + LATENTS
        noise = np.zeros((len(indices), horizon + 1, len(self.rotation)))
        start = np.empty(len(indices))
        for row, i in enumerate(indices):
            draws = self._rngs[i].random(1 + 3 * horizon)
            start[row] = draws[0]
            self._uniform[i] = draws[1:].reshape(horizon, 3)
            noise[row, :, :known] = self._rngs[i].standard_normal((horizon + 1, known))
        noise *= self.config.noise
        steps = np.arange(horizon + 1)
        noise[:, steps, LATENTS + steps] += 1.0
        self._background[indices] = noise @ self.rotation
        self.latent[indices] = start >= 0.5
        self.elapsed[indices] = 0

    def _observe(self) -> Array:
        rows = self._background[np.arange(self.num_envs), self.elapsed]
        return (rows + self.rotation[self.latent]).astype(np.float32)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One choice in every lock; actions outside [0, 1] are clipped.

        Raises:
            EnvError: called before `reset`, or an action of the wrong shape or not finite.
        """
        if not self._rngs:
            raise EnvError("step was called before reset: call reset(seed=...) first")
        config, every = self.config, np.arange(self.num_envs)
        action = np.clip(check_actions(actions, self.num_envs, config.actions).astype(np.float64), 0.0, 1.0)
        draw = self._uniform[every, self.elapsed]
        weight = np.exp((action - action.max(1, keepdims=True)) / config.temperature)
        ladder = weight.cumsum(1)
        choice = (draw[:, :1] * ladder[:, -1:] >= ladder).sum(1).clip(max=config.actions - 1)
        alive = self.latent != DEAD
        right = alive & (choice == self.combination[np.where(alive, self.latent, 0), self.elapsed])
        ended = self.elapsed == config.horizon - 1
        success = right & ended
        consoled = np.where(draw[:, 2] < config.consolation_rate, config.consolation, 0.0)
        reward = np.where(ended, np.where(right, 1.0, consoled), 0.0)
        switched = np.where((draw[:, 1] < config.switch) & ~ended, 1 - self.latent, self.latent)
        self.latent = np.where(right, switched, DEAD)
        self.elapsed += 1
        obs, info = self._observe(), {"success": success}
        if ended.any():
            info |= {"final_obs": obs.copy(), "_final_obs": ended.copy()}
            self._begin(np.flatnonzero(ended))
            obs = self._observe()
        return obs, reward, ended, np.zeros(self.num_envs, bool), info

    def get_state(self) -> dict[str, Array]:
        """All a bitwise resume needs: latent states, counters, the episodes' draws, random streams."""
        from .mujoco_vec import pack_generator

        if not self._rngs:
            raise EnvError("get_state was called before reset: call reset(seed=...) first")
        return {
            "latent": self.latent.copy(),
            "elapsed": self.elapsed.copy(),
            "uniform": self._uniform.copy(),
            "background": self._background.copy(),
            "rng": np.stack([pack_generator(rng) for rng in self._rngs]),
        }

    def set_state(self, state: dict[str, Array]) -> None:
        """Restore `get_state` output.

        Raises:
            EnvError: it comes from a lock of another horizon or another number of environments.
        """
        from .mujoco_vec import unpack_generator

        found, expected = state["background"].shape, self._background.shape
        if found != expected:
            raise EnvError(f"saved locks have shape {found}, this environment needs {expected}")
        self.latent, self.elapsed = state["latent"].copy(), state["elapsed"].copy()
        self._uniform, self._background = state["uniform"].copy(), state["background"].copy()
        self._rngs = [unpack_generator(row) for row in state["rng"]]


class LockExpert:
    """Epsilon-greedy around the right action, read out of the observation.

    With probability epsilon = 1 - quality an action is U[0, 1]^n, otherwise one-hot. quality = 1 - 1/H is the data of
    the paper; 0 is useless data. Slot i draws from `seed + i` alone.
    """

    def __init__(self, config: LockConfig, num_envs: int, quality: float = 1.0, seed: int = 0) -> None:
        self.config, self.epsilon = config, 1.0 - quality
        self.combination = combination(config)
        self.rotation = hadamard(observation_dim(config.horizon))
        self._rngs = [np.random.default_rng([EXPERT_STREAM, seed + i]) for i in range(num_envs)]

    def act(self, obs: dict[str, Array]) -> Array:
        """Actions (N, n) for observations {"state": (N, D)}."""
        size = self.config.actions
        code = obs["state"] @ self.rotation
        latent = code[:, :LATENTS].argmax(1)
        step = code[:, LATENTS : LATENTS + self.config.horizon].argmax(1)
        draws = np.stack([rng.random(1 + size) for rng in self._rngs])
        right = np.eye(size)[self.combination[np.where(latent == 0, 0, 1), step]]
        return np.where(draws[:, :1] < self.epsilon, draws[:, 1:], right).astype(np.float32)


def make_expert(config: LockConfig, num_envs: int, quality: float = 1.0, seed: int = 0) -> LockExpert:
    """Scripted policy that records the offline data, see `LockExpert`."""
    return LockExpert(config, num_envs, quality, seed)


def make_lock(config: LockConfig, num_envs: int, *, render: str | None = None) -> gym.vector.VectorEnv:
    """Open a combination lock: one right choice per step, a reward only at the last."""
    return LockVectorEnv(config, num_envs, render=render)


make_lock.expert = make_expert  # type: ignore[attr-defined]
ENVS.register("lock", config=LockConfig)(make_lock)
