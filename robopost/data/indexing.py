# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic of a dataset: where the episode of a step begins and ends, fast gathers, returns-to-go."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from robopost.data.cache import Columns, obs_rows
from robopost.errors import ConfigError


@dataclass
class Index:
    """Per step of the dataset, int64 (N,): where its episode begins and ends."""

    row: Tensor  # row of its observation
    next_row: Tensor  # row of its next observation
    first_row: Tensor  # row of its episode's first observation
    end: Tensor  # step after its episode's last step
    limit: Tensor  # step after the last one that an n-step return from here can cover
    usable: Tensor | None  # (U,) steps that are transitions, None = all

    def to(self, device: torch.device) -> Index:
        """The same index on `device`."""
        return Index(**{name: None if v is None else v.to(device) for name, v in vars(self).items()})  # type: ignore[arg-type]


def make_index(columns: Columns) -> Index:
    """The index of a dataset, on the CPU."""
    lengths = columns.lengths
    ends = np.cumsum(lengths)
    row_ends = ends + np.cumsum(columns.has_final)
    rows = obs_rows(lengths, columns.has_final)

    def spread(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, np.int64), lengths))

    # Without a final observation the last step only counts where nothing is bootstrapped behind it.
    open_end = ~columns.has_final & ~columns.terminated
    usable = None
    if open_end.any():
        keep = np.ones(len(rows), bool)
        keep[ends[open_end] - 1] = False
        usable = torch.from_numpy(np.flatnonzero(keep))
    return Index(
        row=torch.from_numpy(rows),
        next_row=torch.minimum(torch.from_numpy(rows + 1), spread(row_ends - 1)),
        first_row=spread(row_ends - lengths - columns.has_final),
        end=spread(ends),
        limit=spread(ends - open_end),
        usable=usable,
    )


def last_flags(flags: np.ndarray, columns: Columns) -> Tensor:
    """Per-episode flags (E,) as per-step flags (N,) that are set on an episode's last step only."""
    out = torch.zeros(int(columns.lengths.sum()), dtype=torch.bool)
    out[torch.from_numpy(np.cumsum(columns.lengths)[flags] - 1)] = True
    return out


def take(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]` along the first dimension for an index of any shape, by the fastest route."""
    if index.ndim == 1:
        return values.index_select(0, index)
    return values.index_select(0, index.reshape(-1)).view(*index.shape, *values.shape[1:])


def returns_to_go(
    reward: np.ndarray, lengths: np.ndarray, gamma: float, endless: np.ndarray | None = None
) -> np.ndarray:
    """(N,) float32 discounted sums of the rewards from each step to its episode's end, summed in float64.

    Args:
        reward: (N,), episode after episode.
        lengths: (E,) steps of the episodes.
        gamma: discount per step.
        endless: (E,) bool, None = nowhere: episodes that are taken to go on for ever where their reward r never
            changed, with r / (1 - gamma) at each step. For sparse rewards, where the plain sum of a failure that
            its time limit cut comes out too high (Nakamoto et al. 2023, Cal-QL; the code's `is_sparse_reward`).

    Raises:
        ConfigError: an endless sum without discount.
    """
    if endless is not None and not gamma < 1:
        raise ConfigError(
            f"data.sparse_reward=true sums rewards without end: algo.gamma={gamma} must be below 1"
        )
    out = np.empty(len(reward), np.float32)
    stop = 0
    for index, length in enumerate(lengths.tolist()):
        start, stop = stop, stop + length
        part = reward[start:stop]
        if endless is not None and endless[index] and part.min() == part.max():
            out[start:stop] = float(part[0]) / (1 - gamma)
            continue
        # Plain floats: faster than numpy calls per step, 0.1 s for a million steps.
        sums = accumulate(reversed(part.tolist()), lambda later, now: now + gamma * later)
        out[start:stop] = list(sums)[::-1]
    return out
