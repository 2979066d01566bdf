# SPDX-License-Identifier: Apache-2.0
"""The four tasks: where things start, what is observed, when it is solved, what the dense reward is.

Everything works on whole batches. Lengths in the state vector are in decimetres (so that typical values are
near 1) and positions are relative to the table point `CENTRE`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .instructions import KIND, OBJECT, PUT, TOUCH, ZONE, split_ids

Array = np.ndarray
CENTRE = np.array([0.45, 0.0, 0.0])  # m
SCALE = 10.0  # state units per metre
CLEARANCE = 0.13  # m, least distance between an object and its goal at the start
TRIES = 8  # candidate layouts drawn per episode
RELEASED = 0.62  # gripper opening (0 closed, 1 open) above which a cube is not held


@dataclass
class Scene:
    """What tasks look at, for a batch of environments: N rows, K objects, G goals, SI units.

    Attributes:
        ee: (N, 3) fingertip position.
        opening: (N,) gripper opening, 0 closed to 1 open.
        position, velocity: (N, K, 3) of the objects.
        yaw, spin: (N, K) angle and angular velocity about the vertical.
        goal: (N, G, 3) goal positions.
        lifted: (N,) bool, the object has been in the air in this episode.
        command: (N,) instruction number.
    """

    ee: Array
    opening: Array
    position: Array
    velocity: Array
    yaw: Array
    spin: Array
    goal: Array
    lifted: Array
    command: Array


def place(position: Array) -> Array:
    """Position in state units."""
    return (position - CENTRE) * SCALE


def near(distance: Array, rate: float) -> Array:
    """1 at distance 0, falling to 0; half at about 0.55 / rate metres."""
    return 1.0 - np.tanh(rate * distance)


def flat(a: Array, b: Array) -> Array:
    """Distance on the table between (N, 3) points."""
    return np.hypot(a[:, 0] - b[:, 0], a[:, 1] - b[:, 1])


class Task(ABC):
    """One task of the family."""

    scene: ClassVar[str]
    objects: ClassVar[int] = 0
    goals: ClassVar[int] = 1
    gripper: ClassVar[bool] = False  # False: the gripper stays closed and has no action
    half_height: ClassVar[float] = 0.02  # m, of an object
    start: ClassVar[tuple[float, ...]] = (
        0.30,
        0.40,
        -0.10,
        0.10,
        0.10,
        0.16,
    )  # m, fingertip x, y, z from, to
    draws: ClassVar[int] = 8  # uniform numbers one reset uses

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def layout(self, uniform: Array) -> tuple[Array, Array, Array, Array]:
        """Initial layout from (n, draws) uniform numbers.

        Returns:
            (object positions (n, K, 3), object yaws (n, K), goals (n, G, 3), instruction numbers (n,)).
        """

    @abstractmethod
    def features(self, scene: Scene) -> list[Array]:
        """Parts (N, d) of the state vector that follow the arm's own."""

    @abstractmethod
    def success(self, scene: Scene) -> Array:
        """(N,) bool: solved at this moment."""

    @abstractmethod
    def progress(self, scene: Scene, success: Array) -> Array:
        """(N,) dense reward in [0, 1]; 1 is reached only where `success` holds."""


def spread(uniform: Array, bounds: list[float]) -> Array:
    """Map (n, 2) uniform numbers onto a rectangle on the table, (n, 3)."""
    x0, x1, y0, y1 = bounds
    low, high = np.array([x0, y0]), np.array([x1, y1])
    xy = low + uniform * (high - low)
    return np.concatenate([xy, np.zeros((len(xy), 1))], axis=1)


class _Reach(Task):
    """Fingertips to a point in space."""

    scene = "reach.xml"
    draws = 3

    def layout(self, uniform: Array) -> tuple[Array, Array, Array, Array]:
        n = len(uniform)
        goal = spread(uniform[:, :2], self.config.goal_range)
        low, high = self.config.goal_height
        goal[:, 2] = low + uniform[:, 2] * (high - low)
        return np.zeros((n, 0, 3)), np.zeros((n, 0)), goal[:, None], np.zeros(n, np.int64)

    def features(self, scene: Scene) -> list[Array]:
        goal = scene.goal[:, 0]
        return [place(goal), (goal - scene.ee) * SCALE]

    def success(self, scene: Scene) -> Array:
        return np.linalg.norm(scene.goal[:, 0] - scene.ee, axis=1) < self.config.tolerance

    def progress(self, scene: Scene, success: Array) -> Array:
        return 0.6 * near(np.linalg.norm(scene.goal[:, 0] - scene.ee, axis=1), 8.0) + 0.4 * success


class _SingleObject(Task):
    """Tasks with one object and one goal zone."""

    objects = 1
    draws = 4 * TRIES + 1
    yaw_range: ClassVar[float] = np.pi / 4  # rad, either way

    def layout(self, uniform: Array) -> tuple[Array, Array, Array, Array]:
        n = len(uniform)
        tries = uniform[:, :-1].reshape(n, TRIES, 4)
        starts = spread(tries[:, :, :2].reshape(-1, 2), self.config.object_range).reshape(n, TRIES, 3)
        goals = spread(tries[:, :, 2:].reshape(-1, 2), self.config.goal_range).reshape(n, TRIES, 3)
        distance = np.linalg.norm(starts - goals, axis=2)
        # The first candidate that is far enough apart, or the widest one.
        score = np.where(distance > CLEARANCE, 10.0 - np.arange(TRIES), distance)
        rows, best = np.arange(n), score.argmax(axis=1)
        start, goal = starts[rows, best], goals[rows, best]
        start[:, 2] = self.half_height
        yaw = (2 * uniform[:, -1:] - 1) * self.yaw_range
        return start[:, None], yaw, goal[:, None], np.zeros(n, np.int64)

    def features(self, scene: Scene) -> list[Array]:
        position, goal = scene.position[:, 0], scene.goal[:, 0]
        # Four-fold symmetric blocks: angles a quarter turn apart look the same.
        turn = 4 * scene.yaw[:, 0]
        return [
            place(position),
            np.stack([np.cos(turn), np.sin(turn)], axis=1),
            scene.velocity[:, 0] * SCALE,
            scene.spin,
            place(goal)[:, :2],
            (goal - position)[:, :2] * SCALE,
            (position - scene.ee) * SCALE,
        ]


class _Push(_SingleObject):
    """Push a block into a zone."""

    scene = "push.xml"
    start = (0.27, 0.32, -0.08, 0.08, 0.07, 0.08)

    def success(self, scene: Scene) -> Array:
        return flat(scene.position[:, 0], scene.goal[:, 0]) < self.config.tolerance

    def progress(self, scene: Scene, success: Array) -> Array:
        block, goal = scene.position[:, 0], scene.goal[:, 0]
        gap = flat(block, goal)
        # The fingertips belong behind the block, seen from the goal; once solved they may be anywhere.
        away = (block - goal) * [1.0, 1.0, 0.0]
        behind = block + away * (0.05 / np.maximum(gap, 1e-3))[:, None]
        reach = np.where(success, 1.0, near(np.linalg.norm(behind - scene.ee, axis=1), 8.0))
        return 0.2 * reach + 0.4 * near(gap, 6.0) + 0.4 * success


class _PickPlace(_SingleObject):
    """Carry a cube into a zone and let go."""

    scene = "pick_place.xml"
    gripper = True
    yaw_range = 0.3

    def features(self, scene: Scene) -> list[Array]:
        return [*super().features(scene), scene.lifted[:, None].astype(np.float64)]

    def success(self, scene: Scene) -> Array:
        return scene.lifted & resting(scene, scene.position[:, 0], scene.goal[:, 0], self.config.tolerance)

    def progress(self, scene: Scene, success: Array) -> Array:
        cube, goal = scene.position[:, 0], scene.goal[:, 0]
        reach = np.where(success, 1.0, near(np.linalg.norm(cube - scene.ee, axis=1), 8.0))
        lift = np.where(scene.lifted, 1.0, np.clip((cube[:, 2] - 0.02) / 0.04, 0.0, 1.0))
        carry = scene.lifted * near(np.linalg.norm(cube - goal - [0, 0, 0.02], axis=1), 6.0)
        return 0.15 * reach + 0.2 * lift + 0.25 * carry + 0.4 * success


def resting(scene: Scene, cube: Array, zone: Array, tolerance: float) -> Array:
    """(N,) bool: the cube (N, 3) lies in the zone (N, 3), let go."""
    return (flat(cube, zone) < tolerance) & (cube[:, 2] < 0.03) & (scene.opening > RELEASED)


class _Language(Task):
    """Do what the instruction says: touch or lift a cube, or put it in a zone."""

    scene = "language.xml"
    objects = 3
    goals = 4
    gripper = True
    draws = 3 * 4 + 4 * 3 + 1
    lift_height = 0.08  # m

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.ids = split_ids(config.split, config.only)

    def layout(self, uniform: Array) -> tuple[Array, Array, Array, Array]:
        n = len(uniform)
        cubes, zones = uniform[:, :12].reshape(n, 3, 4), uniform[:, 12:24].reshape(n, 4, 3)
        start = self._row(cubes, self.config.object_range)
        start[:, :, 2] = self.half_height
        command = self.ids[np.minimum((uniform[:, -1] * len(self.ids)).astype(int), len(self.ids) - 1)]
        return start, (2 * cubes[:, :, 3] - 1) * 0.3, self._row(zones, self.config.goal_range), command

    @staticmethod
    def _row(uniform: Array, bounds: list[float]) -> Array:
        """(n, m, 3) places in shuffled columns of a rectangle, which keeps neighbours apart."""
        n, m = uniform.shape[:2]
        column = uniform[:, :, 0].argsort(axis=1)
        x0, x1, y0, y1 = bounds
        width = (y1 - y0) / m
        # The middle 40% of a column: cubes stay graspable beside each other.
        y = y0 + (column + 0.3 + 0.4 * uniform[:, :, 2]) * width
        return np.stack([x0 + uniform[:, :, 1] * (x1 - x0), y, np.zeros((n, m))], axis=2)

    def features(self, scene: Scene) -> list[Array]:
        n = len(scene.ee)
        turn = 4 * scene.yaw
        return [
            ((scene.position - CENTRE) * SCALE).reshape(n, -1),
            np.cos(turn),
            np.sin(turn),
            ((scene.position - scene.ee[:, None]) * SCALE).reshape(n, -1),
            ((scene.goal - CENTRE)[:, :, :2] * SCALE).reshape(n, -1),
        ]

    def success(self, scene: Scene) -> Array:
        rows, command = np.arange(len(scene.ee)), scene.command
        cube, zone = scene.position[rows, OBJECT[command]], scene.goal[rows, ZONE[command]]
        touched = np.linalg.norm(cube - scene.ee, axis=1) < self.config.tolerance
        lifted = (cube[:, 2] > self.lift_height) & (np.linalg.norm(cube - scene.ee, axis=1) < 0.04)
        placed = resting(scene, cube, zone, self.config.tolerance)
        return np.choose(KIND[command], [touched, lifted, placed])

    def progress(self, scene: Scene, success: Array) -> Array:
        rows, command = np.arange(len(scene.ee)), scene.command
        cube, zone = scene.position[rows, OBJECT[command]], scene.goal[rows, ZONE[command]]
        kind = KIND[command]
        reach = near(np.linalg.norm(cube - scene.ee, axis=1), 8.0)
        height = np.clip((cube[:, 2] - 0.02) / (self.lift_height - 0.02), 0.0, 1.0)
        second = np.where(kind == PUT, near(flat(cube, zone), 6.0), height)
        shaped = np.where(kind == TOUCH, 0.6 * reach, 0.25 * reach + 0.35 * second)
        return np.where(success, 1.0, shaped)


TASKS: dict[str, type[Task]] = {
    "arm_reach": _Reach,
    "arm_push": _Push,
    "arm_pick_place": _PickPlace,
    "arm_language": _Language,
}
