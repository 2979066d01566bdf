# SPDX-License-Identifier: Apache-2.0
"""A tracker that notes how long a run has taken at every log line: wall and CPU seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from robopost.registry import TRACKERS
from robopost.track import TrackContext, Tracker

MARKS: dict[int, tuple[float, float]] = {}


@TRACKERS.register("clock")
class Clock(Tracker):
    """Keeps (wall, CPU) of each step's first line: the loop logs before it evaluates and saves."""

    def __init__(self, context: TrackContext) -> None:
        super().__init__(context)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Note the time of `step`."""
        MARKS.setdefault(step, (time.perf_counter(), time.process_time()))


@contextmanager
def timed() -> Iterator[dict[int, tuple[float, float]]]:
    """Clear the marks; yields step to seconds (wall, CPU) since the start, filled when the block has ended."""
    MARKS.clear()
    seconds: dict[int, tuple[float, float]] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield seconds
    seconds |= {step: (w - wall, c - cpu) for step, (w, c) in MARKS.items()}
