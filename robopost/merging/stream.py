# SPDX-License-Identifier: Apache-2.0
"""The streaming engine: parents are read, merged and written in blocks by a few threads, in bounded memory.

Each worker takes the next chunk of an output file, reads what it needs of every parent, merges into its own buffer and
writes it. Reading, arithmetic and writing of different workers overlap; none of them holds the interpreter's lock.
Peak memory: workers x (one chunk + one block per parent), whatever the size of the model or of its largest tensor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from robopost.merging.shards import DTYPES, Entry, Shards
from robopost.merging.writer import CHUNK, Chunk, FilePlan, FileWriter, Piece, chunks, page_buffer

BLOCK = 1 << 18  # elements merged at once: a block of every parent stays in the cache of its core
AHEAD = 3  # chunks per worker that the kernel is told to read in advance
Source = tuple[Shards, Entry]
Combine = Callable[[Sequence[Tensor], int, Tensor], object]


@dataclass
class Job:
    """How one output tensor is made.

    Attributes:
        sources: the tensors it is made of.
        combine: (flat blocks of the sources, index of their first entry, output block to fill); None copies the only
            source, byte by byte where the dtypes are the same.
    """

    sources: list[Source]
    combine: Combine | None = None


@dataclass
class _Work:
    """What the workers share."""

    todo: list[Chunk]
    writers: list[FileWriter]
    jobs: dict[str, Job]
    left: list[int]
    progress: Callable[[int], None]
    workers: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    next: int = 0
    done: int = 0
    failed: bool = False

    def take(self) -> int | None:
        """Index of the next chunk."""
        with self.lock:
            if self.failed or self.next >= len(self.todo):
                return None
            self.next += 1
            return self.next - 1

    def report(self, chunk: Chunk) -> bool:
        """Count a chunk; True for the last one of its file."""
        with self.lock:
            self.left[chunk.file] -= 1
            self.done += chunk.nbytes
            self.progress(self.done)
            return self.left[chunk.file] == 0


def stream(
    folder: Path,
    plans: Sequence[FilePlan],
    jobs: dict[str, Job],
    *,
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Make every tensor of `plans` and write the files into `folder`; they are durable on return.

    Args:
        folder: exists; the caller renames it when all is done.
        plans: layout of the output files.
        jobs: one per tensor.
        workers: threads, 0 = one per core, at most 8.
        progress: called with the number of bytes written.

    Raises:
        RobopostError: the disk is full, or a parent became shorter.
    """
    count = workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    todo = chunks(plans)
    writers = [FileWriter(folder / plan.name, plan) for plan in plans]
    left = [sum(chunk.file == number for chunk in todo) for number in range(len(plans))]
    work = _Work(todo, writers, jobs, left, progress, count)
    try:
        for writer, pending in zip(writers, left, strict=True):
            writer.open()
            if not pending:  # nothing but empty tensors
                writer.finish()
        with single_threaded(), ThreadPoolExecutor(min(count, max(1, len(todo)))) as pool:
            futures = [pool.submit(_worker, work) for _ in range(count)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                work.failed = any(future.exception() for future in done)
            except BaseException:  # interrupted: the workers stop at their next chunk
                work.failed = True
                raise
        for future in futures:
            future.result()
    finally:
        work.failed = True
        for writer in writers:
            writer.close()


@contextmanager
def single_threaded() -> Iterator[None]:
    """One intra-op thread per worker: every worker is a thread already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _worker(work: _Work) -> None:
    torch.set_num_threads(1)
    out, raw = page_buffer(CHUNK), Buffers()
    view = memoryview(out)
    for chunk in work.todo[: AHEAD * work.workers]:
        _advise(work, chunk)
    while (index := work.take()) is not None:
        ahead = index + AHEAD * work.workers
        if ahead < len(work.todo):
            _advise(work, work.todo[ahead])
        chunk = work.todo[index]
        for piece in chunk.pieces:
            _make(work.jobs[piece.slot.name], piece, view, raw)
        work.writers[chunk.file].write(view, chunk.nbytes, chunk.start)
        if work.report(chunk):
            work.writers[chunk.file].finish()


class Buffers:
    """Memory that blocks of the sources are read into; reused from block to block."""

    def __init__(self) -> None:
        self._held: list[bytearray] = []

    def read(self, sources: Sequence[Source], first: int, count: int) -> list[Tensor]:
        """Entries first .. first + count - 1 of each source, as flat tensors valid until the next call."""
        blocks = []
        for position, (shards, entry) in enumerate(sources):
            size = entry.dtype.itemsize
            if len(self._held) <= position:
                self._held.append(bytearray())
            if len(self._held[position]) < count * size:
                self._held[position] = bytearray(count * size)
            buffer = self._held[position]
            shards.read(entry, memoryview(buffer)[: count * size], first * size)
            blocks.append(torch.frombuffer(buffer, dtype=entry.dtype, count=count))
        return blocks


def _make(job: Job, piece: Piece, view: memoryview, raw: Buffers) -> None:
    """Fill the part of a chunk that belongs to one tensor."""
    code = piece.slot.code
    source = job.sources[0][1]
    if job.combine is None and source.code == code:
        job.sources[0][0].read(source, view[piece.at : piece.at + piece.nbytes], piece.first)
        return
    dtype = DTYPES[code]
    size = dtype.itemsize
    total, start = piece.nbytes // size, piece.first // size
    out = torch.frombuffer(view, dtype=dtype, count=total, offset=piece.at)
    for done in range(0, total, BLOCK):
        count = min(BLOCK, total - done)
        blocks = raw.read(job.sources, start + done, count)
        target = out[done : done + count]
        if job.combine is None:
            target.copy_(blocks[0])
        else:
            job.combine(blocks, start + done, target)


def _advise(work: _Work, chunk: Chunk) -> None:
    """Tell the kernel which bytes of the parents a chunk will need."""
    if not hasattr(os, "posix_fadvise"):
        return
    for piece in chunk.pieces:
        if piece.nbytes < 1 << 16:
            continue  # a small tensor comes with its neighbours
        size = DTYPES[piece.slot.code].itemsize
        for shards, entry in work.jobs[piece.slot.name].sources:
            ratio = entry.dtype.itemsize
            offset = entry.start + piece.first // size * ratio
            os.posix_fadvise(
                shards.handle(entry.file), offset, piece.nbytes // size * ratio, os.POSIX_FADV_WILLNEED
            )
