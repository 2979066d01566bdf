# SPDX-License-Identifier: Apache-2.0
"""Our own tabletop arm: reach, push, pick and place, and language-conditioned tasks.

Importing this registers names; MuJoCo is imported when an environment is made.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from robopost.registry import ENVS

from .config import ArmConfig, ArmLanguageConfig, ArmPickPlaceConfig, ArmPushConfig, ArmReachConfig

__all__ = [
    "ArmConfig",
    "ArmLanguageConfig",
    "ArmPickPlaceConfig",
    "ArmPushConfig",
    "ArmReachConfig",
    "make_expert",
]


def make_expert(config: ArmConfig, num_envs: int, quality: float = 1.0, seed: int = 0) -> Any:
    """Scripted policy of a task, see `robopost_envs.arms.expert.ScriptedExpert`."""
    from .expert import ScriptedExpert

    return ScriptedExpert(config, num_envs, quality, seed)


def _register(config_class: type[ArmConfig]) -> None:
    def make(config: ArmConfig, num_envs: int, *, render: str | None = None) -> gym.vector.VectorEnv:
        from .env import ArmVectorEnv

        return ArmVectorEnv(config, num_envs, render=render)

    config = config_class()
    make.__doc__ = (config_class.__doc__ or "").strip()
    make.__qualname__ = f"make_{config.name}"
    make.expert = make_expert  # type: ignore[attr-defined]
    ENVS.register(config.name, config=config_class)(make)
    words = config.name.split("_")
    gym.register(
        f"robopost/{''.join(word.capitalize() for word in words)}-v0",
        entry_point="robopost_envs.arms.single:ArmEnv",
        kwargs={"task": config.name},
    )


for _class in (ArmReachConfig, ArmPushConfig, ArmPickPlaceConfig, ArmLanguageConfig):
    _register(_class)
