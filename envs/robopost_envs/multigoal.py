# SPDX-License-Identifier: Apache-2.0
"""Several equally good goals: one-step episodes that show whether a policy keeps all of them or collapses to one.

The one-step form of the MultiGoal task of Haarnoja et al. 2017 (arXiv 1702.08165), on which PolicyFlow (arXiv
2602.01156) shows its modes.
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
from robopost.errors import ConfigError, EnvError
from robopost.registry import ENVS

from .batching import check_actions

Array = np.ndarray


@dataclass
class MultiGoalConfig(EnvConfig):
    """Reach one of several goals on a circle with a single action.

    Attributes:
        goals: number of goals.
        radius: of the circle around the origin they lie on.
        width: standard deviation of the reward around a goal.
    """

    name: str = "multigoal"
    goals: int = 6
    radius: float = 1.5
    width: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goals < 1:
            raise ConfigError(f"env.goals={self.goals} must be at least 1")
        for name in ("radius", "width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"env.{name}={getattr(self, name)} must be above 0 and finite")
        if self.max_steps not in (0, 1):
            raise ConfigError(f"env.max_steps={self.max_steps}: an episode of multigoal has 1 step. Fix: 0")


def goal_positions(config: MultiGoalConfig) -> Array:
    """(G, 2) goals, counterclockwise from (radius, 0)."""
    angle = 2 * math.pi * np.arange(config.goals) / config.goals
    return config.radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def distances(config: MultiGoalConfig, action: Array) -> Array:
    """Distances (N, G) of actions (N, 2) to all goals."""
    return np.linalg.norm(action[:, None].astype(np.float64) - goal_positions(config), axis=-1)


class MultiGoalVectorEnv(gym.vector.VectorEnv):
    """N copies in one process. Nothing is random: the observation is always 0, an episode one action in the plane.

    The reward is exp(-d^2 / (2 width^2)) of the distance d to the nearest goal; `info["success"]` (N,) says that
    d < width. The action has no bounds, so that policies act in the units of the noise they begin with.
    """

    def __init__(self, config: MultiGoalConfig, num_envs: int, *, render: str | None = None) -> None:
        if render is not None:
            raise ConfigError(
                f"render={render!r}: multigoal has nothing to show. Fix: track.video_episodes=0, video=0"
            )
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.config, self.num_envs, self.max_steps = config, num_envs, 1
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space: gym.spaces.Box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._started = False

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start everywhere; all seeds are alike."""
        self._started = True
        return self._observe(), {}

    def _observe(self) -> Array:
        return np.zeros((self.num_envs, 1), np.float32)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One action everywhere; every episode terminates.

        Raises:
            EnvError: called before `reset`, or an action of the wrong shape or not finite.
        """
        if not self._started:
            raise EnvError("step was called before reset: call reset(seed=...) first")
        nearest = distances(self.config, check_actions(actions, self.num_envs, 2)).min(1)
        reward = np.exp(-0.5 * np.square(nearest / self.config.width))
        ended = np.ones(self.num_envs, bool)
        info = {"success": nearest < self.config.width, "final_obs": self._observe(), "_final_obs": ended}
        return self._observe(), reward, ended, np.zeros(self.num_envs, bool), info

    def get_state(self) -> dict[str, Array]:
        """All a bitwise resume needs: nothing changes."""
        return {"copies": np.array(self.num_envs)}

    def set_state(self, state: dict[str, Array]) -> None:
        """Restore `get_state` output.

        Raises:
            EnvError: it comes from another number of environments.
        """
        if int(state["copies"]) != self.num_envs:
            raise EnvError(f"saved state is of {int(state['copies'])} copies, here are {self.num_envs}")
        self._started = True


def make_multigoal(
    config: MultiGoalConfig, num_envs: int, *, render: str | None = None
) -> gym.vector.VectorEnv:
    """Reach one of several goals on a circle with a single action."""
    return MultiGoalVectorEnv(config, num_envs, render=render)


ENVS.register("multigoal", config=MultiGoalConfig)(make_multigoal)
