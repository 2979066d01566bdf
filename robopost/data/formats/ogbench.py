# SPDX-License-Identifier: Apache-2.0
"""OGBench's npz files: long arrays whose trajectories keep the state after their last action."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from robopost.data.episode import Arrays, Episode
from robopost.data.formats import EpisodeSource, Format
from robopost.data.formats.common import (
    Names,
    as_names,
    as_vectors,
    choose,
    is_image_shape,
    make_spec,
    obs_key,
    symmetric,
)
from robopost.errors import DataError
from robopost.registry import FORMATS

REQUIRED = ("observations", "actions", "terminals")
FLAT = ("observations", "actions", "rewards", "terminals", "masks", "valids", "next_observations")


@FORMATS.register("ogbench")
class OGBench(Format):
    """OGBench npz: observations, actions, terminals; rewards, masks, qpos, qvel where the file has them.

    Three layouts are told apart by their keys. As published, a trajectory of T steps has T + 1 rows, and
    `terminals` marks the last one, whose action leads nowhere. With `valids` (the package's compact form) rows
    with 0 are those last ones. With `next_observations` every row is a step and `terminals` marks the last.
    `terminals` ends a trajectory, it doesn't say that the task was over: episodes are truncated, unless `masks`
    is 0, which cuts the bootstrap and ends an episode wherever it stands.
    """

    @classmethod
    def detect(cls, path: Path) -> bool:
        """True for an npz with observations, actions and terminals."""
        if path.suffix != ".npz" or not path.is_file():
            return False
        try:
            with zipfile.ZipFile(path) as file:
                names = set(file.namelist())
        except (OSError, zipfile.BadZipFile):
            return False
        return {f"{name}.npy" for name in REQUIRED} <= names

    @classmethod
    def read(
        cls, path: Path, *, infos: Names = "", action_limit: float = 1.0, fps: float = 0.0
    ) -> EpisodeSource:
        """Open the file.

        Args:
            path: the npz.
            infos: further arrays to keep as per-step extras, e.g. `"qpos,qvel"`.
            action_limit: actions lie within plus and minus this; 0 = unbounded.
            fps: steps per second, which the file doesn't store.
        """
        arrays = _load(path)
        kept = (
            choose("array", infos, [name for name in arrays if name not in FLAT]) if as_names(infos) else []
        )
        starts, stops, terminated = _bounds(arrays, path)
        obs, shifted = arrays["observations"], "next_observations" in arrays
        shape = tuple(obs.shape[1:])
        image = is_image_shape(shape) and obs.dtype == np.uint8
        key = "image" if image else "state"
        rewards = arrays.get("rewards")

        def episodes() -> Iterator[Episode]:
            for start, stop, over in zip(starts, stops, terminated, strict=True):
                last = arrays["next_observations"][stop - 1] if shifted else obs[stop]
                value = np.concatenate([obs[start:stop], last[None]])
                steps = slice(start, stop)
                yield Episode(
                    obs={key: value if image else as_vectors(value)},
                    action=as_vectors(arrays["actions"][steps]).reshape(stop - start, -1),
                    reward=np.zeros(stop - start, np.float32)
                    if rewards is None
                    else rewards[steps].astype(np.float32).reshape(-1),
                    terminated=bool(over),
                    truncated=not over,
                    extras={obs_key(name): as_vectors(arrays[name][steps]) for name in kept},
                )

        action_dim = int(np.prod(arrays["actions"].shape[1:], dtype=int)) or 1
        return EpisodeSource(
            make_spec(
                {key: (shape or (1,), "uint8" if image else "float32")}, action_dim, *symmetric(action_limit)
            ),
            fps,
            f"ogbench {path.name}",
            episodes(),
            count=len(stops),
            extras={obs_key(name): (tuple(arrays[name].shape[1:]) or (1,), "float32") for name in kept},
            options={"infos": kept, "action_limit": action_limit},
            metadata={"rewards": "recorded" if rewards is not None else "none in the file, zeros"},
        )


def _load(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} does not open as npz ({error}). Fix: copy it again") from error
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}. Fix: name another format with data.format")
    rows = len(arrays["actions"])
    if rows == 0:
        raise DataError(f"{path} has no steps")
    for name, value in arrays.items():
        if len(value) != rows:
            raise DataError(f"{path}: {name} has {len(value)} rows and actions {rows}. Fix: copy it again")
    return arrays


def _bounds(arrays: Arrays, path: Path) -> tuple[list[int], list[int], list[bool]]:
    """First step, one past the last step, and whether the task was over, of every episode."""
    rows = len(arrays["actions"])
    over = arrays["masks"].reshape(-1) == 0 if "masks" in arrays else np.zeros(rows, bool)
    ends = arrays["terminals"].reshape(-1) > 0
    if "next_observations" in arrays:
        step, last = np.ones(rows, bool), ends
    else:
        # Rows that hold the state after a trajectory's last action are no steps.
        step = arrays["valids"].reshape(-1) > 0 if "valids" in arrays else ~ends
        if step[-1]:
            raise DataError(
                f"{path}: the last row is a step without the state that follows it; terminals must mark the last "
                "row of each trajectory. Fix: copy it again, or name another format with data.format"
            )
        last = np.append(~step[1:], True)
    stops = np.flatnonzero(step & (last | over)) + 1
    if "next_observations" in arrays and (not len(stops) or stops[-1] != rows):
        stops = np.append(stops, rows)  # a file that just stops
    starts, begin = [], 0
    for stop in stops:
        while not step[begin]:
            begin += 1
        starts.append(int(begin))
        begin = int(stop)
    return starts, [int(stop) for stop in stops], [bool(over[stop - 1]) for stop in stops]
