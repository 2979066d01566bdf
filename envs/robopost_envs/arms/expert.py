# SPDX-License-Identifier: Apache-2.0
"""Scripted experts of adjustable quality: reactive rules on the state observation, for a batch of arms.

At quality 1 every task is solved; below, the script errs the way hurried people do. It misjudges where things
are (a lasting bias plus one drawn per episode), lets go early, stops short and moves unsteadily. Noise is
drawn from one stream per environment, `seed + i`, so episodes don't depend on how many are recorded side by
side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robopost.errors import ConfigError

from .config import WORKSPACE, ArmConfig
from .instructions import KIND, LIFT, OBJECT, PUT, TOUCH, ZONE, decode
from .kinematics import HOME, JOINT_SPAN, inverse
from .tasks import CENTRE, SCALE, TASKS, flat

Array = np.ndarray
CRUISE = 0.10  # m, fingertip height for carrying and for passing over cubes
PUSH_CRUISE = 0.075  # m, for passing over the block
STANDOFF = 0.065  # m, fingertips to block centre before a push
GRASP_HEIGHT = 0.02  # m
PAUSE = 4.0  # steps, mean length of a hesitation at quality 0
STREAM = 3  # keeps the script's random numbers apart from those of other users of the same seed


@dataclass
class Seen:
    """What the script reads out of an observation, in metres (N rows)."""

    ee: Array
    commanded: Array
    opening: Array
    cube: Array
    zone: Array
    kind: Array


class ScriptedExpert:
    """A policy by rules.

    Args:
        config: the environment's config.
        num_envs: N.
        quality: 1 solves every task nearly always; 0.5 about half of the episodes; 0 seldom.
        seed: environment i uses the random stream of `seed + i`.

    Raises:
        ConfigError: `quality` is outside [0, 1], or observations lack the full state.
    """

    def __init__(self, config: ArmConfig, num_envs: int, quality: float = 1.0, seed: int = 0) -> None:
        if not 0.0 <= quality <= 1.0:
            raise ConfigError(f"quality={quality} must lie in [0, 1]")
        keys = config.obs_keys
        if not config.obs.startswith("state") or (keys and "state" not in keys):
            raise ConfigError(
                f"the scripted expert needs the full state: obs={config.obs} obs_keys={keys} lack it. "
                "Fix: env.obs=state, or state+pixels96 and let the policy choose its obs_keys"
            )
        self.config, self.num_envs = config, num_envs
        self.error = 1.0 - quality
        self.task = TASKS[config.name]
        self._rngs = [np.random.default_rng([STREAM, seed + i]) for i in range(num_envs)]
        self._layout: Array | None = None
        self._bias = np.zeros((num_envs, 4))  # per-episode misjudgement of cube xy and zone xy, m
        self._pace = np.ones(num_envs)
        self._noise = np.zeros((num_envs, 3))
        self._pause = np.zeros(num_envs)

    def act(self, obs: dict[str, Array]) -> Array:
        """Actions (N, A) for observations of the environment (N, ...)."""
        seen = self._read(obs)
        draws = self._episodes(obs, seen)
        error = self.error
        # The zone looks a little nearer and to the left: an error that repeats, as from a tilted camera.
        seen.cube[:, :2] += error * self._bias[:, :2]
        seen.zone[:, :2] += error * (self._bias[:, 2:] + np.array([-0.038, 0.026]))
        rules = {"arm_reach": self._reach, "arm_push": self._push}.get(self.config.name, self._handle)
        goal, opening, speed = rules(seen)
        # Unsteady hands: first-order noise on the velocity, and pauses.
        self._noise += -0.3 * self._noise + 0.28 * error * draws[:, :3]
        start = (draws[:, 3] > 1.9) & (self._pause <= 0)
        self._pause = np.where(start, error * PAUSE * np.abs(draws[:, 4]), self._pause - 1)
        step = (goal - seen.commanded) / self.config.step_size
        limit = (self._pace * speed)[:, None]
        length = np.linalg.norm(step, axis=1, keepdims=True)
        step = step * np.minimum(1.0, limit / np.maximum(length, 1e-9))
        step = np.where(self._pause[:, None] > 0, 0.0, step) + self._noise * np.array([1.0, 1.0, 0.5])
        return self._action(seen, step, opening)

    def _read(self, obs: dict[str, Array]) -> Seen:
        state = np.asarray(obs["state"], np.float64)
        n, gripper = len(state), self.task.gripper
        delta = self.config.control == "delta_ee"
        ee = state[:, 0:3] / SCALE + CENTRE
        offset = state[:, 3:6] / SCALE if delta else np.zeros((n, 3))
        if not delta:
            joints = state[:, 6:12] + state[:, 12:18]
            self._joints = joints
        arm = 9 if delta else 18
        opening = state[:, arm] if gripper else np.zeros(n)
        rest = state[:, arm + gripper :]
        kind = np.full(n, PUT)
        rows = np.arange(n)
        if self.config.name == "arm_language":
            number = decode(np.asarray(obs["instruction"]))
            if (number < 0).any():
                raise ConfigError("the scripted expert got an instruction that arm_language doesn't know")
            cubes, zones = rest[:, :9].reshape(n, 3, 3), rest[:, 24:32].reshape(n, 4, 2)
            cube, zone, kind = cubes[rows, OBJECT[number]], zones[rows, ZONE[number]], KIND[number]
            layout = np.concatenate([zones.reshape(n, -1), number[:, None]], axis=1)
        elif self.config.name == "arm_reach":
            cube = zone = layout = rest[:, :3]
        else:
            cube, zone = rest[:, :3], rest[:, 9:11]
            layout = zone
        self._seen_layout = layout
        zone3 = np.zeros((n, 3))
        zone3[:, : zone.shape[1]] = zone
        return Seen(ee, ee + offset, opening, cube / SCALE + CENTRE, zone3 / SCALE + CENTRE, kind)

    def _episodes(self, obs: dict[str, Array], seen: Seen) -> Array:
        """Draw (N, 5) normals; where goals have moved a new episode began: draw its habits too."""
        layout = self._seen_layout
        new = np.ones(self.num_envs, bool)
        if self._layout is not None:
            new = np.abs(layout - self._layout).max(axis=1) > 1e-4
        self._layout = layout.copy()
        for i in np.flatnonzero(new):
            habits = self._rngs[i].normal(size=5)
            scale = 0.03 if self.task.gripper else 0.018
            self._bias[i] = [*(habits[:2] * scale), *(habits[2:4] * 0.03)]
            self._pace[i] = np.clip(1.0 - self.error * 0.25 * abs(habits[4]), 0.4, 1.0)
            self._noise[i], self._pause[i] = 0.0, 0.0
        return np.stack([generator.normal(size=5) for generator in self._rngs])

    def _reach(self, seen: Seen) -> tuple[Array, Array, Array]:
        return seen.zone, np.zeros(len(seen.ee)), np.full(len(seen.ee), 1.0)

    def _push(self, seen: Seen) -> tuple[Array, Array, Array]:
        """Pass over the block, come down behind it, push towards the zone; start over when it slips away."""
        block, zone, ee = seen.cube, seen.zone, seen.ee
        gap = flat(block, zone)
        ahead = (zone - block)[:, :2] / np.maximum(gap, 1e-6)[:, None]
        aside = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)
        offset = (ee - block)[:, :2]
        along, lateral = (offset * ahead).sum(axis=1), (offset * aside).sum(axis=1)
        behind = block[:, :2] - STANDOFF * ahead
        over = np.hypot(*(ee[:, :2] - behind).T) < 0.022
        low = ee[:, 2] < 0.042
        lined_up = (along < -0.025) & (np.abs(lateral) < 0.03)
        n = len(ee)

        goal = np.concatenate([behind, np.full((n, 1), PUSH_CRUISE)], axis=1)  # travel
        goal[over, 2] = 0.018  # come down
        # Push: a point ahead of the fingertips on the line to the zone, shifted against its slip.
        reach = np.minimum(gap, 0.05)
        push = ee[:, :2] + ahead * reach[:, None] - aside * (1.2 * lateral)[:, None]
        pushing = low & lined_up
        goal[pushing, :2], goal[pushing, 2] = push[pushing], 0.018
        lost = low & ~lined_up & ~over  # back off and up
        goal[lost, :2] = (
            ee[lost, :2] + 0.03 * offset[lost] / np.maximum(np.hypot(*offset[lost].T), 1e-6)[:, None]
        )
        arrived = gap < 0.006 + 0.012 * self.error
        goal[arrived] = seen.commanded[arrived]
        speed = np.where(pushing, 0.55, 0.9)
        return goal, np.zeros(n), speed

    def _handle(self, seen: Seen) -> tuple[Array, Array, Array]:
        """Touch, lift or carry a cube: above it, down, close, up, across, down, open."""
        cube, zone, ee, kind = seen.cube, seen.zone, seen.ee, seen.kind
        n, error = len(ee), self.error
        distance, gap = flat(ee, cube), flat(cube, zone)
        placed = (kind == PUT) & (gap < 0.02) & (cube[:, 2] < 0.03)
        held = (np.linalg.norm(ee - cube, axis=1) < 0.03) & (seen.opening < 0.56)
        goal = np.concatenate([cube[:, :2], np.full((n, 1), CRUISE)], axis=1)  # travel
        opening = np.ones(n)
        speed = np.full(n, 1.0)

        near = distance < 0.012 + 0.01 * error
        goal[near, 2] = GRASP_HEIGHT
        speed[near] = 0.8
        grasp = near & (ee[:, 2] < GRASP_HEIGHT + 0.01) & (kind != TOUCH)
        opening[grasp] = 0.0

        up = held & (kind != TOUCH)
        opening[up] = 0.0
        goal[up] = np.concatenate([seen.commanded[up, :2], np.full((int(up.sum()), 1), CRUISE)], axis=1)
        goal[up & (kind == LIFT), 2] = 0.14
        carry = up & (kind == PUT) & (ee[:, 2] > CRUISE - 0.03)
        goal[carry, :2] = zone[carry, :2]
        lower = up & (kind == PUT) & (flat(ee, zone) < 0.012)
        goal[lower, :2], goal[lower, 2], speed[lower] = zone[lower, :2], GRASP_HEIGHT, 0.7
        # A hurried hand opens above the table and before it is over the middle of the zone.
        drop = up & (kind == PUT) & (flat(ee, zone) < 0.012 + 0.05 * error)
        drop &= ee[:, 2] < GRASP_HEIGHT + 0.008 + 0.08 * error
        opening[drop | placed] = 1.0
        goal[placed] = np.concatenate(
            [seen.commanded[placed, :2], np.full((int(placed.sum()), 1), CRUISE)], axis=1
        )
        return goal, opening, speed

    def _action(self, seen: Seen, step: Array, opening: Array) -> Array:
        if self.config.control == "delta_ee":
            move = step
        else:
            tip = seen.ee + np.clip(step * self.config.step_size, -0.06, 0.06)
            x0, x1, y0, y1 = WORKSPACE
            tip = np.clip(tip, [x0, y0, 0.012], [x1, y1, 0.35])
            move = (inverse(tip) - HOME) / JOINT_SPAN
        parts = [move, (2 * opening - 1)[:, None]] if self.task.gripper else [move]
        return np.clip(np.concatenate(parts, axis=1), -1.0, 1.0).astype(np.float32)
