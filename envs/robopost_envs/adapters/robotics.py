# SPDX-License-Identifier: Apache-2.0
"""gymnasium-robotics: Adroit, Fetch, Shadow Hand, Franka Kitchen, Point and Ant mazes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from robopost.config import EnvConfig
from robopost.errors import require
from robopost.registry import ENVS

from .gymnasium import make_one
from .inprocess import InProcessVecEnv, info_success


@dataclass
class RoboticsConfig(EnvConfig):
    """A gymnasium-robotics id, e.g. `AdroitHandDoor-v1` or `FetchReach-v4`; `kwargs` go to `gym.make`."""

    name: str = "robotics"
    id: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    fast_render: bool = True


@ENVS.register("robotics", RoboticsConfig)
def make(config: RoboticsConfig, num_envs: int, *, render: str | None = None) -> VectorEnv:
    """gymnasium-robotics by id; goal dicts become `state` = observation, achieved_goal, desired_goal.

    `reset(options={"initial_state_dict": s})` starts Adroit tasks at recorded simulator states: one dict for
    all environments (`qpos`, `qvel`, and e.g. `door_body_pos`, float64), or a list of one per environment.
    """
    gym.register_envs(require("gymnasium_robotics", "robotics"))
    return InProcessVecEnv(
        lambda: make_one(config, render),
        num_envs,
        obs_keys=config.obs_keys,
        success=task_success,
        per_env_option="initial_state_dict",
        fast_render=config.fast_render,
    )


def task_success(info: dict[str, Any]) -> bool | None:
    """Success flag of the task; in the kitchen: every asked task is done."""
    if "tasks_to_complete" in info:
        return len(info["tasks_to_complete"]) == 0
    return info_success(info)
