# SPDX-License-Identifier: Apache-2.0
"""A streaming safetensors writer: header first from known shapes, then the data in any order, in bounded memory.

The data part is cut into pieces of `CHUNK` bytes that several threads fill and write. Where the file system can, writes
go past the page cache (O_DIRECT): nothing is copied twice, and a large model does not evict its own parents.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robopost.errors import RobopostError
from robopost.merging.shards import DTYPES, SINGLE

PAGE = 4096  # alignment that O_DIRECT asks for, of offsets, lengths and memory
CHUNK = 1 << 23  # bytes of an output file that a worker makes and writes at once


@dataclass(frozen=True)
class Slot:
    """A tensor of an output file: `start` is its first byte in the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class FilePlan:
    """Layout of one output file.

    Attributes:
        name: file name.
        header: its first bytes, padded with blanks so that the data begins on a page.
        slots: tensors in the order of the file, largest element first so that every one is aligned.
        size: bytes of the whole file.
    """

    name: str
    header: bytes
    slots: list[Slot]
    size: int


def size_of(code: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    count = 1
    for dim in shape:
        count *= dim
    return count * DTYPES[code].itemsize


def plan_files(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    *,
    single: str = SINGLE,
    limit: int = 0,
    metadata: dict[str, str] | None = None,
) -> tuple[list[FilePlan], bytes | None]:
    """Lay tensors (name, dtype, shape) out in files.

    Args:
        tensors: in the order in which they are to be spread over files.
        single: name of the file where there is only one.
        limit: bytes of data per file (a larger tensor gets a file of its own), 0 = one file.
        metadata: stored in every header.

    Returns:
        (files, content of the index that names them, None where there is one file).
    """
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for item in tensors:
        nbytes = size_of(item[1], item[2])
        if limit and shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += nbytes
    if not limit:
        return [_plan_file(single, shards[0], metadata)], None
    stem = SINGLE.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    plans = [_plan_file(name, part, metadata) for name, part in zip(names, shards, strict=True)]
    index = {
        "metadata": {"total_size": sum(slot.nbytes for plan in plans for slot in plan.slots)},
        "weight_map": dict(sorted((slot.name, plan.name) for plan in plans for slot in plan.slots)),
    }
    return plans, json.dumps(index, indent=2).encode()


def _plan_file(
    name: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> FilePlan:
    ordered = sorted(tensors, key=lambda item: -DTYPES[item[1]].itemsize)
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, code, shape in ordered:
        nbytes = size_of(code, shape)
        table[key] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // PAGE) * PAGE
    header = struct.pack("<Q", padded - 8) + text.ljust(padded - 8)
    slots, start = [], padded
    for key, code, shape in ordered:
        slots.append(Slot(key, code, tuple(shape), start, size_of(code, shape)))
        start += slots[-1].nbytes
    return FilePlan(name, header, slots, start)


@dataclass(frozen=True)
class Piece:
    """A part of a tensor inside a chunk: bytes [first, first + nbytes) of the tensor, at `at` in the chunk."""

    slot: Slot
    first: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class Chunk:
    """A part of an output file: `pieces` fill its `nbytes` bytes from byte `start` on."""

    file: int
    start: int
    nbytes: int
    pieces: list[Piece]


def chunks(plans: Sequence[FilePlan]) -> list[Chunk]:
    """All data of all files in pieces of at most `CHUNK` bytes, in file order."""
    found: list[Chunk] = []
    for number, plan in enumerate(plans):
        pieces: list[Piece] = []
        begin = len(plan.header)
        for slot in plan.slots:
            done = 0
            while done < slot.nbytes:
                at = slot.start + done - begin
                take = min(slot.nbytes - done, CHUNK - at)
                pieces.append(Piece(slot, done, take, at))
                done += take
                if at + take == CHUNK:
                    found.append(Chunk(number, begin, CHUNK, pieces))
                    begin, pieces = begin + CHUNK, []
        if pieces:
            found.append(Chunk(number, begin, plan.size - begin, pieces))
    return found


def page_buffer(nbytes: int) -> mmap.mmap:
    """Zeroed memory that begins on a page."""
    return mmap.mmap(-1, max(PAGE, -(-nbytes // PAGE) * PAGE))


@dataclass
class FileWriter:
    """Writes one planned file from any thread; `finish` cuts it to its size and makes it durable."""

    path: Path
    plan: FilePlan
    _handle: int = -1

    def open(self) -> None:
        """Create the file, reserve its space and write its header.

        Raises:
            RobopostError: not enough space.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        try:
            self._handle = os.open(self.path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._handle = os.open(self.path, flags, 0o644)
        try:
            os.posix_fallocate(self._handle, 0, self.plan.size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                need = self.plan.size / 1e9
                raise RobopostError(
                    f"the disk is full: {self.path.name} needs {need:.2f} GB. Fix: free some space, or out= elsewhere"
                ) from error
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        head = page_buffer(len(self.plan.header))
        head[: len(self.plan.header)] = self.plan.header
        self.write(memoryview(head), len(self.plan.header), 0)

    def write(self, buffer: memoryview, nbytes: int, start: int) -> None:
        """Write `nbytes` of a page-aligned buffer at byte `start`, a multiple of a page."""
        # The last chunk is padded to a page; `finish` cuts the padding off.
        view = buffer[: -(-nbytes // PAGE) * PAGE]
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._handle, view[done:], start + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not getattr(os, "O_DIRECT", 0):
                raise
            self._buffered()
            while done < len(view):
                done += os.pwrite(self._handle, view[done:], start + done)
        finally:
            view.release()

    def _buffered(self) -> None:
        """Go on through the page cache: this file system takes O_DIRECT at opening, not at writing."""
        import fcntl

        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))

    def finish(self) -> None:
        """Cut the padding off, sync and close."""
        os.ftruncate(self._handle, self.plan.size)
        os.fsync(self._handle)
        self.close()

    def close(self) -> None:
        """Close without syncing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
