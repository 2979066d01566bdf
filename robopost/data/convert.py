# SPDX-License-Identifier: Apache-2.0
"""Import of foreign data into stores, once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robopost.data.cache import elsewhere
from robopost.data.files import disk_errors
from robopost.data.formats import EpisodeSource, open_source
from robopost.data.store import EpisodeStore, is_store
from robopost.errors import DataError

log = logging.getLogger(__name__)
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
