# SPDX-License-Identifier: Apache-2.0
"""What every vector environment here checks the same way: seeds and actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from robopost.errors import EnvError


def per_env_seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """One seed per environment from Gymnasium's three forms: None, a base seed, a sequence.

    Raises:
        EnvError: the sequence has another length.
    """
    if seed is None:
        return [None] * num_envs
    seeds = [int(seed) + i for i in range(num_envs)] if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != num_envs:
        raise EnvError(f"reset got {len(seeds)} seeds for {num_envs} environments: give one per environment")
    return [None if value is None else int(value) for value in seeds]


def check_actions(actions: Any, num_envs: int, size: int) -> np.ndarray:
    """Actions as a floating-point array (N, A); precision is kept.

    Raises:
        EnvError: the shape is wrong, or a number is NaN or infinite; names environment and dimension.
    """
    actions = np.asarray(actions)
    if actions.shape != (num_envs, size):
        raise EnvError(
            f"action has shape {actions.shape}, expected {(num_envs, size)}: one row per environment"
        )
    if actions.dtype.kind != "f":
        actions = actions.astype(np.float32)
    # A finite sum is far cheaper than isfinite().all(); details are looked up only when it is not.
    if not math.isfinite(actions.sum()):
        bad = np.argwhere(~np.isfinite(actions))
        if len(bad):
            i, j = bad[0]
            raise EnvError(f"action of environment {i}, dimension {j} is {actions[i, j]}. Check the policy")
    return actions


def check_choices(actions: Any, num_envs: int, space: gym.spaces.Discrete) -> np.ndarray:
    """Discrete actions as integers (N,).

    Raises:
        EnvError: the shape is wrong, or an action is none of the space's.
    """
    actions = np.asarray(actions)
    if actions.shape != (num_envs,) or actions.dtype.kind not in "iu":
        raise EnvError(
            f"action has shape {actions.shape} and type {actions.dtype}, expected {num_envs} integers: "
            "one per environment"
        )
    bad = np.flatnonzero((actions < space.start) | (actions >= space.start + space.n))
    if len(bad):
        raise EnvError(f"action of environment {bad[0]} is {actions[bad[0]]}, which is not in {space}")
    return actions
