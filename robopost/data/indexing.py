# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic of a dataset: where the episode of a step begins and ends, fast gathers, returns-to-go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robopost.data.cache import Columns, obs_rows


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


def returns_to_go(reward: np.ndarray, lengths: np.ndarray, gamma: float) -> np.ndarray:
    """(N,) float32 discounted sums of the rewards from each step to its episode's end, summed in float64."""
    out = reward.astype(np.float64)
    last = np.cumsum(lengths) - 1
    # Step back from every episode's end at once: as many numpy calls as the longest episode has steps.
    order = np.argsort(lengths, kind="stable")
    sorted_lengths = lengths[order]
    for back in range(1, int(lengths.max(initial=0))):
        step = last[order[np.searchsorted(sorted_lengths, back, side="right") :]] - back
        out[step] += gamma * out[step + 1]
    return out.astype(np.float32)
