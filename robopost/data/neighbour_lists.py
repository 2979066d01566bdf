# SPDX-License-Identifier: Apache-2.0
"""For every dataset step, the leaves of a `Tree` by their distance from its state; built once and stored."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from robopost.data.files import PARTIAL, disk_errors, replace_file, sync_folder
from robopost.data.neighbour_tree import FAR, Tree, split
from robopost.errors import DataError

log = logging.getLogger(__name__)
VERSION = 1
ID_BITS = 23  # of an entry; the upper 8 bits are the distance, so that entries sort by it
STEPS_OF_RADIUS = 255  # the distance's resolution
BINS = 16  # of distance, for which counts are kept: how much of a list a query has to read
GROUP = 256  # states whose lists are computed together
CHUNK = 256  # leaves per matrix product
SAMPLE = 256  # states that the radius is chosen from
FILES = {"index.json", *(f"{name}.bin" for name in ("steps", "start", "count", "entries"))}


@dataclass
class Lists:
    """Per step the leaves within `radius` of its state, nearest first.

    An entry is `distance << 23 | leaf`. The distance is that of the leaf's nearest state, rounded down to a
    multiple of radius / 255. A leaf that a step doesn't list is at least `radius` away.

    Attributes:
        radius: in normalised state units.
        entries: (E,) int32.
        start: (N,) int64, where each step's list begins.
        count: (N * BINS,) int32, entries of each step within radius * (b + 1) / BINS.
    """

    radius: float
    entries: Tensor
    start: Tensor
    count: Tensor

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.entries, self.start, self.count))


def empty_lists(steps: int) -> Lists:
    """Lists of radius 0."""
    zeros = torch.zeros(steps, dtype=torch.int64)
    count = torch.zeros(steps * BINS, dtype=torch.int32)
    return Lists(0.0, torch.zeros(1, dtype=torch.int32), zeros, count)


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A progress bar on a terminal, nothing elsewhere. Yields a function that takes the number done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


class _Measure:
    """Distances from states to the nearest state of each leaf."""

    def __init__(self, tree: Tree) -> None:
        padding = tree.action.view(tree.leaves, -1, tree.width)[:, 0] >= FAR
        state = tree.state.view(tree.leaves, tree.width, -1)
        norm = state.square().sum(2).masked_fill(padding, math.inf)
        # Place by place, so that the minimum over a leaf runs over whole vectors of leaves.
        self.table = torch.cat([state * -2, norm[:, :, None]], 2).transpose(0, 1).contiguous()
        finite = norm.masked_fill(padding, 0.0)
        self.largest = float(finite.max())
        self.slack = (state.shape[2] + 8) * 2.0**-23  # rounding of the products, relative to the norms

    def __call__(self, state: Tensor, leaves: Tensor) -> Tensor:
        """(G, K) distances, never above the true ones, from states (G, S) to `leaves` (K,)."""
        extended = torch.cat([state, torch.ones_like(state[:, :1])], 1)
        norm = state.square().sum(1, keepdim=True)
        out = torch.empty(len(state), len(leaves))
        for first in range(0, len(leaves), CHUNK):
            part = self.table.index_select(1, leaves[first : first + CHUNK])
            product = extended @ part.view(-1, part.shape[2]).t()
            out[:, first : first + CHUNK] = product.view(len(state), len(part), -1).amin(1)
        return out.add_(norm * (1 - self.slack) - self.largest * self.slack).clamp_min_(0).sqrt_()


def choose_radius(state: Tensor, tree: Tree, per_step: int, measure: Any) -> float:
    """Radius within which a step has about `per_step` leaves on average; beyond all distances where all fit."""
    rows = torch.linspace(0, len(state) - 1, min(SAMPLE, len(state))).long()
    found = [measure(part, torch.arange(tree.leaves)) for part in state[rows].split(16)]
    distance = torch.cat(found).view(-1)
    distance = distance[distance.isfinite()]
    wanted = per_step * len(rows)
    if wanted >= len(distance):
        spread = (state.amax(0) - state.amin(0)).square().sum().sqrt()
        return float(spread) * 1.001 + 1e-6
    return float(np.partition(distance.numpy(), wanted)[wanted])


def build_lists(state: Tensor, tree: Tree, list_bytes: int, sink: BinaryIO | None) -> Lists:
    """Compute the lists of all states (N, S), block by block.

    Args:
        state: (N, S) on the CPU.
        tree: their tree.
        list_bytes: average size of a list; the radius follows from it.
        sink: file that entries go to; None keeps them in memory.
    """
    rows = len(state)
    measure = _Measure(tree)
    radius = choose_radius(state, tree, list_bytes // 4, measure)
    if radius <= 0 or list_bytes < 4:
        return empty_lists(rows)
    groups = split(state, max(math.ceil(math.log2(rows / GROUP)), 0))
    leaf = tree.levels[-1]
    start = np.zeros(rows, np.int64)
    count = np.zeros((rows, BINS), np.int32)
    kept: list[np.ndarray] = []
    total = 0
    with progress("state neighbours", len(groups)) as report:
        for number, group in enumerate(groups):
            ids = group[group < rows]
            block = state[ids]
            low, high = block.amin(0), block.amax(0)
            apart = ((leaf.state - (low + high) / 2).abs() - leaf.state_half - (high - low) / 2).clamp_min(0)
            near = torch.nonzero(apart.square().sum(1) < radius * radius * 1.0001).view(-1)
            entries, bins = _entries(measure(block, near), near, radius)
            size = bins.sum(1)
            start[ids.numpy()] = total + np.cumsum(size) - size
            count[ids.numpy()] = np.cumsum(bins, 1)
            total += len(entries)
            if sink is None:
                kept.append(entries)
            else:
                sink.write(entries.tobytes())
            report(number + 1)
    joined = np.concatenate(kept) if kept else np.zeros(0, np.int32)
    return Lists(radius, torch.from_numpy(joined), torch.from_numpy(start), torch.from_numpy(count).view(-1))


def _entries(distance: Tensor, leaves: Tensor, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Sorted entries of a group's lists one after the other, and how many fall in each bin (G, BINS)."""
    rows = len(distance)
    row, column = (index.numpy() for index in torch.nonzero(distance < radius, as_tuple=True))
    level = (distance.numpy()[row, column] * (STEPS_OF_RADIUS / radius)).astype(np.int64)
    level = np.minimum(level, STEPS_OF_RADIUS - 1)
    bins = np.bincount(row * BINS + level * BINS // STEPS_OF_RADIUS, minlength=rows * BINS)
    order = np.sort(row << 32 | level << ID_BITS | leaves.numpy()[column])
    return (order & 0x7FFFFFFF).astype(np.int32), bins.reshape(rows, BINS)


def load_or_build(folder: Path, identity: dict[str, Any], make: Any) -> tuple[Tensor, Lists]:
    """Open the index in `folder`, or build it there: the folder is whole from its first moment.

    Args:
        folder: of this index alone.
        identity: what the index depends on.
        make: function of an open file for the entries, returns (steps per leaf, lists without entries).

    Raises:
        DataError: the folder holds the index of another dataset or other files, or the disk is full.
    """
    found = _open(folder, identity)
    if found is not None:
        log.info("neighbour index %s: %.0f MB", folder, found[1].nbytes / 1e6)
        return found
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= FILES):
        raise DataError(
            f"{folder} is there already and no neighbour index. Fix: algo.index=<a folder of its own>"
        )
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    with disk_errors(f"can't write the neighbour index {folder}"):
        partial.mkdir(parents=True)
        try:
            with (partial / "entries.bin").open("wb") as sink:
                steps, lists = make(sink)
                sink.flush()
                os.fsync(sink.fileno())
            for name, values in (
                ("steps", steps.to(torch.int32)),
                ("start", lists.start),
                ("count", lists.count),
            ):
                replace_file(partial / f"{name}.bin", values.contiguous().numpy().tobytes())
            sizes = {"radius": lists.radius, "leaves": len(steps), "width": steps.shape[1]}
            replace_file(partial / "index.json", json.dumps(identity | sizes).encode())
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


def _open(folder: Path, identity: dict[str, Any]) -> tuple[Tensor, Lists] | None:
    try:
        index = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        return None
    for key, value in identity.items():
        if index.get(key) != value:
            raise DataError(
                f"the neighbour index {folder} has {key}={index.get(key)!r}, this dataset needs {value!r}: it "
                "belongs to another dataset, normaliser or setting. Fix: another algo.index=, or delete it"
            )
    rows = identity["steps"]
    shapes = {
        "steps": (np.int32, index["leaves"] * index["width"]),
        "start": (np.int64, rows),
        "count": (np.int32, rows * BINS),
        "entries": (np.int32, None),
    }
    arrays = {}
    for name, (kind, size) in shapes.items():
        path = folder / f"{name}.bin"
        if not path.is_file():
            return None
        length = path.stat().st_size // np.dtype(kind).itemsize
        if size is not None and length != size:
            return None
        values = np.memmap(path, kind, "c") if length else np.zeros(1, kind)
        arrays[name] = torch.from_numpy(np.asarray(values))
    ends = arrays["start"] + arrays["count"].view(rows, BINS)[:, -1]
    if int(ends.max()) > len(arrays["entries"]):
        return None
    steps = arrays["steps"].long().view(index["leaves"], index["width"])
    return steps, Lists(index["radius"], arrays["entries"], arrays["start"], arrays["count"])
