# SPDX-License-Identifier: Apache-2.0
"""Intervals for success rates, returns and learning curves. NumPy only; every function is deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from robopost.errors import ConfigError

RESAMPLES = 10_000
_BLOCK = 4_000_000  # resampled values held in memory at once
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A point estimate with its confidence interval; `n` is the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def overlaps(self, other: Interval) -> bool:
        """True when the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high

    def to_json(self) -> dict[str, Any]:
        """Plain dict; NaN (no samples) becomes None."""
        plain = lambda v: v if math.isfinite(v) else None  # noqa: E731
        value, low, high = plain(self.value), plain(self.low), plain(self.high)
        return {"value": value, "low": low, "high": high, "n": self.n, "level": self.level}

    def text(self, *, percent: bool = False, digits: int = 1) -> str:
        """`"72.0 % [62.5, 79.9]"` or `"231.4 [210.0, 250.2]"`."""
        if self.n == 0:
            return "-"
        scale, unit = (100.0, " %") if percent else (1.0, "")
        value, low, high = (f"{v * scale:.{digits}f}" for v in (self.value, self.low, self.high))
        return f"{value}{unit} [{low}, {high}]"


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a success rate (Wilson 1927): right at 0 of n, n of n and small n, too.

    Args:
        successes: number of successes, 0..n.
        n: number of trials; 0 gives NaN with the interval [0, 1].
        level: two-sided confidence level.
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise ConfigError(f"wilson: successes={successes} must lie in 0..{n} (the number of episodes)")
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0, level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1; rounding would put it a hair outside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(p, low, high, n, level)


def bootstrap(
    values: ArrayLike,
    statistic: Statistic,
    level: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of `statistic`, which maps (R, n) resamples to (R,) numbers.

    Args:
        values: (n,) samples.
        statistic: vectorised over the first axis, e.g. `mean`.
        level: two-sided confidence level.
        resamples: number of resamples.
        seed: seed of the resampling; the same values always give the same interval.
    """
    _check_level(level)
    data = _flat(values)
    n = len(data)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, level)
    value = float(statistic(data[None])[0])
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    parts = []
    for start in range(0, resamples, rows):
        index = rng.integers(0, n, size=(min(rows, resamples - start), n))
        parts.append(statistic(data[index]))
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n, level)


def mean(samples: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return samples.mean(axis=-1)


def interquartile(samples: np.ndarray) -> np.ndarray:
    """Mean of the middle half over the last axis: floor(n / 4) values are cut off at each end."""
    n = samples.shape[-1]
    cut = n // 4
    if cut == 0:
        return samples.mean(axis=-1)
    # Both ends are needed at once, nothing inside has to be sorted.
    part = np.partition(samples, (cut, n - cut - 1), axis=-1)
    return part[..., cut : n - cut].mean(axis=-1)


def bootstrap_mean(
    values: ArrayLike, level: float = 0.95, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean with its percentile bootstrap interval: for episode returns (many samples, any distribution)."""
    return bootstrap(values, mean, level, resamples=resamples, seed=seed)


def interquartile_mean(
    values: ArrayLike, level: float = 0.95, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interquartile mean with its bootstrap interval (Agarwal et al. 2021): robust to a few outlying runs."""
    return bootstrap(values, interquartile, level, resamples=resamples, seed=seed)


def paired_difference(
    after: ArrayLike, before: ArrayLike, level: float = 0.95, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of `after - before` over pairs that share a start (same episode seed), bootstrapped over pairs.

    Raises:
        ConfigError: the two have different lengths, so they can't be pairs.
    """
    a, b = _flat(after), _flat(before)
    if len(a) != len(b):
        raise ConfigError(f"paired_difference: {len(a)} values after and {len(b)} before are not pairs")
    return bootstrap_mean(a - b, level, resamples=resamples, seed=seed)


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean with Student's t interval: for a handful of seeds, where a bootstrap is far too narrow.

    One value has no spread: its interval is the value itself, and `n == 1` says so.
    """
    _check_level(level)
    data = _flat(values)
    n = len(data)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, level)
    centre = float(data.mean())
    if n == 1:
        return Interval(centre, centre, centre, 1, level)
    half = t_quantile(0.5 + level / 2, n - 1) * float(data.std(ddof=1)) / math.sqrt(n)
    return Interval(centre, centre - half, centre + half, n, level)


@cache
def t_quantile(probability: float, dof: int) -> float:
    """Quantile of Student's t for integer degrees of freedom, `probability` in [0.5, 1)."""
    if not 0.5 <= probability < 1 or dof < 1:
        raise ConfigError(
            f"t_quantile: probability={probability} must lie in [0.5, 1) and dof={dof} be at least 1"
        )
    low, high = 0.0, 1.0
    while _t_cdf(high, dof) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, dof) < probability else (low, middle)
    return (low + high) / 2


def running(values: ArrayLike, window: int) -> np.ndarray:
    """Running mean of (n,) values over `window` points; at the ends a local straight line instead.

    A one-sided mean would lag behind a rising curve there, a shrinking window would show the raw noise.
    """
    data = _flat(values)
    if window <= 1 or len(data) < 3:
        return data
    index = np.arange(len(data), dtype=np.float64)
    first = np.maximum(0, np.arange(len(data)) - window // 2)
    last = np.minimum(len(data), np.arange(len(data)) + window // 2 + 1)

    def total(samples: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(samples)])
        return sums[last] - sums[first]

    count, at, square = total(np.ones_like(data)), total(index), total(index * index)
    level, cross = total(data), total(index * data)
    spread = square - at * at / count
    slope = np.divide(cross - at * level / count, spread, out=np.zeros_like(data), where=spread > 1e-9)
    return level / count + slope * (index - at / count)


def _t_cdf(t: float, dof: int) -> float:
    """P(T <= t) for t >= 0 by the finite series of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(dof))
    cos, sin = math.cos(theta), math.sin(theta)
    if dof % 2:
        term, total = cos, cos if dof > 1 else 0.0
        for k in range(3, dof - 1, 2):
            term *= cos * cos * (k - 1) / k
            total += term
        two_sided = 2 / math.pi * (theta + sin * total)
    else:
        term, total = 1.0, 1.0
        for k in range(2, dof - 1, 2):
            term *= cos * cos * (k - 1) / k
            total += term
        two_sided = sin * total
    return 0.5 + two_sided / 2


def _flat(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level={level} must lie between 0 and 1, e.g. 0.95")
