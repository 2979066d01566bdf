# SPDX-License-Identifier: Apache-2.0
"""Find what is wrong with a dataset, and say where: episode, row (counted inside the episode) and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robopost.data.batch import Spec
from robopost.data.episode import Episode, Problem
from robopost.data.formats import EpisodeSource, checked_options, find_format
from robopost.data.layout import count_episode, data_arrays, digest, meta_arrays, stats_keys
from robopost.data.stats import Running
from robopost.data.store import EpisodeStore, is_store
from robopost.errors import DataError

RATE_TOLERANCE = 0.01  # share by which the median time step may differ from 1 / fps
GAP_TOLERANCE = 0.5  # share of a time step by which a single one may differ
BOUND_TOLERANCE = 1e-4  # share of the action range that counts as rounding

__all__ = ["Problem", "check_source", "verify"]


def verify(path: str | Path, *, format: str = "auto", options: dict[str, Any] | None = None) -> list[Problem]:
    """Check a store, or a file of any registered format. An empty list means: fit for training.

    Finds truncated, missing and corrupt arrays, misaligned lengths, wrong shapes and types, NaN and inf, time
    stamps at another rate than declared, actions outside their bounds, content that differs from what was
    recorded; as warnings constant dimensions, black cameras, repeated episodes and episodes without an end.
    Formats add their own (a missing video).

    Raises:
        DataError: there is nothing at `path`, or no format knows it.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no data at {path}. Fix: check the path")
    if is_store(path) or (format in ("auto", "robopost") and (path / "meta" / "episode_ends").is_dir()):
        if format == "auto" and not is_store(path) and not (path / "zarr.json").exists():
            return _foreign(path, format, options)  # zarr v2 of another tool
        return check_store(path)
    return _foreign(path, format, options)


def _foreign(path: Path, format: str, options: dict[str, Any] | None) -> list[Problem]:
    target = find_format(path, format).target
    checked_options(target.read, options or {})
    try:
        return target.verify(path, **(options or {}))
    except DataError as error:
        return [_problem(str(path), error)]


def check_source(source: EpisodeSource) -> list[Problem]:
    """Read every episode of `source` and check it.

    Reading goes on after an episode that can't be read where the source's iterator does (a generator stops).
    """
    check = _Check(source.spec, source.fps)
    iterator = iter(source.episodes)
    index = 0
    while True:
        try:
            episode = next(iterator)
        except StopIteration:
            break
        except DataError as error:
            check.problems.append(_problem(f"episode {index}", error))
        else:
            check.episode(index, episode)
        index += 1
    if source.count and index < source.count and not check.errors:
        check.add(
            source.source,
            f"declares {source.count} episodes and holds {index}",
            "copy it again or re-record",
        )
    check.finish()
    return check.problems


def check_store(path: Path) -> list[Problem]:
    """Check a store: first its arrays as files, then the content of every episode that can be read."""
    try:
        store = EpisodeStore.open(path)
    except DataError as error:
        return [_problem(str(path), error)]
    with store:
        check = _Check(store.spec, store.fps)
        if np.any(np.diff(store.episode_ends, prepend=0) <= 0):
            row = int(np.flatnonzero(np.diff(store.episode_ends, prepend=0) <= 0)[0])
            check.add(
                f"episode {row}, key 'episode_ends'", "episode ends don't rise", "restore it from a copy"
            )
            return check.problems
        broken = _broken_rows(store, check)
        for index, info in enumerate(store.episode_info):
            stop = int(store.episode_ends[index])
            if any(first < stop and last > stop - info["length"] for first, last in broken):
                continue
            try:
                episode = store.episode(index)
            except DataError as error:
                check.problems.append(_problem(f"episode {index}", error))
                continue
            if check.episode(index, episode) and digest(episode) != info["digest"]:
                check.add(
                    f"episode {index}", "differs from what was recorded (digest)", "restore it from a copy"
                )
        check.finish()
        return check.problems


def _broken_rows(store: EpisodeStore, check: _Check) -> list[tuple[int, int]]:
    """Report arrays that are absent, short or unreadable; returns the steps [first, last) of no use."""
    wanted = {f"data/{k}": (v, store.num_steps) for k, v in data_arrays(store.spec, store.extras).items()}
    finals = {k: v for k, v in meta_arrays(store.spec).items() if k.startswith("final_obs")}
    wanted |= {f"meta/{k}": (v, len(store)) for k, v in finals.items()}
    everything, broken = (0, store.num_steps), []
    for name, ((shape, dtype), rows) in wanted.items():
        key = f"key {name!r}"
        try:
            array = store.array(name)
        except DataError as error:
            check.problems.append(_problem(key, error))
            return [everything]
        if array.shape[1:] != shape or str(array.dtype) != dtype:
            what = f"has rows of {array.shape[1:]} {array.dtype}, the spec says {shape} {dtype}"
            check.add(key, what, "re-import it, or restore it from a copy")
            return [everything]
        if array.shape[0] < rows:
            at = _place(store, array.shape[0]) if name.startswith("data/") else f"episode {array.shape[0]}"
            check.add(f"{at}, {key}", f"truncated: {array.shape[0]} of {rows} rows", "restore it from a copy")
            broken.append((array.shape[0], rows) if name.startswith("data/") else everything)
        unit = array.shards[0] if array.shards else array.chunks[0]
        for start in range(0, min(array.shape[0], rows), unit):
            stop = min(start + unit, rows, array.shape[0])
            try:
                store.rows(name, start, stop)
            except DataError as error:
                at = _place(store, start) if name.startswith("data/") else f"episode {start}"
                why = str(error.__cause__ or error).splitlines()[0]
                check.add(
                    f"{at}, {key}", f"rows {start}..{stop} can't be read: {why}", "restore it from a copy"
                )
                broken.append((start, stop) if name.startswith("data/") else everything)
    return broken


def _place(store: EpisodeStore, step: int) -> str:
    index = int(np.searchsorted(store.episode_ends, step, side="right"))
    start = int(store.episode_ends[index - 1]) if index else 0
    return f"episode {index}, row {step - start}"


class _Check:
    """Collects the problems of one dataset, episode by episode."""

    def __init__(self, spec: Spec, fps: float) -> None:
        self.spec = spec
        self.fps = fps
        self.problems: list[Problem] = []
        self._running = {key: Running.empty(shape) for key, shape in stats_keys(spec).items()}
        self._digests: dict[str, int] = {}
        self._count = 0

    @property
    def errors(self) -> int:
        return sum(problem.severity == "error" for problem in self.problems)

    def add(self, where: str, what: str, fix: str, severity: str = "error") -> None:
        self.problems.append(Problem(where, what, fix, severity))

    def episode(self, index: int, episode: Episode) -> bool:
        """Check one episode; False where its shapes are so wrong that nothing else could be looked at."""
        self._count += 1
        name = f"episode {index}"
        if not self._shapes(name, episode):
            return False
        arrays = {**episode.obs, "action": episode.action, "reward": episode.reward, **episode.extras}
        for key, value in arrays.items():
            self._finite(name, key, value)
        for key, (shape, dtype) in self.spec.obs.items():
            if dtype == "uint8" and len(shape) == 3 and not episode.obs[key].any():
                self.add(
                    f"{name}, key {key!r}", "every frame is black", "check the camera or the video", "warning"
                )
        self._bounds(name, np.asarray(episode.action))
        if "timestamp" in episode.extras and self.fps > 0:
            self._rate(name, np.asarray(episode.extras["timestamp"], np.float64).reshape(-1))
        if not (episode.terminated or episode.truncated):
            fix = "set truncated where the recording was cut"
            self.add(name, "neither terminated nor truncated", fix, "warning")
        mark = digest(episode)
        if mark in self._digests:
            self.add(name, f"is the same as episode {self._digests[mark]}", "remove one of them", "warning")
        self._digests.setdefault(mark, index)
        count_episode(episode, self._running)
        return True

    def finish(self) -> None:
        """Checks over all episodes together."""
        if self._count == 0 and not self.problems:
            self.add("the dataset", "holds no episodes", "collect or import some")
        for key, item in self._running.items():
            flat = np.flatnonzero((item.low == item.high).reshape(-1)) if item.count > 1 else []
            declared = self.spec.obs.get(key, ((), "float32"))[1]
            if len(flat) and key != "reward" and declared != "uint8":
                value = f"{item.low.reshape(-1)[flat[0]]:g}"
                listed = ", ".join(map(str, flat[:8])) + (", ..." if len(flat) > 8 else "")
                what = f"{len(flat)} constant dimension(s): {listed} (first value {value})"
                self.add(f"key {key!r}", what, "leave them out if they carry nothing", "warning")

    def _shapes(self, name: str, episode: Episode) -> bool:
        steps = len(episode)
        if steps == 0:
            self.add(name, "has no steps", "remove it")
            return False
        fine = True
        lengths: dict[str, tuple[Any, int, tuple[int, ...]]] = {
            "action": (episode.action, steps, (self.spec.action_dim,)),
            "reward": (episode.reward, steps, ()),
        }
        for key, value in episode.extras.items():
            lengths[key] = (value, steps, tuple(value.shape[1:]))
        for key, (shape, _) in self.spec.obs.items():
            if key not in episode.obs:
                self.add(f"{name}, key {key!r}", "missing", "record it, or leave the key out of the spec")
                fine = False
            else:
                lengths[key] = (episode.obs[key], steps + int(episode.has_final_obs), tuple(shape))
        for key, (value, rows, shape) in lengths.items():
            if tuple(value.shape[1:]) != shape:
                what = f"has rows of shape {tuple(value.shape[1:])}, expected {shape}"
                self.add(f"{name}, row 0, key {key!r}", what, "re-export it with the declared shape")
                fine = False
            elif len(value) != rows:
                row = min(len(value), rows)
                what = f"misaligned: {len(value)} rows where {rows} are needed for {steps} actions"
                self.add(f"{name}, row {row}, key {key!r}", what, "cut or re-record the episode")
                fine = False
        return fine

    def _finite(self, name: str, key: str, value: np.ndarray) -> None:
        if not np.issubdtype(value.dtype, np.floating):
            return
        bad = ~np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            first = value.reshape(len(value), -1)[row]
            kind = "NaN" if np.isnan(first).any() else "inf"
            what = f"{kind} in {int(bad.sum())} row(s), dimension {int(np.argmax(~np.isfinite(first)))} first"
            self.add(
                f"{name}, row {row}, key {key!r}", what, "cut the episode before this row, or leave it out"
            )

    def _bounds(self, name: str, action: np.ndarray) -> None:
        low, high = np.asarray(self.spec.action_low), np.asarray(self.spec.action_high)
        with np.errstate(invalid="ignore"):
            span = np.where(np.isfinite(high - low), high - low, 1.0) * BOUND_TOLERANCE
            outside = (action < low - span) | (action > high + span)
        if outside.any():
            row, dim = (int(v) for v in np.argwhere(outside)[0])
            what = (
                f"{action[row, dim]:g} in dimension {dim} lies outside {low[dim]:g}..{high[dim]:g} "
                f"({int(outside.any(axis=1).sum())} rows in all)"
            )
            self.add(
                f"{name}, row {row}, key 'action'", what, "record executed actions, or correct the bounds"
            )

    def _rate(self, name: str, stamp: np.ndarray) -> None:
        if len(stamp) < 2 or not np.isfinite(stamp).all():
            return
        step, wanted = np.diff(stamp), 1.0 / self.fps
        where = f"{name}, row {{}}, key 'timestamp'"
        if (step <= 0).any():
            row = int(np.argmax(step <= 0)) + 1
            self.add(
                where.format(row), f"time goes back or stands still ({step[row - 1]:g} s)", "re-record it"
            )
            return
        median = float(np.median(step))
        if abs(median - wanted) > RATE_TOLERANCE * wanted:
            row = int(np.argmax(np.abs(step - wanted) > RATE_TOLERANCE * wanted)) + 1
            what = f"wrong rate: runs at {1 / median:.3g} Hz, the dataset says {self.fps:.3g}"
            self.add(where.format(row), what, "correct fps, or resample the episode")
            return
        gaps = np.abs(step - wanted) > GAP_TOLERANCE * wanted
        if gaps.any():
            row = int(np.argmax(gaps)) + 1
            what = f"{int(gaps.sum())} gap(s): a step of {step[row - 1]:.4g} s where {wanted:.4g} s are due"
            self.add(where.format(row), what, "split the episode there, or resample it")


def _problem(where: str, error: DataError) -> Problem:
    what, _, fix = str(error).partition("Fix: ")
    if not fix:
        what, _, fix = str(error).partition("fix: ")
    return Problem(where, what.rstrip(" .;"), fix or "restore it from a copy")
