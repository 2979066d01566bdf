# SPDX-License-Identifier: Apache-2.0
"""Search of one dataset's pairs on a CPU: leaf lists first, the whole tree for what they can't certify."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robopost.data.neighbour_lists import BINS, ID_BITS, STEPS_OF_RADIUS, Lists
from robopost.data.neighbour_tree import FAN, LEAF, Tree, gap

MARGIN = 1e-5  # relative, on squared distances: bounds never rule out a pair for rounding
PAIRS = 1 << 18  # (query, node) pairs the fallback holds at once
NODE_COST = 128  # of a node the tree visits, in pairs swept by a matrix product (measured)
SWEPT = 4096  # pairs per product, so that it stays in cache
BLOCK = 64  # pairs per minimum of a sweep
ROUNDING = 2.0**-18  # of a product of 50 float32 terms, relative to the norms


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

    def at(self, rows: Tensor | slice) -> Keys:
        """Some of the queries."""
        return Keys(self.state[rows], self.action[rows], self.beta, self.k)


@dataclass
class Leaves:
    """Candidates in order of queries: row, leaf, and a lower bound of beta^2 |s - s_j|^2, (P,) each."""

    row: Tensor
    leaf: Tensor
    near: Tensor

    def at(self, keep: Tensor) -> Leaves:
        """Some of the candidates."""
        return Leaves(*(values.index_select(0, keep) for values in (self.row, self.leaf, self.near)))


class ListSearch:
    """Exact search by lists, then by tree; see `robopost.data.neighbours`."""

    def __init__(self, state: Tensor, action: Tensor, tree: Tree, lists: Lists) -> None:
        self.state, self.action = state, action
        self.tree, self.lists = tree, lists

    def __call__(self, steps: Tensor, action: Tensor, beta: float, k: int, *, exact: bool = True) -> Found:
        """The k nearest of (state of `steps` (B,), `action` (B, A)); see `Neighbours.lookup`."""
        keys = Keys(self.state.index_select(0, steps), action, beta, k)
        own = (action - self.action.index_select(0, steps)).square().sum(1)
        bound = own if k == 1 else self._seed(steps, keys)
        ids, squared = self._score(keys, self._listed(steps, bound, beta), bound)
        if k == 1:  # without a list at least the step's own pair is known
            found = squared.isfinite()
            ids, squared = torch.where(found, ids, steps[:, None]), torch.where(found, squared, own[:, None])
        certified = squared[:, -1] * (1 + MARGIN) <= (beta * self.lists.radius) ** 2
        # Without a certificate; or, where that is enough, with fewer than k pairs on the list.
        asked = ~certified if exact else ~squared[:, -1].isfinite()
        rows = torch.nonzero(asked).view(-1)
        if len(rows):
            ids[rows], squared[rows] = self._descend(keys.at(rows), bound[rows], ids[rows], squared[rows])
        return Found(ids, squared, certified, asked)

    def _seed(self, steps: Tensor, keys: Keys) -> Tensor:
        """(B,) squared distance of the k-th nearest of the steps around each row's own: an upper bound."""
        count = len(self.state)
        span = min(max(2 * keys.k, LEAF), count)
        first = (steps - span // 2).clamp(min=0, max=count - span)
        step = (first[:, None] + torch.arange(span)).view(-1)
        row = torch.arange(len(steps)).repeat_interleave(span)
        squared = pair_distance(self.state, self.action, keys, row, step)
        return squared.view(-1, span).kthvalue(keys.k, dim=1).values

    def _listed(self, steps: Tensor, bound: Tensor, beta: float) -> Leaves:
        """All listed leaves whose states can be within `bound` (B,)."""
        lists = self.lists
        last = torch.full_like(steps, BINS - 1)
        if beta * lists.radius > 0:
            level = (bound * (1 + MARGIN)).sqrt_() * (STEPS_OF_RADIUS / (beta * lists.radius))
            last = (level.clamp_(max=STEPS_OF_RADIUS - 1).long() * BINS).div_(
                STEPS_OF_RADIUS, rounding_mode="floor"
            )
        size = lists.count.index_select(0, steps * BINS + last).long()
        end = size.cumsum(0)
        total = int(end[-1])
        row = torch.repeat_interleave(torch.arange(len(steps)), size, output_size=total)
        place = torch.arange(total) + (lists.start.index_select(0, steps) - end + size).index_select(0, row)
        entry = lists.entries.index_select(0, place)
        near = ((entry >> ID_BITS) * (beta * lists.radius / STEPS_OF_RADIUS)).square_()
        return Leaves(row, entry & ((1 << ID_BITS) - 1), near)

    def _score(self, keys: Keys, found: Leaves, bound: Tensor) -> tuple[Tensor, Tensor]:
        """The k nearest pairs (B, k) of the candidates, of those no further than `bound` (B,) squared."""
        tree, width = self.tree, self.tree.width
        boxes = tree.levels[-1]
        action = keys.action.index_select(0, found.row)
        centre, half = (v.index_select(0, found.leaf) for v in (boxes.action, boxes.action_half))
        apart = gap(action, centre, half).add_(found.near)
        if keys.k <= width:
            bound = torch.minimum(bound, self._probe(keys, found, apart))
        limit = bound * (1 + MARGIN) + 1e-12
        found = found.at(torch.nonzero(apart < limit.index_select(0, found.row)).view(-1))
        block = tree.action.index_select(0, found.leaf).view(-1, action.shape[1], width)
        apart = (block - keys.action.index_select(0, found.row)[:, :, None]).square_().sum(1)
        least = (limit.index_select(0, found.row) - found.near)[:, None]
        pair = torch.nonzero((apart < least).view(-1)).view(-1)
        which = pair.div(width, rounding_mode="floor")
        place = found.leaf.index_select(0, which).long() * width + (pair - which * width)
        row = found.row.index_select(0, which)
        away = tree.state.index_select(0, place).sub_(keys.state.index_select(0, row)).square_().sum(1)
        squared = away.mul_(keys.beta * keys.beta).add_(apart.view(-1).index_select(0, pair))
        return nearest(row, squared, tree.steps.view(-1).index_select(0, place), len(keys), keys.k)

    def _probe(self, keys: Keys, found: Leaves, apart: Tensor) -> Tensor:
        """(B,) an upper bound of the k-th squared distance, from the leaf with the smallest lower bound."""
        tree, rows = self.tree, len(keys)
        least = torch.full((rows,), math.inf).scatter_reduce_(0, found.row, apart, "amin")
        first = torch.nonzero(apart == least.index_select(0, found.row)).view(-1)
        chosen = torch.full((rows,), -1, dtype=found.leaf.dtype)
        chosen.index_copy_(0, found.row.index_select(0, first), found.leaf.index_select(0, first))
        held = torch.nonzero(chosen >= 0).view(-1)
        pick = chosen.index_select(0, held).long()
        block = tree.action.index_select(0, pick).view(-1, keys.action.shape[1], tree.width)
        away = (block - keys.action.index_select(0, held)[:, :, None]).square_().sum(1)
        # One pair is enough where one is asked for; its state is far off in memory.
        away, column = away.topk(keys.k if keys.k == 1 else tree.width, largest=False)
        place = (pick[:, None] * tree.width + column).view(-1)
        state = keys.state.index_select(0, held).repeat_interleave(column.shape[1], 0)
        state = tree.state.index_select(0, place).sub_(state).square_().sum(1).view(column.shape)
        away = away.add_(state.mul_(keys.beta * keys.beta)).kthvalue(keys.k, dim=1).values
        return torch.full((rows,), math.inf).index_copy_(0, held, away)

    def _descend(self, keys: Keys, bound: Tensor, ids: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        """The k nearest of everything, given the k best of the lists: a search of the tree from its root.

        Leaves that aren't listed are at least `radius` away, and so are, for this purpose, their ancestors.
        """
        levels, square = self.tree.levels, keys.beta * keys.beta
        bound = torch.minimum(bound, squared[:, -1])
        floor, limit = square * self.lists.radius**2, bound * (1 + MARGIN) + 1e-12
        first = len(levels[0].action)
        row = torch.arange(len(keys)).repeat_interleave(first)
        node, near = torch.arange(first).repeat(len(keys)), torch.zeros(0)
        for depth, boxes in enumerate(levels):
            if depth:
                row = row.repeat_interleave(2**FAN)
                node = (node[:, None] * 2**FAN + torch.arange(2**FAN)).view(-1)
            if len(row) > PAIRS and len(keys) > 1:
                half = len(keys) // 2
                parts = [slice(0, half), slice(half, None)]
                found = [self._descend(keys.at(p), bound[p], ids[p], squared[p]) for p in parts]
                return torch.cat([one[0] for one in found]), torch.cat([one[1] for one in found])
            apart = gap(keys.action[row], boxes.action[node], boxes.action_half[node])
            keep = torch.nonzero(apart + floor < limit[row]).view(-1)
            row, node, apart = row[keep], node[keep], apart[keep]
            near = (
                gap(keys.state[row], boxes.state[node], boxes.state_half[node]).mul_(square).clamp_(min=floor)
            )
            keep = torch.nonzero(apart + near < limit[row]).view(-1)
            row, node, near = row[keep], node[keep], near[keep]
            if len(row) * 2**FAN * NODE_COST > len(keys) * len(self.state) and depth < len(levels) - 1:
                return merge(ids, squared, *self._sweep(keys, limit))
        return merge(ids, squared, *self._score(keys, Leaves(row, node, near), bound))

    def _sweep(self, keys: Keys, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The k nearest pairs within `limit` (B,): all of them, by matrix products where a tree rules out little.

        A block of pairs is scored in difference form where its smallest product, less what rounding can have
        added, is within the limit.
        """
        query = torch.cat([keys.state * keys.beta, keys.action, torch.ones(len(keys), 1)], 1)
        size = query[:, :-1].square().sum(1)
        rows, steps = [], []
        for first in range(0, len(self.state), SWEPT):
            part = slice(first, first + SWEPT)
            pairs = torch.cat([self.state[part] * keys.beta, self.action[part]], 1)
            norm = pairs.square().sum(1, keepdim=True)
            holes = -len(pairs) % BLOCK
            table = torch.nn.functional.pad(torch.cat([pairs * -2, norm], 1), (0, 0, 0, holes), value=0.0)
            if holes:
                table[-holes:, -1] = math.inf
            least = (query @ table.t()).view(len(keys), -1, BLOCK).amin(2)
            slack = ROUNDING * (size + norm.max())
            row, block = torch.nonzero(least + size[:, None] <= (limit + slack)[:, None], as_tuple=True)
            if len(row):
                step = (first + block[:, None] * BLOCK + torch.arange(BLOCK)).view(-1)
                rows.append(row.repeat_interleave(BLOCK))
                steps.append(step)
        if not rows:
            empty = torch.zeros(0, dtype=torch.int64)
            return nearest(empty, torch.zeros(0), empty, len(keys), keys.k)
        row, step = torch.cat(rows), torch.cat(steps)
        real = torch.nonzero(step < len(self.state)).view(-1)
        row, step = row[real], step[real]
        squared = pair_distance(self.state, self.action, keys, row, step)
        near = torch.nonzero(squared <= limit[row]).view(-1)
        return nearest(row[near], squared[near], step[near], len(keys), keys.k)


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


def merge(ids: Tensor, squared: Tensor, more: Tensor, away: Tensor) -> tuple[Tensor, Tensor]:
    """The k nearest of two answers (B, k), a step that is in both counted once."""
    k = ids.shape[1]
    twice = (more[:, :, None] == ids[:, None]) & squared.isfinite()[:, None]
    away = away.masked_fill(twice.any(2), math.inf)
    step, order = torch.cat([ids, more], 1).sort(dim=1, stable=True)
    squared, best = torch.cat([squared, away], 1).gather(1, order).sort(dim=1, stable=True)
    return step.gather(1, best[:, :k]), squared[:, :k]
