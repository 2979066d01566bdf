# SPDX-License-Identifier: Apache-2.0
"""Streaming statistics of a dataset: mean, standard deviation, range and count per key, with provenance.

Blocks are merged with the update of Chan, Golub and LeVeque (1979), eq. 2.1: numerically sound where the mean
is large against the spread, and independent of how the data was cut into blocks up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK_BYTES = 32 << 20  # float64 working memory of one update


@dataclass
class Running:
    """Running moments of rows of one shape, in float64. NaN and inf in the data show in the result."""

    count: int
    mean: np.ndarray
    m2: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Running:
        """Moments of no rows at all."""
        return cls(0, np.zeros(shape), np.zeros(shape), np.full(shape, np.inf), np.full(shape, -np.inf))

    def update(self, rows: np.ndarray) -> None:
        """Take in `rows` (n, ...)."""
        row_bytes = max(8 * int(np.prod(rows.shape[1:])), 1)
        step = max(BLOCK_BYTES // row_bytes, 1)
        for start in range(0, len(rows), step):
            block = rows[start : start + step].astype(np.float64)
            # inf - inf is NaN, which is the answer wanted here: it marks data that can't be normalised.
            with np.errstate(invalid="ignore"):
                mean = block.mean(axis=0)
                m2 = ((block - mean) ** 2).sum(axis=0)
            self.merge(Running(len(block), mean, m2, block.min(axis=0), block.max(axis=0)))

    def merge(self, other: Running) -> None:
        """Take in the moments of other rows of the same shape."""
        if other.count == 0:
            return
        total = self.count + other.count
        with np.errstate(invalid="ignore"):
            delta = other.mean - self.mean
            self.mean = self.mean + delta * (other.count / total)
            self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / total)
        self.low = np.minimum(self.low, other.low)
        self.high = np.maximum(self.high, other.high)
        self.count = total

    def result(self, source: str) -> dict[str, Any]:
        """`{"mean", "std", "min", "max"}` as float64 arrays, `"count"`, and `"source"`, the dataset id."""
        std = np.sqrt(np.maximum(self.m2, 0.0) / max(self.count, 1))
        return {
            "mean": self.mean.copy(),
            "std": std,
            "min": self.low.copy(),
            "max": self.high.copy(),
            "count": self.count,
            "source": source,
        }

    def to_json(self) -> dict[str, Any]:
        """Exact plain form (floats as hexadecimal text, so that NaN and inf survive JSON too)."""
        arrays = {"mean": self.mean, "m2": self.m2, "low": self.low, "high": self.high}
        out: dict[str, Any] = {"count": self.count, "shape": list(self.mean.shape)}
        return out | {name: [float(v).hex() for v in array.ravel()] for name, array in arrays.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Running:
        """Rebuild from `to_json` output."""
        get = lambda name: np.array([float.fromhex(v) for v in data[name]]).reshape(data["shape"])  # noqa: E731
        return cls(int(data["count"]), get("mean"), get("m2"), get("low"), get("high"))


def stats_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...] | None:
    """Shape of the statistics of a key: its own for numbers, (C,) for an image (H, W, C), else None."""
    if dtype == "uint8":
        return (shape[-1],) if len(shape) == 3 else None
    return shape


def moments(rows: np.ndarray, into: Running) -> None:
    """Update `into` with rows of data; images (n, H, W, C) give per-channel moments, counted in rows."""
    if rows.dtype != np.uint8:
        into.update(rows)
        return
    if len(rows) == 0:
        return
    # Integer sums are exact: H * W * 255^2 summed over any block that fits in memory stays far below 2^63.
    for start in range(0, len(rows), 256):
        block = rows[start : start + 256].reshape(-1, rows.shape[-1])
        wide = block.astype(np.int64)
        total, squares = wide.sum(axis=0), (wide * wide).sum(axis=0)
        pixels, count = len(block), min(256, len(rows) - start)
        mean = total / pixels
        m2 = (squares - total * mean) * (count / pixels)
        low, high = block.min(axis=0).astype(np.float64), block.max(axis=0).astype(np.float64)
        into.merge(Running(count, mean, m2, low, high))


def finite_problem(stats: dict[str, dict[str, Any]]) -> str | None:
    """Name of the first key whose statistics show NaN or inf in the data, None when all is finite."""
    for key, item in stats.items():
        if item["count"] and not all(np.isfinite(item[name]).all() for name in ("mean", "std", "min", "max")):
            return key
    return None
