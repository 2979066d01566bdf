# SPDX-License-Identifier: Apache-2.0
"""A team of persistent threads that share a list of jobs: parallel stepping of simulators without the GIL."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator

Work = Callable[[Iterator[int]], None]


def default_threads(jobs: int) -> int:
    """CPUs this process may use, at most one per job."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, jobs))


class ThreadTeam:
    """`threads - 1` waiting threads plus the caller.

    `run(work, jobs)` calls `work(iterator)` on every thread with ONE iterator over `jobs`: each thread takes
    the next job when it is free, so uneven jobs balance themselves. Waking a thread costs two lock
    operations, an order of magnitude less than a future of `concurrent.futures`.

    Args:
        threads: threads that work, the calling one included.
    """

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._work: Work | None = None
        self._jobs: Iterator[int] = iter(())
        self._errors: list[BaseException] = []
        self._go = [threading.Lock() for _ in range(self.threads - 1)]
        self._done = [threading.Lock() for _ in range(self.threads - 1)]
        for lock in (*self._go, *self._done):
            lock.acquire()
        self._team = [
            threading.Thread(target=self._loop, args=(go, done), daemon=True, name=f"robopost-sim-{i}")
            for i, (go, done) in enumerate(zip(self._go, self._done, strict=True))
        ]
        for thread in self._team:
            thread.start()

    def run(self, work: Work, jobs: Iterable[int]) -> None:
        """Do `jobs` and return when all are done; the first exception of any thread is raised here."""
        jobs = iter(jobs)
        if not self._team:
            work(jobs)
            return
        self._work, self._jobs = work, jobs
        for lock in self._go:
            lock.release()
        try:
            work(jobs)
        finally:
            for lock in self._done:
                lock.acquire()
        if self._errors:
            error = self._errors[0]
            self._errors.clear()
            raise error

    def close(self) -> None:
        """End the threads; a closed team works on the calling thread alone."""
        team, self._team = self._team, []
        self._work = None
        for lock in self._go:
            lock.release()
        for thread in team:
            thread.join(timeout=5)

    def _loop(self, go: threading.Lock, done: threading.Lock) -> None:
        while True:
            go.acquire()
            if self._work is None:
                return
            try:
                self._work(self._jobs)
            except BaseException as error:
                self._errors.append(error)
            done.release()
