# SPDX-License-Identifier: Apache-2.0
"""One arm as a plain Gymnasium environment: `gym.make("robopost/ArmPush-v0", obs="state", ...)`."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from robopost.errors import ConfigError, EnvError, unknown
from robopost.registry import ENVS

from .env import ArmVectorEnv


class ArmEnv(gym.Env):
    """A vector environment of one arm without autoreset.

    Args:
        task: registered name, e.g. "arm_push".
        render_mode: None or "rgb_array".
        **options: fields of the task's config.

    Raises:
        ConfigError: an option is unknown or out of range.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, task: str, render_mode: str | None = None, **options: Any) -> None:
        config_class: Any = ENVS.get(task).config
        for key in options:
            if key not in config_class.__dataclass_fields__:
                raise unknown(f"option of {task}", key, config_class.__dataclass_fields__, ConfigError)
        options.setdefault("threads", 1)
        self.vector = ArmVectorEnv(config_class(**options), 1, render=render_mode, autoreset=False)
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "render_fps": self.vector.metadata["render_fps"]}  # type: ignore[misc]
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; the same seed starts the same one as in a vector environment."""
        super().reset(seed=seed)
        obs, info = self.vector.reset(seed=seed)
        return self._first(obs), {key: value[0] for key, value in info.items()}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step."""
        try:
            obs, reward, terminated, truncated, info = self.vector.step(np.asarray(action)[None])
        except EnvError as error:
            raise EnvError(str(error).replace(" of environment 0", "")) from error
        info = {key: value[0] for key, value in info.items()}
        info["success"] = bool(info["success"])
        return self._first(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """Frame (256, 256, 3) uint8, or None without a render mode."""
        return self.vector.render()[0] if self.render_mode else None

    def close(self) -> None:
        """Free threads and OpenGL contexts."""
        self.vector.close()

    @staticmethod
    def _first(obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in obs.items()}
