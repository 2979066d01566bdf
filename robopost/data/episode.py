# SPDX-License-Identifier: Apache-2.0
"""`Episode`, one recorded episode in memory, and `Problem`, one finding of a check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robopost.data.batch import Spec
from robopost.errors import DataError

Arrays = dict[str, np.ndarray]
KeySpec = tuple[tuple[int, ...], str]


@dataclass
class Episode:
    """One episode of T steps, in environment units.

    Attributes:
        obs: key -> (T + 1, ...) when `has_final_obs`, else (T, ...). Row t is what the policy
            saw before action t.
        action: (T, A) float32, the executed actions.
        reward: (T,) float32.
        terminated: the task ended the episode: no bootstrap after its last step.
        truncated: a time limit or the end of the recording cut it: bootstrap from the final observation.
        success: of the task's predicate; None where there is none.
        instruction: language instruction, empty when there is none.
        extras: key -> (T, ...), further per-step arrays. `timestamp` (seconds) is checked against the frame
            rate.
        metadata: JSON-able facts about the episode (seed, operator, file it came from, ...).
        has_final_obs: False where the recording ends with the last action (most human demonstrations).
    """

    obs: Arrays
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    truncated: bool
    success: bool | None = None
    instruction: str = ""
    extras: Arrays = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    has_final_obs: bool = True

    def __len__(self) -> int:
        return int(self.action.shape[0])


@dataclass(frozen=True)
class Problem:
    """One finding of a check.

    Attributes:
        where: e.g. `"episode 3, row 17, key 'state'"`.
        what: what is wrong, with the value.
        fix: what to do about it.
        severity: `"error"` (the data can't be trained on as it is) or `"warning"`.
    """

    where: str
    what: str
    fix: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}. Fix: {self.fix}"


def conform(episode: Episode, spec: Spec, extras: dict[str, KeySpec] | None = None) -> Episode:
    """Return `episode` with exact dtypes, shapes checked against `spec`.

    Args:
        episode: arrays of any float or integer dtype.
        spec: shapes and dtypes to bring it to.
        extras: key -> (shape, dtype) of the per-step extras; None takes the episode's own.

    Raises:
        DataError: a key is missing or left over, a shape or a length is wrong.
    """
    steps = len(episode)
    if steps == 0:
        raise DataError("episode has no steps; fix: leave out episodes without an action")
    rows = steps + 1 if episode.has_final_obs else steps
    obs = _exact("observation", episode.obs, spec.obs, rows)
    action = _exact("", {"action": episode.action}, {"action": ((spec.action_dim,), "float32")}, steps)[
        "action"
    ]
    reward = _exact("", {"reward": episode.reward}, {"reward": ((), "float32")}, steps)["reward"]
    wanted = extras
    if wanted is None:
        wanted = {key: (value.shape[1:], str(value.dtype)) for key, value in episode.extras.items()}
    return Episode(
        obs=obs,
        action=action,
        reward=reward,
        terminated=bool(episode.terminated),
        truncated=bool(episode.truncated),
        success=None if episode.success is None else bool(episode.success),
        instruction=str(episode.instruction),
        extras=_exact("extra", episode.extras, wanted, steps),
        metadata=dict(episode.metadata),
        has_final_obs=bool(episode.has_final_obs),
    )


def _exact(kind: str, arrays: Arrays, wanted: dict[str, KeySpec], rows: int) -> Arrays:
    label = f"{kind} key " if kind else ""
    for key in (*wanted, *arrays):
        if key not in arrays:
            raise DataError(f"episode lacks the {label}{key!r}; it has {', '.join(arrays) or 'none'}")
        if key not in wanted:
            raise DataError(
                f"episode has the {label}{key!r}, the dataset declares {', '.join(wanted) or 'none'}"
            )
    out: Arrays = {}
    for key, (shape, dtype) in wanted.items():
        value = np.asarray(arrays[key])
        if value.shape != (rows, *shape):
            raise DataError(f"{label}{key!r} has shape {value.shape}, expected {(rows, *shape)}")
        if value.dtype != dtype and not np.can_cast(value.dtype, dtype, casting="same_kind"):
            integral = np.issubdtype(value.dtype, np.integer) and np.issubdtype(np.dtype(dtype), np.floating)
            if not integral and value.dtype != np.bool_:
                raise DataError(f"{label}{key!r} has dtype {value.dtype}, expected {dtype}")
        out[key] = np.ascontiguousarray(value, dtype=dtype)
    return out
