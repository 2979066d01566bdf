# SPDX-License-Identifier: Apache-2.0
"""Search of one dataset's pairs on a CPU: each step's list, then all pairs for what a list can't certify."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robopost.data.neighbour_cells import Cells, rounding

MARGIN = 1e-5  # relative, on squared distances: bounds never rule out a pair for rounding
BOX = 1 + 1e-6  # of actions that lists answer for
SWEPT = 4096  # pairs per matrix product, so that it stays in cache
BLOCK = 64  # pairs per minimum of a sweep
ROWS = 64  # queries swept at once
AROUND = 16  # steps around a query's own that its first bound comes from


class Found(NamedTuple):
    """An answer: ids and squared distances (B, k), nearest first; certified by lists (B,), fallback asked (B,)."""

    ids: Tensor
    squared: Tensor
    certified: Tensor
    asked: Tensor


@dataclass
class Keys:
    """Queries: states (B, S), actions (B, A), and what the k nearest of (beta * state) ++ action means."""

    state: Tensor
    action: Tensor
    beta: float
    k: int

    def __len__(self) -> int:
        return len(self.action)

    def at(self, rows: Tensor) -> Keys:
        """Some of the queries."""
        return Keys(self.state[rows], self.action[rows], self.beta, self.k)


class CellSearch:
    """Exact search by lists, then by matrix products; see `robopost.data.neighbours`."""

    def __init__(self, state: Tensor, action: Tensor, beta: float, k: int, cells: Cells) -> None:
        self.state, self.action, self.beta, self.k, self.cells = state, action, beta, k, cells

    def __call__(self, steps: Tensor, action: Tensor, *, exact: bool = True) -> Found:
        """The k nearest of (state of `steps` (B,), `action` (B, A)); see `Neighbours.search`."""
        cells, beta, k = self.cells, self.beta, self.k
        keys = Keys(self.state.index_select(0, steps), action, beta, k)
        own = (action - self.action.index_select(0, steps)).square().sum(1)
        bound = own if k == 1 else self._around(steps, keys)
        size = cells.count.index_select(0, steps).long()
        end = size.cumsum(0)
        total = int(end[-1])
        row = torch.repeat_interleave(torch.arange(len(steps)), size, output_size=total)
        place = torch.arange(total).add_(
            (cells.start.index_select(0, steps) - end + size).index_select(0, row)
        )
        near = cells.near.index_select(0, place)
        limit = bound * (1 + MARGIN) + 1e-12
        keep = torch.nonzero(near <= limit.index_select(0, row)).view(-1)
        row, near = row.index_select(0, keep), near.index_select(0, keep)
        step = cells.step.index_select(0, place.index_select(0, keep))
        apart = self.action.index_select(0, step).sub_(action.index_select(0, row)).square_().sum(1)
        ids, squared = nearest(row, apart.add_(near), step.long(), len(keys), k)
        if k == 1:  # without a list at least the step's own pair is known
            held = squared.isfinite()
            ids, squared = torch.where(held, ids, steps[:, None]), torch.where(held, squared, own[:, None])
        # Nothing that was cut off can be nearer, and lists hold what any action of the box needs.
        last = squared[:, -1]
        certified = (last * (1 + MARGIN) < cells.limit.index_select(0, steps)) & last.isfinite()
        certified &= (action.abs() <= BOX).all(1)
        # Without a certificate; or, where that is enough, with fewer than k pairs on the list.
        asked = ~certified if exact else ~last.isfinite()
        rows = torch.nonzero(asked).view(-1)
        for part in rows.split(ROWS) if len(rows) else ():
            ids[part], squared[part] = self._sweep(keys.at(part), torch.minimum(bound, last)[part])
        return Found(ids, squared, certified, asked)

    def _around(self, steps: Tensor, keys: Keys) -> Tensor:
        """(B,) squared distance of the k-th nearest of the steps around each row's own: an upper bound."""
        count = len(self.state)
        span = min(max(2 * keys.k, AROUND), count)
        first = (steps - span // 2).clamp(min=0, max=count - span)
        step = (first[:, None] + torch.arange(span)).view(-1)
        row = torch.arange(len(steps)).repeat_interleave(span)
        squared = pair_distance(self.state, self.action, keys, row, step)
        return squared.view(-1, span).kthvalue(keys.k, dim=1).values

    def _sweep(self, keys: Keys, bound: Tensor) -> tuple[Tensor, Tensor]:
        """The k nearest of all pairs, given an upper bound (B,) of the k-th squared distance.

        A block of pairs is scored in difference form where its smallest product, less what rounding can have
        added, is within the bound.
        """
        limit = bound * (1 + MARGIN) + 1e-12
        query = torch.cat([keys.state * keys.beta, keys.action, torch.ones(len(keys), 1)], 1)
        size = query[:, :-1].square().sum(1)
        every = torch.arange(len(keys)).repeat_interleave(keys.k)
        ids = torch.zeros(len(keys), keys.k, dtype=torch.int64)
        best = torch.full((len(keys), keys.k), math.inf)
        for first in range(0, len(self.state), SWEPT):
            part = slice(first, first + SWEPT)
            pairs = torch.cat([self.state[part] * keys.beta, self.action[part]], 1)
            norm = pairs.square().sum(1, keepdim=True)
            holes = -len(pairs) % BLOCK
            table = torch.nn.functional.pad(torch.cat([pairs * -2, norm], 1), (0, 0, 0, holes), value=0.0)
            if holes:
                table[-holes:, -1] = math.inf
            least = (query @ table.t()).view(len(keys), -1, BLOCK).amin(2)
            slack = rounding(query.shape[1]) * (size + norm.max())
            row, block = torch.nonzero(least + size[:, None] <= (limit + slack)[:, None], as_tuple=True)
            if not len(row):
                continue
            step = (first + block[:, None] * BLOCK + torch.arange(BLOCK)).view(-1)
            row = row.repeat_interleave(BLOCK)
            real = torch.nonzero(step < len(self.state)).view(-1)
            row, step = row[real], step[real]
            squared = pair_distance(self.state, self.action, keys, row, step)
            near = torch.nonzero(squared <= limit[row]).view(-1)
            # What is known so far takes part, and bounds what comes: memory doesn't depend on how many qualify.
            held = torch.nonzero(best.view(-1).isfinite()).view(-1)
            row, step = torch.cat([every[held], row[near]]), torch.cat([ids.view(-1)[held], step[near]])
            squared = torch.cat([best.view(-1)[held], squared[near]])
            ids, best = nearest(row, squared, step, len(keys), keys.k)
            limit = torch.minimum(limit, best[:, -1] * (1 + MARGIN) + 1e-12)
        return ids, best


def pair_distance(state: Tensor, action: Tensor, keys: Keys, row: Tensor, step: Tensor) -> Tensor:
    """(P,) squared distances from rows of `keys` to dataset steps, in difference form."""
    apart = state.index_select(0, step).sub_(keys.state.index_select(0, row)).square_().sum(1)
    other = action.index_select(0, step).sub_(keys.action.index_select(0, row)).square_().sum(1)
    return apart.mul_(keys.beta * keys.beta).add_(other)


def nearest(row: Tensor, squared: Tensor, step: Tensor, rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Steps and squared distances (rows, k) of the k nearest of each row, ties to the earlier step.

    Rows with fewer than k candidates are filled with step 0 at distance inf.
    """
    if k == 1:
        best = torch.full((rows,), math.inf).scatter_reduce_(0, row, squared, "amin")
        hits = torch.nonzero(squared == best.index_select(0, row)).view(-1)
        at = row.index_select(0, hits)
        ids = torch.full((rows,), torch.iinfo(torch.int64).max)
        ids.scatter_reduce_(0, at, step.index_select(0, hits), "amin")
        return torch.where(best.isfinite(), ids, 0)[:, None], best[:, None]
    order = step.sort(dim=0).indices
    order = order[squared[order].sort(dim=0, stable=True).indices]
    order = order[row[order].sort(dim=0, stable=True).indices]
    row, squared, step = row[order], squared[order], step[order]
    rank = torch.arange(len(row)) - torch.searchsorted(row, torch.arange(rows)).index_select(0, row)
    keep = torch.nonzero(rank < k).view(-1)
    place = row[keep] * k + rank[keep]
    ids = torch.zeros(rows * k, dtype=torch.int64).index_copy_(0, place, step[keep])
    best = torch.full((rows * k,), math.inf).index_copy_(0, place, squared[keep])
    return ids.view(rows, k), best.view(rows, k)
