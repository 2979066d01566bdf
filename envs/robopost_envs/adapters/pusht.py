# SPDX-License-Identifier: Apache-2.0
"""Push-T (gym-pusht): observations of the human demonstration set, exact reset states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import VectorEnv

from robopost.config import EnvConfig
from robopost.errors import EnvError, require, unknown
from robopost.registry import ENVS

from .inprocess import InProcessVecEnv
from .observations import PlainDict

ID = "gym_pusht/PushT-v0"
SIZE = 512.0  # pixels, the coordinate system of everything here
INITIAL = ("gym_pusht", "diffusion_policy")
# Keypoints in the block's frame, pixels. Medians over the 25,650 steps of the human set after taking the
# block's pose off; the spread is below 0.03 pixels.
BLOCK_KEYPOINTS = np.array(
    [
        [9.2698, 90.0410],
        [-60.9835, -1.1867],
        [60.9128, -1.3934],
        [-0.2705, 25.5436],
        [-14.0649, 122.8159],
        [39.0027, 32.8574],
        [-39.9664, 32.7297],
        [-16.8243, 62.8632],
        [23.5415, -1.7003],
    ]
)


@dataclass
class PushTConfig(EnvConfig):
    """Push-T of gym-pusht.

    `initial` chooses how a seed becomes an initial state: `gym_pusht` draws as that package does and places
    the block exactly where drawn; `diffusion_policy` draws and places as the published evaluation of
    Diffusion Policy does (block position before its angle, then one physics step), so that equal seeds are
    equal episodes.
    """

    name: str = "pusht"
    images: bool = False  # also observe `image`, (96, 96, 3) uint8
    initial: str = "gym_pusht"
    render_size: int = 256
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial not in INITIAL:
            raise unknown("env.initial", self.initial, INITIAL)


@ENVS.register("pusht", PushTConfig)
def make(config: PushTConfig, num_envs: int, *, render: str | None = None) -> VectorEnv:
    """Push-T: `state` (5,), `keypoint` (20,), `image` on request; success is the task's strict line."""
    gym_pusht = require("gym_pusht", "pusht")
    gym.register_envs(gym_pusht)
    kwargs: dict[str, Any] = {
        "visualization_width": config.render_size,
        "visualization_height": config.render_size,
    }
    kwargs |= config.kwargs
    if config.max_steps:
        kwargs["max_episode_steps"] = config.max_steps
    kwargs["obs_type"] = "pixels_agent_pos" if config.images else "state"
    kwargs["render_mode"] = "rgb_array" if config.images else render
    # The package's observation space ends at 512 while bodies can be pushed slightly past it.
    kwargs["disable_env_checker"] = True
    return InProcessVecEnv(
        lambda: PushTWrapper(gym.make(ID, **kwargs), initial=config.initial),
        num_envs,
        obs_keys=config.obs_keys,
        info_keys=("coverage",),
        per_env_option="state",
        observe=PlainDict,
    )


class PushTWrapper(gym.Wrapper):
    """Observations and reset states of one gym-pusht environment.

    `reset(options={"state": s})` starts exactly at s = [agent x, agent y, block x, block y, block angle]
    (pixels, radians). gym-pusht's own `reset_to_state` sets the block's position before its angle, which
    then turns it about its centre of gravity and away from the asked position.
    """

    def __init__(self, env: gym.Env, *, initial: str = "gym_pusht") -> None:
        super().__init__(env)
        self._base: Any = env.unwrapped
        self._initial = initial
        self.metadata = {
            **env.metadata,
            "control_hz": float(self._base.control_hz),
            "motion": {"state": (0, 2), "keypoint": (2 * len(BLOCK_KEYPOINTS), 2 * len(BLOCK_KEYPOINTS) + 2)},
        }
        high = np.array([SIZE, SIZE, SIZE, SIZE, 2 * np.pi], dtype=np.float32)
        spaces: dict[str, gym.Space] = {
            "state": gym.spaces.Box(np.zeros(5, np.float32), high, dtype=np.float32),
            # Keypoints lie up to 123 pixels from the block's origin and may stick out of the arena.
            "keypoint": gym.spaces.Box(-SIZE, 2 * SIZE, (2 * len(BLOCK_KEYPOINTS) + 2,), np.float32),
        }
        if isinstance(env.observation_space, gym.spaces.Dict):
            spaces["image"] = env.observation_space["pixels"]
        self.observation_space = gym.spaces.Dict(spaces)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode at a drawn state, or exactly at `options["state"]`."""
        asked = (options or {}).get("state")
        if seed is not None:
            self._base.np_random, self._base._np_random_seed = seeding.np_random(seed)
        if asked is not None:
            state, legacy = _check_state(asked), False
        elif self._initial == "diffusion_policy":
            state, legacy = _draw_legacy(seed, self._base.np_random), True
        else:
            state, legacy = _draw(self._base.np_random), False
        raw, info = self.env.reset(options={"reset_to_state": state})
        if not legacy:
            self._place(state)
            raw = self._base.get_obs()
        return self._observe(raw), info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step, 10 Hz; `action` is the agent's target position in pixels."""
        raw, reward, terminated, truncated, info = self.env.step(np.asarray(action, dtype=np.float64))
        return self._observe(raw), float(reward), bool(terminated), truncated, info

    def _place(self, state: np.ndarray) -> None:
        base = self._base
        base._setup()  # a fresh space: no velocities and no contacts left from the package's own placement
        base.agent.position = state[:2].tolist()
        base.block.angle = float(state[4])
        base.block.position = state[2:4].tolist()
        for body in (base.agent, base.block):
            base.space.reindex_shapes_for_body(body)

    def _observe(self, raw: Any) -> dict[str, np.ndarray]:
        agent, block = np.array(self._base.agent.position), self._base.block
        position, angle = np.array(block.position), block.angle % (2 * np.pi)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        keypoints = BLOCK_KEYPOINTS @ turn + position
        out = {
            "state": np.concatenate([agent, position, [angle]]),
            "keypoint": np.concatenate([keypoints.ravel(), agent]),
        }
        if isinstance(raw, dict):
            out["image"] = raw["pixels"]
        return out


def _check_state(state: Any) -> np.ndarray:
    array = np.asarray(state, dtype=np.float64)
    if array.shape != (5,) or not np.isfinite(array).all():
        raise EnvError(
            f"options['state'] must be 5 finite numbers (agent xy, block xy, angle), got {state!r}"
        )
    return array


def _draw(rng: np.random.Generator) -> np.ndarray:
    """The draws of gym-pusht's own reset, in its order."""
    corner = [rng.integers(50, 450), rng.integers(50, 450), rng.integers(100, 400), rng.integers(100, 400)]
    return np.array([*corner, rng.uniform(-np.pi, np.pi)], dtype=np.float64)


def _draw_legacy(seed: int | None, rng: np.random.Generator) -> np.ndarray:
    """The draws of Diffusion Policy's evaluation; without a seed, one is drawn."""
    source = np.random.RandomState(int(rng.integers(2**31)) if seed is None else seed)
    corner = [
        source.randint(50, 450),
        source.randint(50, 450),
        source.randint(100, 400),
        source.randint(100, 400),
    ]
    return np.array([*corner, source.randn() * 2 * np.pi - np.pi], dtype=np.float64)
