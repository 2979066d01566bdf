# SPDX-License-Identifier: Apache-2.0
"""D4RL's flat HDF5 files: one long array per field, episodes cut by flags."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robopost.data.episode import Episode
from robopost.data.formats import EpisodeSource, Format
from robopost.data.formats.common import (
    Names,
    as_names,
    as_vectors,
    h5_extras,
    h5_layout,
    is_image_shape,
    make_spec,
    obs_key,
    open_h5,
    symmetric,
)
from robopost.errors import DataError
from robopost.registry import FORMATS

JUMP = 1e-6  # observations further apart than this don't follow each other


@FORMATS.register("d4rl")
class D4RL(Format):
    """D4RL-style flat HDF5: observations, actions, rewards, terminals, timeouts, next_observations, infos.

    An episode ends at `terminals` (terminated) or `timeouts` (truncated). Without `timeouts`, cuts are found
    where `next_observations` and the next row differ; without both, only at `terminals`, which may join cut
    episodes (the metadata says which it was). The final observation comes from `next_observations`; files
    without have none.
    """

    @classmethod
    def detect(cls, path: Path) -> bool:
        """True for an HDF5 file with observations and actions at its root."""
        return path.is_file() and h5_layout(path) == "d4rl"

    @classmethod
    def read(
        cls, path: Path, *, infos: Names = "", action_limit: float = 0.0, fps: float = 0.0
    ) -> EpisodeSource:
        """Open the file.

        Args:
            path: the HDF5 file.
            infos: members of `infos` to keep as per-step extras, e.g. `"qpos,qvel"`.
            action_limit: actions lie within plus and minus this (1 for D4RL's MuJoCo tasks); 0 = unbounded.
            fps: steps per second, which the format doesn't store.
        """
        kept = as_names(infos)
        with open_h5(path) as file:
            steps = _check_lengths(file, path)
            shape = tuple(file["observations"].shape[1:])
            image = is_image_shape(shape) and file["observations"].dtype == np.uint8
            action_dim = int(np.prod(file["actions"].shape[1:], dtype=int)) or 1
            terminals = np.asarray(file["terminals"][:], dtype=bool).reshape(-1)
            cuts, how = _cuts(file, steps)
            extras = h5_extras(file.get("infos"), kept)
            has_next = "next_observations" in file
        stops = np.flatnonzero(terminals | cuts) + 1
        key = "image" if image else "state"

        def episodes() -> Iterator[Episode]:
            with open_h5(path) as file:
                start = 0
                for stop in map(int, stops):
                    rows = slice(start, stop)
                    obs = file["observations"][rows]
                    if has_next:
                        obs = np.concatenate([obs, file["next_observations"][stop - 1 : stop]])
                    yield Episode(
                        obs={key: obs if image else as_vectors(obs)},
                        action=as_vectors(file["actions"][rows]).reshape(stop - start, -1),
                        reward=as_vectors(file["rewards"][rows])[:, 0],
                        terminated=bool(terminals[stop - 1]),
                        truncated=not terminals[stop - 1],
                        extras={obs_key(name): as_vectors(file["infos"][name][rows]) for name in kept},
                        has_final_obs=has_next,
                    )
                    start = stop

        spec = make_spec(
            {key: (shape or (1,), "uint8" if image else "float32")}, action_dim, *symmetric(action_limit)
        )
        return EpisodeSource(
            spec,
            fps,
            f"d4rl {path.name}",
            episodes(),
            count=len(stops),
            extras=extras,
            options={"infos": kept, "action_limit": action_limit},
            metadata={"episode_ends_from": how},
        )


def _check_lengths(file: Any, path: Path) -> int:
    for name in ("observations", "actions", "rewards", "terminals"):
        if name not in file:
            raise DataError(
                f"{path} lacks {name!r}, which a flat D4RL file has. Fix: name another data.format"
            )
    steps = len(file["actions"])
    if steps == 0:
        raise DataError(f"{path} has no steps")
    for name in ("observations", "rewards", "terminals", "timeouts", "next_observations"):
        if name in file and len(file[name]) != steps:
            raise DataError(
                f"{path}: {name} has {len(file[name])} rows and actions {steps}. Fix: copy it again"
            )
    return steps


def _cuts(file: Any, steps: int) -> tuple[np.ndarray, str]:
    """Rows after which an episode was cut, and where that is known from. The last row always is one."""
    if "timeouts" in file:
        cuts, how = np.array(file["timeouts"][:], dtype=bool).reshape(-1), "terminals and timeouts"
    elif "next_observations" in file:
        difference = np.abs(file["next_observations"][:-1].astype(np.float64) - file["observations"][1:])
        cuts = np.append(np.any(difference.reshape(steps - 1, -1) > JUMP, axis=1), True)
        how = "terminals and jumps between next_observations and observations"
    else:
        cuts, how = np.zeros(steps, bool), "terminals only: cut episodes may be joined"
    cuts[-1] = True
    return cuts, how
