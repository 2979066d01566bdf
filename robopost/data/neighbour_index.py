# SPDX-License-Identifier: Apache-2.0
"""The folder that keeps the lists of `robopost.data.neighbour_cells`, built once and memory-mapped afterwards."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopost.data.files import PARTIAL, disk_errors, replace_file, sync_folder
from robopost.data.neighbour_cells import Cells, Write
from robopost.errors import DataError

log = logging.getLogger(__name__)
VERSION = 2
KINDS = {"start": np.int64, "count": np.int32, "limit": np.float32, "step": np.int32, "near": np.float32}
FILES = {"index.json", *(f"{name}.bin" for name in KINDS)}

Make = Callable[[Write], tuple[Tensor, Tensor, Tensor]]


def in_memory(make: Make) -> Cells:
    """Build lists without a folder."""
    step, near = [torch.zeros(0, dtype=torch.int32)], [torch.zeros(0)]

    def write(ids: Tensor, weight: Tensor) -> None:
        step.append(ids)
        near.append(weight)

    return Cells(*make(write), torch.cat(step), torch.cat(near))


def load_or_build(folder: Path, identity: dict[str, Any], make: Make) -> Cells:
    """Open the index in `folder`, or build it there: the folder is whole from its first moment.

    Args:
        folder: of this index alone.
        identity: what the index depends on.
        make: builds the lists, given a function that takes their entries; returns `start`, `count` and `limit`.

    Raises:
        DataError: the folder holds the index of another dataset, beta or k, or other files, or the disk is full.
    """
    folder = folder.resolve()
    found = _open(folder, identity)
    if found is not None:
        log.info("neighbour index %s: %.0f MB", folder, found.nbytes / 1e6)
        return found
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= FILES):
        raise DataError(
            f"{folder} is there already and no neighbour index. Fix: algo.index=<a folder of its own>"
        )
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    with disk_errors(f"can't write the neighbour index {folder}"):
        _drop_abandoned(folder)
        partial.mkdir(parents=True)
        try:
            _write(partial, identity, make)
            if folder.exists() and _open(folder, identity) is None:
                shutil.rmtree(folder)  # torn: a whole one of this dataset would have been opened
            try:
                partial.rename(folder)
            except OSError:
                if _open(folder, identity) is None:  # else another process was faster
                    raise
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    found = _open(folder, identity)
    if found is None:
        raise DataError(f"the neighbour index {folder} was removed while it was built. Fix: try again")
    return found


def _drop_abandoned(folder: Path) -> None:
    """Remove what builds of `folder` left behind that were killed: a living one holds its lock."""
    for old in folder.parent.glob(f"{folder.name}.*{PARTIAL}"):
        with suppress(OSError), (old / "step.bin").open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, identity: dict[str, Any], make: Make) -> None:
    entries = 0
    with (folder / "step.bin").open("wb") as steps, (folder / "near.bin").open("wb") as weights:
        fcntl.flock(steps, fcntl.LOCK_EX)

        def write(ids: Tensor, weight: Tensor) -> None:
            nonlocal entries
            entries += len(ids)
            steps.write(ids.numpy().data)
            weights.write(weight.numpy().data)

        parts = make(write)
        for sink in (steps, weights):
            sink.flush()
            os.fsync(sink.fileno())
    for name, values in zip(("start", "count", "limit"), parts, strict=True):
        replace_file(folder / f"{name}.bin", values.numpy().tobytes())
    replace_file(folder / "index.json", json.dumps(identity | {"entries": entries}).encode())


def _open(folder: Path, identity: dict[str, Any]) -> Cells | None:
    try:
        index = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(index, dict):
        return None
    if index.get("version") != VERSION:
        raise DataError(
            f"the neighbour index {folder} has format {index.get('version')}, this robopost needs {VERSION}. "
            "Fix: delete it, or another algo.index="
        )
    if not isinstance(index.get("entries"), int):
        return None
    for key, value in identity.items():
        if index.get(key) != value:
            raise DataError(
                f"the neighbour index {folder} has {key}={index.get(key)!r}, this run needs {value!r}: it belongs "
                "to another dataset, normaliser, beta or setting. Fix: another algo.index=, or delete it"
            )
    arrays = []
    for name, kind in KINDS.items():
        path = folder / f"{name}.bin"
        size = index["entries"] if name in ("step", "near") else identity["steps"]
        if not path.is_file() or path.stat().st_size != size * np.dtype(kind).itemsize:
            return None
        values = np.memmap(path, kind, "c") if size else np.zeros(0, kind)
        arrays.append(torch.from_numpy(np.asarray(values)))
    return Cells(*arrays)
