# SPDX-License-Identifier: Apache-2.0
"""Configs of the tabletop arm family."""

from __future__ import annotations

from dataclasses import dataclass, field

from robopost.config import EnvConfig
from robopost.errors import ConfigError, nearest

from .instructions import INSTRUCTIONS, split_ids

CONTROLS = ("delta_ee", "position")
OBSERVATIONS = ("state", "pixels96", "pixels128", "state+pixels96", "state+pixels128")
REWARDS = ("dense", "sparse")
SPLITS = ("train", "heldout", "all")
TIMESTEP = 0.01  # s, of every scene
WORKSPACE = (0.24, 0.64, -0.30, 0.30)  # m: x from, x to, y from, y to, reachable by the fingertips


@dataclass
class ArmConfig(EnvConfig):
    """What all arm tasks share. Positions are metres on the table, x away from the base, y to its left.

    Attributes:
        control: `delta_ee` moves the commanded fingertip position, `position` commands joint angles.
        obs: `state`; `pixels96` / `pixels128`: camera image plus the arm's own state; `state+pixels...`:
            image and full state.
        reward: `dense` in [0, 1] per step, or `sparse`: 1 where the task is solved, else 0.
        control_hz: control steps per second; 100 must be a multiple of it.
        step_size: metres the commanded position moves under a full action (`delta_ee`).
        tolerance: metres within which the task counts as solved.
        object_range, goal_range: where objects and goals appear, x from, x to, y from, y to.
        terminate_on_success: end the episode when the task is solved; else it runs to `max_steps`.
        fast_render: no shadows, reflections, skybox and multisampling: about 60 times faster on a CPU.
        threads: physics threads, 0 = one per core.
    """

    control: str = "delta_ee"
    obs: str = "state"
    reward: str = "dense"
    control_hz: int = 10
    step_size: float = 0.03
    tolerance: float = 0.04
    object_range: list[float] = field(default_factory=list)
    goal_range: list[float] = field(default_factory=list)
    terminate_on_success: bool = False
    fast_render: bool = True
    threads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, allowed in (("control", CONTROLS), ("obs", OBSERVATIONS), ("reward", REWARDS)):
            check_choice(key, getattr(self, key), allowed)
        if self.control_hz < 1 or 100 % self.control_hz:
            raise ConfigError(f"env.control_hz={self.control_hz} must divide 100, e.g. 5, 10, 20 or 25")
        if not 0.0 < self.step_size <= 0.08:
            raise ConfigError(f"env.step_size={self.step_size} must lie in (0, 0.08] metres")
        if not 0.005 <= self.tolerance <= 0.1:
            raise ConfigError(f"env.tolerance={self.tolerance} must lie in [0.005, 0.1] metres")
        if self.max_steps < 1:
            raise ConfigError(f"env.max_steps={self.max_steps} must be at least 1")
        if self.threads < 0:
            raise ConfigError(f"env.threads={self.threads} must be 0 (one per core) or more")
        for key in ("object_range", "goal_range"):
            check_range(key, getattr(self, key))

    @property
    def image_size(self) -> int:
        """Side of the square camera image in pixels, 0 without one."""
        return int(self.obs.rpartition("pixels")[2]) if "pixels" in self.obs else 0


@dataclass
class ArmReachConfig(ArmConfig):
    """Move the closed fingertips to a point in space."""

    name: str = "arm_reach"
    max_steps: int = 40
    tolerance: float = 0.02
    goal_range: list[float] = field(default_factory=lambda: [0.30, 0.60, -0.25, 0.25])
    goal_height: list[float] = field(default_factory=lambda: [0.05, 0.30])  # m, from and to

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.goal_height) != 2 or not 0.02 <= self.goal_height[0] <= self.goal_height[1] <= 0.35:
            raise ConfigError(
                f"env.goal_height={self.goal_height} must be [low, high] within [0.02, 0.35] metres"
            )


@dataclass
class ArmPushConfig(ArmConfig):
    """Push a block into a goal zone with the closed gripper."""

    name: str = "arm_push"
    max_steps: int = 70
    tolerance: float = 0.03
    object_range: list[float] = field(default_factory=lambda: [0.38, 0.48, -0.12, 0.12])
    goal_range: list[float] = field(default_factory=lambda: [0.46, 0.60, -0.20, 0.20])


@dataclass
class ArmPickPlaceConfig(ArmConfig):
    """Pick a cube up and place it, released, in a goal zone."""

    name: str = "arm_pick_place"
    max_steps: int = 80
    object_range: list[float] = field(default_factory=lambda: [0.34, 0.56, -0.20, 0.20])
    goal_range: list[float] = field(default_factory=lambda: [0.34, 0.58, -0.22, 0.22])


@dataclass
class ArmLanguageConfig(ArmConfig):
    """Follow one of 18 instructions over three coloured cubes and four coloured zones.

    Attributes:
        split: `train` (14 instructions), `heldout` (4 combinations of a cube and a zone that `train` never
            shows, though it shows each cube and each zone) or `all`.
        only: of these, the instructions that contain one of these texts, e.g. `[touch, "put the red cube"]`; empty =
            all of them.
    """

    name: str = "arm_language"
    max_steps: int = 80
    split: str = "train"
    only: list[str] = field(default_factory=list)
    object_range: list[float] = field(default_factory=lambda: [0.34, 0.46, -0.20, 0.20])
    goal_range: list[float] = field(default_factory=lambda: [0.54, 0.60, -0.26, 0.26])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, SPLITS)
        offered = [INSTRUCTIONS[i] for i in split_ids(self.split)]
        for text in self.only:
            if not any(text in instruction for instruction in offered):
                raise ConfigError(
                    f"env.only names {text!r}, which no instruction of env.split={self.split} contains. "
                    f"They are: {', '.join(offered)}"
                )


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(
            f"env.{key}={value!r} must be one of {', '.join(allowed)}.{nearest(value, allowed)}"
        )


def check_range(key: str, value: list[float]) -> None:
    """Raise ConfigError unless `value` is [x from, x to, y from, y to] inside the workspace, or empty."""
    x0, x1, y0, y1 = WORKSPACE
    if value and not (
        len(value) == 4 and x0 <= value[0] <= value[1] <= x1 and y0 <= value[2] <= value[3] <= y1
    ):
        raise ConfigError(
            f"env.{key}={value} must be [x from, x to, y from, y to] within x {x0}..{x1}, y {y0}..{y1} metres"
        )
