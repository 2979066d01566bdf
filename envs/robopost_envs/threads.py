# SPDX-License-Identifier: Apache-2.0
"""A team of persistent threads that share a list of jobs: parallel stepping of simulators without the GIL."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

Work = Callable[[Iterator[int]], None]


def default_threads(jobs: int) -> int:
    """CPUs this process may use, at most one per job."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, jobs))


class ThreadTeam:
    """`len(work) - 1` waiting threads plus the caller.

    `run(jobs)` calls every `work[i](iterator)` on a thread of its own with ONE iterator over `jobs`: each
    thread takes the next job when it is free, so uneven jobs balance themselves. Waking a thread costs two
    lock operations, an order of magnitude less than a future of `concurrent.futures`.

    Args:
        work: one function per thread, which may hold buffers of its own; the first runs on the caller.
    """

    def __init__(self, work: Sequence[Work]) -> None:
        self._mine, *others = work
        self._jobs: Iterator[int] = iter(())
        self._errors: list[BaseException] = []
        self._closed = False
        self._go = [threading.Lock() for _ in others]
        self._done = [threading.Lock() for _ in others]
        for lock in (*self._go, *self._done):
            lock.acquire()
        self._team = [
            threading.Thread(target=self._loop, args=parts, daemon=True, name=f"robopost-sim-{i}")
            for i, parts in enumerate(zip(others, self._go, self._done, strict=True))
        ]
        for thread in self._team:
            thread.start()

    def __len__(self) -> int:
        """Threads that work, the calling one included."""
        return 1 + len(self._team)

    def run(self, jobs: Iterable[int]) -> None:
        """Do `jobs` and return when all are done; the first exception of any thread is raised here."""
        if self._closed:
            raise RuntimeError("the thread team is closed")
        self._jobs = jobs = iter(jobs)
        for lock in self._go:
            lock.release()
        try:
            self._mine(jobs)
        finally:
            for lock in self._done:
                lock.acquire()
        if self._errors:
            error = self._errors[0]
            self._errors.clear()
            raise error

    def close(self) -> None:
        """End the threads."""
        if self._closed:
            return
        self._closed = True
        for lock in self._go:
            lock.release()
        for thread in self._team:
            thread.join(timeout=5)

    def _loop(self, work: Work, go: threading.Lock, done: threading.Lock) -> None:
        while True:
            go.acquire()
            if self._closed:
                return
            try:
                work(self._jobs)
            except BaseException as error:
                self._errors.append(error)
            done.release()
