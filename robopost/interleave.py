# SPDX-License-Identifier: Apache-2.0
"""Paired timing: two sides in turn in one run, so that a ratio survives a noisy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from robopost.errors import ConfigError


@dataclass(frozen=True)
class Ratio:
    """Outcome of `interleave`: rates in units per second, one entry per round."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours over theirs, round by round: above 1 means ours is faster."""
        return tuple(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def row(self) -> dict[str, Any]:
        """Cell form: median, min and max of the ratios, median rates and all rounds."""
        return {
            "median": statistics.median(self.ratios),
            "min": min(self.ratios),
            "max": max(self.ratios),
            "ours_per_s": statistics.median(self.ours),
            "theirs_per_s": statistics.median(self.theirs),
            "ours_rounds": list(self.ours),
            "theirs_rounds": list(self.theirs),
        }


def interleave(
    ours: Callable[[], float | None],
    theirs: Callable[[], float | None],
    rounds: int = 7,
    *,
    warmup: int = 1,
    sync: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time two callables A B A B ... in one run, so that load and clock drift hit both.

    Args:
        ours: does one round of work; may return how many units (steps, updates) it did, default 1.
        theirs: the same for the other side.
        rounds: timed rounds of each.
        warmup: untimed rounds of each before.
        sync: called before a clock is read, e.g. `torch.cuda.synchronize`.
        clock: seconds; replaced in tests.
    """
    if rounds < 1:
        raise ConfigError(f"interleave: rounds={rounds} must be at least 1")
    for _ in range(warmup):
        ours()
        theirs()

    def rate(fn: Callable[[], float | None]) -> float:
        if sync:
            sync()
        start = clock()
        units = fn()
        if sync:
            sync()
        return (1.0 if units is None else float(units)) / (clock() - start)

    pairs = [(rate(ours), rate(theirs)) for _ in range(rounds)]
    return Ratio(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
