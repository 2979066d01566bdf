# SPDX-License-Identifier: Apache-2.0
"""A contiguous, memory-mapped copy of a store, built once: random reads without zarr's decoding.

The cache of `demos.zarr` is the folder `demos.zarr.cache/<dataset id>` beside it, or under `$ROBOPOST_CACHE`
(default `~/.cache/robopost`) where that can't be written. It is keyed by content: after an append the store
has another id, the old cache is not found and a new one replaces it. Building checks every episode against
the digest that was recorded when it was appended, so that a damaged store never reaches training.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robopost.data.batch import Spec
from robopost.data.episode import Arrays, Episode, conform
from robopost.data.files import disk_errors, replace_file, sync_folder
from robopost.data.layout import digest
from robopost.data.store import EpisodeStore
from robopost.errors import DataError

CACHE_VERSION = 1
COPY_BYTES = 64 << 20


@dataclass
class Columns:
    """A dataset as contiguous arrays.

    Attributes:
        obs: key -> (R, ...), the observations of one episode after the other, the final one included where
            there is one: R = steps + episodes with a final observation.
        action, reward: (N, A), (N,).
        extras: key -> (N, ...).
        lengths: (E,) int64 steps per episode.
        terminated, truncated, has_final: (E,) bool.
    """

    obs: Arrays
    action: np.ndarray
    reward: np.ndarray
    extras: Arrays
    lengths: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    has_final: np.ndarray

    def head(self, episodes: int) -> Columns:
        """The first `episodes` episodes, without copying."""
        steps = int(self.lengths[:episodes].sum())
        rows = steps + int(self.has_final[:episodes].sum())
        return Columns(
            obs={key: value[:rows] for key, value in self.obs.items()},
            action=self.action[:steps],
            reward=self.reward[:steps],
            extras={key: value[:steps] for key, value in self.extras.items()},
            lengths=self.lengths[:episodes],
            terminated=self.terminated[:episodes],
            truncated=self.truncated[:episodes],
            has_final=self.has_final[:episodes],
        )


def obs_rows(lengths: np.ndarray, has_final: np.ndarray) -> np.ndarray:
    """(N,) row in `Columns.obs` of each step: final observations before it shift it."""
    shift = np.concatenate([[0], np.cumsum(has_final)[:-1]]) if len(lengths) else np.zeros(0)
    return np.arange(int(lengths.sum())) + np.repeat(shift.astype(np.int64), lengths)


def columns_of(episodes: Iterable[Episode], spec: Spec) -> Columns:
    """Gather episodes held in memory; their extras must agree."""
    fitted = [conform(episode, spec) for episode in episodes]
    if not fitted:
        raise DataError("a dataset needs at least one episode")
    for index, episode in enumerate(fitted):
        if episode.extras.keys() != fitted[0].extras.keys():
            raise DataError(
                f"episode {index} has the extras {list(episode.extras)}, episode 0 {list(fitted[0].extras)}"
            )
    join = lambda parts: np.concatenate(list(parts))  # noqa: E731
    return Columns(
        obs={key: join(e.obs[key] for e in fitted) for key in spec.obs},
        action=join(e.action for e in fitted),
        reward=join(e.reward for e in fitted),
        extras={key: join(e.extras[key] for e in fitted) for key in fitted[0].extras},
        lengths=np.array([len(e) for e in fitted], np.int64),
        terminated=np.array([e.terminated for e in fitted]),
        truncated=np.array([e.truncated for e in fitted]),
        has_final=np.array([e.has_final_obs for e in fitted]),
    )


def open_columns(store: EpisodeStore) -> Columns:
    """Memory-map the cache of a store, building it first when it is absent or of older content.

    Raises:
        DataError: the store is empty or damaged, or neither place can be written.
    """
    if len(store) == 0:
        raise DataError(f"{store.path} holds no episodes. Fix: collect or import some")
    places = [beside(store.path), elsewhere(store.path)]
    for place in places:
        found = _open(place / store.dataset_id, store)
        if found is not None:
            return found
    place = next((place for place in places if _writable(place)), None)
    if place is None:
        raise DataError(f"no cache folder can be written ({places[0]}, {places[1]}). Fix: set ROBOPOST_CACHE")
    with disk_errors(f"can't build the cache {place}"):
        _build(store, place)
    found = _open(place / store.dataset_id, store)
    if found is None:
        raise DataError(f"the cache {place} was removed while it was built. Fix: try again")
    return found


def beside(path: Path) -> Path:
    """Cache folder beside a store."""
    return path.with_name(f"{path.name}.cache")


def elsewhere(path: Path) -> Path:
    """Folder under `$ROBOPOST_CACHE` for what belongs beside a `path` that can't be written."""
    root = Path(os.environ.get("ROBOPOST_CACHE") or Path.home() / ".cache" / "robopost")
    mark = hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
    return root / f"{path.name}.{mark}.cache"


def _writable(place: Path) -> bool:
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f".probe-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _arrays(store: EpisodeStore) -> dict[str, tuple[tuple[int, ...], str]]:
    final = sum(info["has_final_obs"] for info in store.episode_info)
    rows = store.num_steps + final
    out = {f"obs.{key}": ((rows, *shape), dtype) for key, (shape, dtype) in store.spec.obs.items()}
    out |= {
        "action": ((store.num_steps, store.spec.action_dim), "float32"),
        "reward": ((store.num_steps,), "float32"),
    }
    return out | {
        f"extra.{key}": ((store.num_steps, *shape), dtype) for key, (shape, dtype) in store.extras.items()
    }


def _index(store: EpisodeStore) -> dict[str, Any]:
    arrays = {name: [list(shape), dtype] for name, (shape, dtype) in _arrays(store).items()}
    return {"version": CACHE_VERSION, "dataset_id": store.dataset_id, "arrays": arrays}


def _map(path: Path, shape: tuple[int, ...], dtype: str, mode: str) -> np.ndarray:
    # Copy-on-write mapping: torch wants writable memory, and nothing ever reaches the file.
    return np.memmap(path, dtype=dtype, mode=mode, shape=shape)  # type: ignore[call-overload]


def _open(folder: Path, store: EpisodeStore) -> Columns | None:
    try:
        index = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        return None
    if index != _index(store):
        return None
    arrays: Arrays = {}
    for name, (shape, dtype) in _arrays(store).items():
        path = folder / f"{name}.bin"
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != size:
            return None
        arrays[name] = _map(path, shape, dtype, "c")
    flags = {
        name: np.array([info[field] for info in store.episode_info], bool)
        for name, field in (
            ("terminated", "terminated"),
            ("truncated", "truncated"),
            ("has_final", "has_final_obs"),
        )
    }
    return Columns(
        obs={key: arrays[f"obs.{key}"] for key in store.spec.obs},
        action=arrays["action"],
        reward=arrays["reward"],
        extras={key: arrays[f"extra.{key}"] for key in store.extras},
        lengths=np.diff(store.episode_ends, prepend=0),
        **flags,
    )


def _build(store: EpisodeStore, place: Path) -> None:
    """Copy, check, sync, rename: the folder named by the dataset id is whole from its first moment."""
    partial = place / f"{store.dataset_id}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        lengths = np.diff(store.episode_ends, prepend=0)
        has_final = np.array([info["has_final_obs"] for info in store.episode_info], bool)
        rows = obs_rows(lengths, has_final)
        final_rows = (np.cumsum(lengths + has_final) - 1)[has_final]
        for name, (shape, dtype) in _arrays(store).items():
            path = partial / f"{name}.bin"
            with path.open(
                "wb"
            ) as file:  # reserve the space: a full disk must fail here, not as SIGBUS in the map
                os.posix_fallocate(file.fileno(), 0, max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1))
            target = _map(path, shape, dtype, "r+")
            _copy(
                store,
                name,
                target,
                rows if name.startswith("obs.") else None,
                final_rows,
                np.flatnonzero(has_final),
            )
            target.flush()  # type: ignore[attr-defined]
            del target
        replace_file(partial / "index.json", json.dumps(_index(store)).encode())
        built = _open(partial, store)
        assert built is not None
        _check(store, built)
        try:
            partial.rename(place / store.dataset_id)
        except OSError:  # another process was faster, or an unreadable one is in the way
            if _open(place / store.dataset_id, store) is None:
                shutil.rmtree(place / store.dataset_id)
                partial.rename(place / store.dataset_id)
        sync_folder(place)
        for old in place.iterdir():  # maps that other processes hold stay valid after the files are unlinked
            if old.is_dir() and old.name != store.dataset_id and not old.name.endswith(".partial"):
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(
    store: EpisodeStore,
    name: str,
    target: np.ndarray,
    rows: np.ndarray | None,
    final_rows: np.ndarray,
    with_final: np.ndarray,
) -> None:
    array = store.array(f"data/{name}")
    unit = array.shards[0] if array.shards else array.chunks[0]
    step = unit * max(COPY_BYTES // max(unit * int(np.prod(array.shape[1:])) * array.dtype.itemsize, 1), 1)
    for start in range(0, store.num_steps, step):
        stop = min(start + step, store.num_steps)
        block = store.rows(f"data/{name}", start, stop)
        target[slice(start, stop) if rows is None else rows[start:stop]] = block
    if rows is not None:
        for first in range(0, len(with_final), 1024):
            part = with_final[first : first + 1024]
            lo, hi = int(part[0]), int(part[-1]) + 1
            block = store.rows(f"meta/final_{name}", lo, hi)
            target[final_rows[first : first + 1024]] = block[part - lo]


def _check(store: EpisodeStore, columns: Columns) -> None:
    step = row = 0
    for index, info in enumerate(store.episode_info):
        length = int(columns.lengths[index])
        rows = length + int(columns.has_final[index])
        episode = Episode(
            obs={key: value[row : row + rows] for key, value in columns.obs.items()},
            action=columns.action[step : step + length],
            reward=columns.reward[step : step + length],
            terminated=info["terminated"],
            truncated=info["truncated"],
            success=info["success"],
            instruction=info["instruction"],
            extras={key: value[step : step + length] for key, value in columns.extras.items()},
            has_final_obs=info["has_final_obs"],
        )
        if digest(episode) != info["digest"]:
            raise DataError(
                f"{store.path}: episode {index} is not what was recorded (its digest differs). "
                f"Fix: robopost data verify {store.path}, then restore or re-import it"
            )
        step, row = step + length, row + rows
