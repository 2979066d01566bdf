# SPDX-License-Identifier: Apache-2.0
"""Import of foreign data into stores (once), export, and a description of either."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from robopost.data.cache import elsewhere
from robopost.data.episode import conform
from robopost.data.files import disk_errors
from robopost.data.formats import EpisodeSource, checked_options, open_source
from robopost.data.layout import count_episode, data_arrays, episode_json, stats_keys
from robopost.data.stats import Running
from robopost.data.store import EpisodeStore, is_store
from robopost.errors import DataError, unknown
from robopost.registry import FORMATS

log = logging.getLogger(__name__)
MOMENTS = ("mean", "std", "min", "max")
Progress = Callable[[int, int], None]  # (episodes done, episodes in all or 0)


def import_source(
    source: EpisodeSource, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> EpisodeStore:
    """Write the episodes of `source` into a new store at `out`; all or nothing.

    The store is built under a temporary name beside `out` and renamed when it is complete.

    Raises:
        DataError: an episode doesn't fit, the file has none, the disk is full. Nothing is left at `out`.
    """
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists. Fix: another --out, or --overwrite")
    if out.exists() and not is_store(out):
        raise DataError(
            f"{out} exists and is no robopost store, so it is not overwritten. Fix: another --out"
        )
    partial = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.partial")
    metadata = {**source.metadata, "import_options": source.options}
    try:
        with disk_errors(f"can't import into {out}"):
            out.parent.mkdir(parents=True, exist_ok=True)
            store = EpisodeStore.create(
                partial,
                spec=source.spec,
                fps=source.fps,
                source=source.source,
                extras=source.extras,
                metadata=metadata,
            )
            with store:
                for index, episode in enumerate(source.episodes):
                    try:
                        store.append(episode)
                    except DataError as error:
                        raise DataError(f"{source.source}, episode {index}: {error}") from error
                    if progress:
                        progress(index + 1, source.count)
            if len(store) == 0:
                raise DataError(f"{source.source} holds no episodes")
            if out.exists():
                shutil.rmtree(out)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return EpisodeStore.open(out)


def open_any(path: str | Path, format: str = "auto", options: dict[str, Any] | None = None) -> EpisodeStore:
    """Open a store, or the store that a foreign path was imported into (importing it on the first call).

    `demos.hdf5` becomes `demos.hdf5.robopost.zarr` beside it, or under `$ROBOPOST_CACHE` where that can't be
    written.    A changed file (size or modification time of anything in it) is imported again.
    """
    path = Path(path)
    if is_store(path):
        if format not in ("auto", "robopost"):
            raise DataError(f"{path} is a robopost store, not {format!r}. Fix: data.format=auto")
        return EpisodeStore.open(path)
    if not path.exists():
        raise DataError(f"no data at {path}. Fix: check data.path")
    stamp = _stamp(path, format, options or {})
    places = [path.with_name(f"{path.name}.robopost.zarr"), elsewhere(path) / "import.robopost.zarr"]
    for place in places:
        if is_store(place):
            store = EpisodeStore.open(place)
            if store.metadata.get("imported_from") == stamp:
                return store
    source = open_source(path, "auto" if format == "robopost" else format, options)
    source.metadata = {**source.metadata, "imported_from": stamp}
    place = places[0] if os.access(path.parent, os.W_OK) else places[1]
    log.info("importing %s into %s (once)", path, place)
    return import_source(source, place, overwrite=is_store(place))


def _stamp(path: Path, format: str, options: dict[str, Any]) -> str:
    """Changes whenever a file under `path` does, without reading contents."""
    mark = hashlib.blake2b(json.dumps([format, options], sort_keys=True, default=str).encode(), digest_size=8)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            info = file.stat()
            mark.update(f"{file.relative_to(path)}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
    return mark.hexdigest()


def export_store(store: EpisodeStore, out: Path, format: str, options: dict[str, Any] | None = None) -> None:
    """Write `store` to `out` in a registered format; nothing is left at `out` when that fails.

    Raises:
        DataError: the format or an option is unknown, it can't be written, `out` exists, the disk is full.
    """
    if format not in FORMATS:
        raise unknown("data format", format, FORMATS.names(), DataError)
    target = FORMATS.get(format).target
    if not target.can_write:
        writable = ", ".join(entry.name for entry in FORMATS if entry.target.can_write)
        raise DataError(f"format {format!r} can only be read. Formats that can be written: {writable}")
    checked_options(target.write, options or {})
    if out.exists():
        raise DataError(f"{out} exists. Fix: another --out")
    try:
        with disk_errors(f"can't export to {out}"):
            out.parent.mkdir(parents=True, exist_ok=True)
            target.write(store, out, **(options or {}))
    except BaseException:
        if out.is_dir():
            shutil.rmtree(out, ignore_errors=True)
        else:
            out.unlink(missing_ok=True)
        raise


def describe(path: str | Path, format: str = "auto", options: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON-able facts about a dataset, as `robopost data info` shows them. A foreign file is only read."""
    path = Path(path)
    if is_store(path):
        with EpisodeStore.open(path) as store:
            header = (store.spec, store.fps, store.source, store.extras)
            info = store.episode_info
            stats, identity = store.stats(), store.dataset_id
            ends = store.episode_ends
            reward = store.rows("data/reward", 0, store.num_steps).astype(np.float64)
            returns = [float(part.sum()) for part in np.split(reward, ends[:-1])] if len(ends) else []
    else:
        source = open_source(path, format, options)
        header = (source.spec, source.fps, source.source, source.extras)
        running = {key: Running.empty(shape) for key, shape in stats_keys(source.spec).items()}
        info, returns, identity = [], [], "not imported"
        for episode in source.episodes:
            fitted = conform(episode, source.spec, source.extras)
            info.append(episode_json(fitted, ""))
            returns.append(float(fitted.reward.sum(dtype=np.float64)))
            count_episode(fitted, running)
        stats = {key: item.result(identity) for key, item in running.items()}
    spec, fps, name, extras = header
    lengths = [item["length"] for item in info]
    rated = [item["success"] for item in info if item["success"] is not None]
    keys: dict[str, Any] = {}
    for array, (shape, dtype) in data_arrays(spec, extras).items():
        key = array.removeprefix("obs.")
        keys[key] = {"shape": list(shape), "dtype": dtype}
        keys[key] |= {k: np.asarray(v).tolist() for k, v in stats.get(key, {}).items() if k in MOMENTS}
    return {
        "path": str(path),
        "source": name,
        "dataset_id": identity,
        "fps": fps,
        "episodes": len(info),
        "steps": sum(lengths),
        "bytes": sum(
            f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()
        ),
        "length": _summary(lengths),
        "return": _summary(returns),
        "success": float(np.mean(rated)) if rated else None,
        "terminated": sum(item["terminated"] for item in info),
        "truncated": sum(item["truncated"] for item in info),
        "without_final_obs": sum(not item["has_final_obs"] for item in info),
        "instructions": dict(Counter(item["instruction"] for item in info if item["instruction"])),
        "keys": keys,
    }


def _summary(values: list[Any]) -> dict[str, Any]:
    return (
        {"min": min(values), "max": max(values), "mean": float(np.mean(values))}
        if values
        else dict.fromkeys(("min", "max", "mean"), 0)
    )
