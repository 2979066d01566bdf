# SPDX-License-Identifier: Apache-2.0
"""`EpisodeStore`: episodes in a zarr v3 group, sharded, with crash-safe append.

Layout (plain zarr, readable without robopost)::

    zarr.json               attributes["robopost"]: format version, spec, fps, source, extras, metadata
    data/obs.<key>          (N, ...) concatenated over time, row t is what the policy saw before action t
    data/action, reward     (N, A), (N,)
    data/extra.<key>        (N, ...)
    meta/episode_ends       (E,) int64, exclusive
    meta/final_obs.<key>    (E, ...) observation after the last action; zeros where an episode has none
    meta/episodes           (M,) uint8, one JSON object per line and episode
    meta/zarr.json          attributes["commit"]: episodes, steps, bytes of meta/episodes, id, statistics

**Durability.** Appended episodes wait in memory until about one shard is full; `flush()` (and leaving the
context, and every automatic flush) is the point after which they survive kill -9 and power loss. A flush
writes the arrays first, each file atomically, and then replaces `meta/zarr.json`, the commit record. Rows
behind the record don't exist: an episode that was being written is dropped when the store is opened next.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import zarr

from robopost.data.batch import Spec
from robopost.data.episode import Arrays, Episode, KeySpec, Problem, conform
from robopost.data.files import PARTIAL, DurableStore, disk_errors
from robopost.data.layout import (
    FORMAT_VERSION,
    acquire_lock,
    chain_id,
    count_episode,
    create_group,
    data_arrays,
    digest,
    episode_blocks,
    episode_json,
    is_store,
    meta_arrays,
    read_header,
    read_json,
    shard_files,
    shard_rows,
    spec_from_json,
)
from robopost.data.stats import Running
from robopost.errors import DataError

__all__ = ["FORMAT_VERSION", "Episode", "EpisodeStore", "Problem", "is_store"]


class EpisodeStore:
    """A dataset on disk. Made by `create` or `open`; a context manager that flushes and closes.

    Attributes:
        path: folder of the zarr group.
        spec, fps, source: what `create` was given.
        extras: key -> (shape, dtype) of the per-step extras.
        metadata: JSON-able facts about the dataset.
        dataset_id: hash over the spec and every committed episode, 16 hexadecimal digits.
    """

    def __init__(self, path: Path, mode: Literal["r", "a"]) -> None:
        """Use `open` or `create`."""
        self.path = path
        self.mode = mode
        header = read_header(path)
        self.spec = spec_from_json(header["spec"])
        self.fps = float(header["fps"])
        self.source = str(header["source"])
        self.extras: dict[str, KeySpec] = {k: (tuple(s), d) for k, (s, d) in header["extras"].items()}
        self.metadata: dict[str, Any] = header["metadata"]
        self.buffer_steps = 0  # 0 = as many as fill a shard of the widest key
        self._pending: list[tuple[Episode, str]] = []
        self._pending_steps = 0
        self._lock: BinaryIO | None = None
        self._closed = False
        if mode == "a":
            self._lock = acquire_lock(path)
        try:
            self._group = zarr.open_group(
                DurableStore(path, read_only=mode == "r"), mode="r" if mode == "r" else "r+"
            )
            self._load_commit()
            if mode == "a":
                self._drop_uncommitted()
        except BaseException:
            self._release()
            raise

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        spec: Spec,
        fps: float,
        source: str,
        overwrite: bool = False,
        extras: dict[str, KeySpec] | None = None,
        metadata: dict[str, Any] | None = None,
        buffer_steps: int = 0,
    ) -> EpisodeStore:
        """Make an empty store and open it for appending.

        Args:
            path: folder to create.
            spec: shapes and bounds of the episodes.
            fps: steps per second, 0 when unknown.
            source: where the data comes from, for people.
            overwrite: replace an existing robopost store (never anything else).
            extras: key -> (shape, dtype) of further per-step arrays.
            metadata: JSON-able facts about the dataset.
            buffer_steps: steps between automatic flushes, 0 = about one shard. 1: every append is durable.

        Raises:
            DataError: the path exists, or can't be written.
        """
        path = Path(path)
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            if not overwrite:
                raise DataError(f"{path} exists. Fix: another path, or overwrite=True")
            if not is_store(path):
                raise DataError(
                    f"{path} exists and is no robopost store, so it is not overwritten. Fix: another path"
                )
            acquire_lock(path).close()
            shutil.rmtree(path)
        with disk_errors(f"can't create {path}"):
            create_group(
                path, spec, fps=float(fps), source=source, extras=extras or {}, metadata=metadata or {}
            )
        store = cls(path, "a")
        store.buffer_steps = buffer_steps
        return store

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "a"] = "r") -> EpisodeStore:
        """Open an existing store to read (`"r"`) or to append (`"a"`, one process at a time).

        Raises:
            DataError: nothing there, no store, torn, of another version, or being written by another process.
        """
        path = Path(path)
        if not path.exists():
            raise DataError(f"no dataset at {path}. Fix: check the path")
        return cls(path, mode)

    def __len__(self) -> int:
        return len(self.episode_ends)

    @property
    def num_steps(self) -> int:
        """Committed steps."""
        return int(self.episode_ends[-1]) if len(self.episode_ends) else 0

    @property
    def keys(self) -> list[str]:
        """Names of the arrays under `data/`."""
        return list(data_arrays(self.spec, self.extras))

    @property
    def pending(self) -> int:
        """Appended episodes that a flush has yet to make durable."""
        return len(self._pending)

    def array(self, name: str) -> zarr.Array:
        """A zarr array by path, e.g. `"data/action"`. May be longer than the committed rows."""
        try:
            return self._group[name]  # type: ignore[return-value]
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.path}: array {name} is missing or torn ({error}). Fix: restore it"
            ) from error

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of an array; corrupt or missing chunks raise DataError."""
        array = self.array(name)
        if array.shape[0] < stop:
            raise DataError(
                f"{self.path}: {name} has {array.shape[0]} rows, the commit record says at least {stop}. "
                f"Fix: robopost data verify {self.path}"
            )
        for shard in shard_files(array, self.path / name, start, stop):
            if not shard.exists():  # zarr would read it as zeros
                raise DataError(
                    f"{self.path}: {name} rows {start}..{stop} can't be read ({shard} is missing). "
                    f"Fix: robopost data verify {self.path}"
                )
        try:
            value = np.asarray(array[start:stop])
        except Exception as error:  # every codec raises its own kind
            raise DataError(
                f"{self.path}: {name} rows {start}..{stop} can't be read ({type(error).__name__}: {error}). "
                f"Fix: robopost data verify {self.path}"
            ) from error
        return value

    def episode(self, index: int) -> Episode:
        """Read one committed episode; negative indices count from the end."""
        count = len(self)
        if not -count <= index < count:
            raise DataError(f"episode {index} does not exist, the dataset has {count}")
        index %= count
        start = int(self.episode_ends[index - 1]) if index else 0
        stop = int(self.episode_ends[index])
        info = self.episode_info[index]
        obs: Arrays = {}
        for key in self.spec.obs:
            obs[key] = self.rows(f"data/obs.{key}", start, stop)
            if info["has_final_obs"]:
                obs[key] = np.concatenate([obs[key], self.rows(f"meta/final_obs.{key}", index, index + 1)])
        return Episode(
            obs=obs,
            action=self.rows("data/action", start, stop),
            reward=self.rows("data/reward", start, stop),
            terminated=info["terminated"],
            truncated=info["truncated"],
            success=info["success"],
            instruction=info["instruction"],
            extras={key: self.rows(f"data/extra.{key}", start, stop) for key in self.extras},
            metadata=info["metadata"],
            has_final_obs=info["has_final_obs"],
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self.episode(index) for index in range(len(self)))

    def stats(self) -> dict[str, dict[str, Any]]:
        """Statistics of the committed rows (final observations not counted).

        Returns:
            observation keys, `"action"` and `"reward"` -> `{"mean", "std", "min", "max", "count", "source"}`,
            where source is the dataset id. Images have per-channel statistics, instructions none.
        """
        return {key: item.result(self.dataset_id) for key, item in self._running.items()}

    def append(self, episode: Episode) -> None:
        """Add an episode; durable after the next flush.

        Raises:
            DataError: its arrays don't fit the spec (nothing is written), or the automatic flush found the
                disk full (the committed part is whole, the episode stays pending).
        """
        self._need_writable()
        fitted = conform(episode, self.spec, self.extras)
        self._pending.append((fitted, digest(fitted)))
        self._pending_steps += len(fitted)
        if self._pending_steps >= (self.buffer_steps or self._shard_steps):
            self.flush()

    def flush(self) -> None:
        """Make every appended episode durable.

        Raises:
            DataError: the disk is full. Committed episodes are untouched; pending ones stay in memory and a
                later flush writes them.
        """
        self._need_writable()
        if not self._pending:
            return
        with disk_errors(f"can't write {len(self._pending)} episodes to {self.path}"):
            self._write_pending()
        self._pending.clear()
        self._pending_steps = 0

    def close(self) -> None:
        """Flush and release the store."""
        if self._closed:
            return
        try:
            if self.mode == "a":
                self.flush()
        finally:
            self._release()

    def __enter__(self) -> EpisodeStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _shard_steps(self) -> int:
        return min(shard_rows(shape, dtype) for shape, dtype in data_arrays(self.spec, self.extras).values())

    def _need_writable(self) -> None:
        if self._closed:
            raise DataError(f"{self.path} is closed")
        if self.mode == "r":
            raise DataError(f"{self.path} is open for reading. Fix: EpisodeStore.open(path, mode='a')")

    def _release(self) -> None:
        self._closed = True
        if self._lock is not None:
            self._lock.close()  # gives the lock back
            self._lock = None

    def _load_commit(self) -> None:
        commit = read_json(self.path / "meta" / "zarr.json", "commit record").get("commit")
        if commit is None:
            raise DataError(
                f"{self.path}: meta/zarr.json holds no commit record. Fix: restore it from a copy"
            )
        self.dataset_id: str = commit["dataset_id"]
        self._json_bytes: int = commit["json_bytes"]
        self.episode_ends = self.rows("meta/episode_ends", 0, commit["episodes"]).astype(np.int64)
        lines = bytes(self.rows("meta/episodes", 0, self._json_bytes)).splitlines()
        try:
            self.episode_info: list[dict[str, Any]] = [json.loads(line) for line in lines]
        except ValueError as error:
            raise DataError(
                f"{self.path}: meta/episodes is torn ({error}). Fix: restore it from a copy"
            ) from error
        if len(self.episode_info) != commit["episodes"] or self.num_steps != commit["steps"]:
            raise DataError(
                f"{self.path}: the commit record says {commit['episodes']} episodes and {commit['steps']} "
                f"steps, the arrays {len(self.episode_info)} and {self.num_steps}. Fix: restore a copy"
            )
        self._running = {key: Running.from_json(item) for key, item in commit["stats"].items()}

    def _drop_uncommitted(self) -> None:
        """Cut what a killed writer left behind the commit record."""
        for partial in self.path.rglob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)
        committed = {f"data/{name}": self.num_steps for name in data_arrays(self.spec, self.extras)}
        committed |= {f"meta/{name}": len(self) for name in meta_arrays(self.spec)}
        committed["meta/episodes"] = self._json_bytes
        with disk_errors(f"can't open {self.path} for appending"):
            for name, rows in committed.items():
                array = self.array(name)
                if array.shape[0] > rows:
                    array.resize((rows, *array.shape[1:]))

    def _write_pending(self) -> None:
        episodes = [episode for episode, _ in self._pending]
        first, start = len(self), self.num_steps
        for name, block in episode_blocks(episodes, self.spec, self.extras):
            self._put(f"data/{name}", start, block)
        for key, (shape, dtype) in self.spec.obs.items():
            zero = np.zeros(shape, dtype)
            final = np.stack([e.obs[key][-1] if e.has_final_obs else zero for e in episodes])
            self._put(f"meta/final_obs.{key}", first, final)
        ends = start + np.cumsum([len(episode) for episode in episodes], dtype=np.int64)
        self._put("meta/episode_ends", first, ends)
        info = [episode_json(episode, mark) for episode, mark in self._pending]
        text = b"".join(json.dumps(item, separators=(",", ":")).encode() + b"\n" for item in info)
        self._put("meta/episodes", self._json_bytes, np.frombuffer(text, np.uint8))

        running = {key: Running.from_json(item.to_json()) for key, item in self._running.items()}
        identity = self.dataset_id
        for episode, mark in self._pending:
            identity = chain_id(identity, mark)
            count_episode(episode, running)
        commit = {
            "episodes": first + len(episodes),
            "steps": int(ends[-1]),
            "json_bytes": self._json_bytes + len(text),
            "dataset_id": identity,
            "stats": {key: item.to_json() for key, item in running.items()},
        }
        self._group["meta"].attrs["commit"] = commit  # the one write that makes the episodes exist
        self.episode_ends = np.concatenate([self.episode_ends, ends])
        self.episode_info += info
        self._json_bytes, self.dataset_id, self._running = commit["json_bytes"], identity, running

    def _put(self, name: str, start: int, block: np.ndarray) -> None:
        # Unless told otherwise each time, zarr writes no file for zeros: a lost file would look the same.
        with zarr.config.set({"array.write_empty_chunks": True}):
            array = self.array(name)
            array.resize((start + len(block), *array.shape[1:]))
            array[start : start + len(block)] = block
