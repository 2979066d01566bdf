# SPDX-License-Identifier: Apache-2.0
"""Human demonstrations of the Adroit hand (hand_dapg), as one flat npz per task."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from robopost.data.episode import Episode
from robopost.data.formats import EpisodeSource, Format
from robopost.data.formats.common import make_spec, symmetric
from robopost.errors import DataError
from robopost.registry import FORMATS

REQUIRED = ("observations", "actions", "rewards", "episode_ends")


@FORMATS.register("adroit")
class Adroit(Format):
    """Flat npz of human Adroit demonstrations: observations, actions, rewards, episode_ends, init_*.

    The environments clip actions to +-1 before they act; some recorded ones go to 1.4. Stored actions are the
    executed ones, so they are clipped here (the share is in the metadata). The recordings end with an action,
    so there is no final observation, and every episode counts as cut by the end of the recording.
    `init_<name>` (the simulator state to replay an episode from) goes into `Episode.metadata`.
    """

    @classmethod
    def detect(cls, path: Path) -> bool:
        """True for an npz that holds the four flat arrays."""
        if path.suffix != ".npz" or not path.is_file():
            return False
        try:
            with zipfile.ZipFile(path) as file:
                names = set(file.namelist())
        except (OSError, zipfile.BadZipFile):
            return False
        return {f"{name}.npy" for name in REQUIRED} <= names

    @classmethod
    def read(cls, path: Path, *, fps: float = 100.0, action_limit: float = 1.0) -> EpisodeSource:
        """Open the file.

        Args:
            path: the npz.
            fps: control rate; 100 Hz in the Adroit tasks (5 simulation steps of 2 ms).
            action_limit: actions are clipped to plus and minus this, as in the environment; 0 = as recorded.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} does not open as npz ({error}). Fix: copy it again") from error
        missing = [name for name in REQUIRED if name not in arrays]
        if missing:
            raise DataError(f"{path} lacks {', '.join(missing)}. Fix: name another format with data.format")
        ends = arrays["episode_ends"].astype(np.int64)
        steps = len(arrays["actions"])
        if ends.size == 0 or ends[-1] != steps or np.any(np.diff(ends, prepend=0) <= 0):
            raise DataError(
                f"{path}: episode_ends must rise to {steps}, the number of actions; they are {ends}"
            )
        for name in ("observations", "rewards"):
            if len(arrays[name]) != steps:
                raise DataError(f"{path}: {name} has {len(arrays[name])} rows and actions {steps}")

        low, high = symmetric(action_limit)
        clipped = float(np.mean(np.any((arrays["actions"] < low) | (arrays["actions"] > high), axis=1)))
        initial = {name: value for name, value in arrays.items() if name.startswith("init_")}

        def episodes() -> Iterator[Episode]:
            start = 0
            for index, end in enumerate(map(int, ends)):
                yield Episode(
                    obs={"state": arrays["observations"][start:end].astype(np.float32)},
                    action=np.clip(arrays["actions"][start:end], low, high).astype(np.float32),
                    reward=arrays["rewards"][start:end].astype(np.float32),
                    terminated=False,
                    truncated=True,
                    metadata={name: value[index].tolist() for name, value in initial.items()},
                    has_final_obs=False,
                )
                start = end

        obs = {"state": (tuple(arrays["observations"].shape[1:]), "float32")}
        spec = make_spec(obs, arrays["actions"].shape[1], low, high)
        return EpisodeSource(
            spec,
            fps,
            f"adroit {path.name}",
            episodes(),
            count=len(ends),
            options={"action_limit": action_limit},
            metadata={"steps_with_clipped_actions": clipped},
        )
