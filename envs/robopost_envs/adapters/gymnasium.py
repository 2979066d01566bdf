# SPDX-License-Identifier: Apache-2.0
"""Any Gymnasium id: MuJoCo v5 tasks batched on threads, everything else stepped in process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from robopost.config import EnvConfig
from robopost.errors import ConfigError, EnvError, MissingExtraError, nearest
from robopost.registry import ENVS

from .inprocess import InProcessVecEnv


@dataclass
class GymnasiumConfig(EnvConfig):
    """A Gymnasium environment by id.

    `kwargs` go to `gym.make`. `fast` lets MuJoCo v5 tasks step on threads (the same numbers, faster);
    `threads` 0 is all CPUs of the process.
    """

    name: str = "gymnasium"
    id: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    fast: bool = True
    threads: int = 0
    fast_render: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads < 0:
            raise ConfigError(f"env.threads={self.threads} must be 0 (all CPUs) or more")


@ENVS.register("gymnasium", GymnasiumConfig)
def make(config: GymnasiumConfig, num_envs: int, *, render: str | None = None) -> VectorEnv:
    """Any Gymnasium id (`env.id=Hopper-v5`); MuJoCo v5 tasks step batched on threads."""
    first = make_one(config, render)
    if config.fast:
        try:
            from ..mujoco_v5 import MujocoV5VecEnv, find_task
        except ModuleNotFoundError:  # no mujoco: then this is no MuJoCo task either
            pass
        else:
            if find_task(first) is not None:
                return MujocoV5VecEnv(
                    first,
                    num_envs,
                    threads=config.threads,
                    fast_render=config.fast_render,
                    obs_keys=config.obs_keys,
                )
    made = [first]
    return InProcessVecEnv(
        lambda: made.pop() if made else make_one(config, render),
        num_envs,
        obs_keys=config.obs_keys,
        fast_render=config.fast_render,
    )


def make_one(config: Any, render: str | None) -> gym.Env:
    """`gym.make` of a config with `id`, `kwargs` and `max_steps`, with one-line errors."""
    if not config.id:
        raise ConfigError(f"env.id is empty. Fix: env.id=Hopper-v5, or another id of {config.name}")
    kwargs = dict(config.kwargs)
    if config.max_steps:
        kwargs["max_episode_steps"] = config.max_steps
    try:
        return gym.make(config.id, render_mode=render, **kwargs)
    except gym.error.DependencyNotInstalled as error:
        raise MissingExtraError(
            f"{config.id} needs a package that is not installed: {_line(error)}"
        ) from error
    except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
        near = nearest(config.id, gym.registry)
        raise ConfigError(
            f"env.id={config.id!r} is not registered with Gymnasium.{near} ({_line(error)})"
        ) from error
    except gym.error.Error as error:
        raise ConfigError(f"env.id={config.id!r}: {_line(error)}") from error
    except TypeError as error:
        raise ConfigError(f"env.kwargs={config.kwargs} do not fit {config.id}: {_line(error)}") from error
    except Exception as error:
        raise EnvError(f"{config.id} can't be made: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
