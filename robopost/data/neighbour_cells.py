# SPDX-License-Identifier: Apache-2.0
"""For every dataset step, the pairs that can be nearest to its state with some action: cells of a power diagram.

With the state s_i given, the squared distance from an action a to pair j is w_ij + |a - a_j|^2, w_ij = beta^2
|s_i - s_j|^2. So actions are divided among the pairs as in a power diagram (Aurenhammer 1987) with weights -w_ij.
Pair m beats pair j for all actions of the box [-1, 1]^A exactly if

    w_im + |a_m|^2 + 2 |a_j - a_m|_1  <  w_ij + |a_j|^2,

since |a - a_m|^2 - |a - a_j|^2 is linear in a. A pair that k others beat is never among the k nearest. What is
left are a few dozen to a few hundred pairs of a million: the list of step i, exact for every action of the box.

Rows are taken in compact groups (k-means). Around a group no pair can matter that is further from a row than the
`reach` at which k members of its group beat whatever is out there; the rest is thinned by the rule above.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robopost.progress import progress_bar

log = logging.getLogger(__name__)
GROUP = 256  # rows per group, on average
SUBGROUP = 16  # rows that share a matrix of distances
RIVALS = (7, 64)  # pairs that all others have to stand up to, first a few (k more), then many
SEEN = 16  # times the longest list: candidates of a row that are looked at
DENSE = 1 << 22  # distances held at once
SLACK = 1e-4  # relative, on reaches: what differences to a group's centre round
TIE = 1e-5  # relative, on scores: pairs that are as good as equal stay
SAMPLE = 16  # rows per centre that k-means learns from
ROUNDS = 5  # of k-means
ENTRY = 8  # bytes: int32 step, float32 weight
EARLY = 1000  # steps after which a build can say that it isn't worth it

Write = Callable[[Tensor, Tensor], None]


def rounding(terms: int) -> float:
    """Of a float32 product of so many terms, relative to the norms; at least 2^-18, which covers 64."""
    return max(64, terms) * 2.0**-24


@dataclass
class Cells:
    """Per step i the pairs that can be among the k nearest of (s_i, a), nearest state first.

    Attributes:
        start: (N,) int64, where each step's list begins.
        count: (N,) int32, its length.
        limit: (N,) float32, pairs that were cut off have w_ij >= limit; inf where none was.
        step: (E,) int32, the pairs' dataset steps.
        near: (E,) float32, w_ij = beta^2 |s_i - s_j|^2, ascending within a list.
    """

    start: Tensor
    count: Tensor
    limit: Tensor
    step: Tensor
    near: Tensor

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


@dataclass
class _Pairs:
    """Candidates: states (P, S), actions (P, A), dataset steps (P,), ascending."""

    state: Tensor
    action: Tensor
    step: Tensor

    def __post_init__(self) -> None:
        self.size = self.action.square().sum(1)
        # Of states, as the expanded square needs it, rounding taken off: distances never come out too large.
        self.less = 1 - rounding(self.state.shape[1])
        self.norm = self.state.square().sum(1).mul_(self.less)


def build_cells(
    state: Tensor, action: Tensor, beta: float, k: int, most: int, write: Write
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the lists of all steps, group by group.

    Args:
        state: (N, S) float32 on the CPU.
        action: (N, A).
        beta: weight of the state; 0 makes all lists the same whole dataset, so that none are built.
        k: how many neighbours the lists have to answer.
        most: entries of a list that is not cut off; 0 builds no lists.
        write: takes each group's entries, (step, near).

    Returns:
        `start`, `count` and `limit` of `Cells`.
    """
    rows = len(state)
    start, count = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    limit = torch.zeros(rows)
    if beta == 0 or most == 0:
        return start, count, limit
    generator = torch.Generator().manual_seed(0)
    step = first_copies(state, action, k)
    pairs = _Pairs(state[step], action[step], step)
    groups = compact(state, GROUP, generator)
    written, done, warned = 0, 0, False
    with progress_bar("nearest neighbours", rows) as report:
        for group in groups:
            lists = list(_group(state, action, group, pairs, beta * beta, k, most, generator))
            sizes = torch.tensor([len(near) for _, _, near, _ in lists])
            at = torch.tensor([row for row, *_ in lists])
            start[at] = written + sizes.cumsum(0) - sizes
            count[at] = sizes.int()
            limit[at] = torch.tensor([cut for *_, cut in lists])
            write(
                torch.cat([ids for _, ids, _, _ in lists]).int(), torch.cat([near for _, _, near, _ in lists])
            )
            written += int(sizes.sum())
            done += len(group)
            report(done)
            if not warned and done >= EARLY and (limit[at] < math.inf).float().mean() > 0.5:
                warned = True
                log.warning(
                    "most lists are cut off: beta=%g is small for these states, and building takes long. "
                    "Fix: algo.list_bytes=0, which scores all pairs in every search",
                    beta,
                )
    return start, count, limit


def first_copies(state: Tensor, action: Tensor, k: int) -> Tensor:
    """Steps whose pair is one of its first k copies, ascending: later copies lose every tie."""
    both = np.ascontiguousarray(torch.cat([state, action], 1).numpy() + np.float32(0))  # -0 becomes 0
    rows = both.view(np.dtype((np.void, both.shape[1] * 4))).ravel()
    _, number, copies = np.unique(rows, return_inverse=True, return_counts=True)
    order = np.argsort(number, kind="stable")
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
    return torch.from_numpy(np.flatnonzero(rank < k))


def compact(x: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Rows of x (N, D) in groups of about `size`, none above four times that, that are close: by k-means."""
    groups = max(len(x) // size, 1)
    if groups == 1:
        return [torch.arange(len(x))]
    sample = x[torch.randperm(len(x), generator=generator)[: groups * SAMPLE]]
    centre = sample[torch.randperm(len(sample), generator=generator)[:groups]]
    for _ in range(ROUNDS):
        label = _closest(sample, centre)
        share = torch.bincount(label, minlength=groups)[:, None]
        mean = torch.zeros_like(centre).index_add_(0, label, sample).div_(share.clamp_min(1))
        centre = torch.where(share > 0, mean, centre)
    label = _closest(x, centre)
    sizes = torch.bincount(label, minlength=groups)
    parts = label.argsort(stable=True).split(sizes.tolist())
    return [piece for part in parts if len(part) for piece in part.split(4 * size)]


def _closest(x: Tensor, centre: Tensor) -> Tensor:
    """(N,) the nearest centre of each row."""
    norm = centre.square().sum(1)
    return torch.cat([torch.addmm(norm, part, centre.t(), alpha=-2).argmin(1) for part in x.split(2048)])


def _group(
    state: Tensor,
    action: Tensor,
    group: Tensor,
    pairs: _Pairs,
    square: float,
    k: int,
    most: int,
    generator: torch.Generator,
) -> Iterator[tuple[int, Tensor, Tensor, float]]:
    """(row, steps, weights, limit) of every row of a group; `square` is beta^2."""
    middle = state[group].mean(0)
    x = state[group] - middle
    norm = x.square().sum(1)
    reach = _reach(x, norm, action[group], square, k)
    away = torch.addmv(pairs.norm, pairs.state, middle, alpha=-2).add_(middle.square().sum() * pairs.less)
    edge = (norm.sqrt() + reach).amax()
    near = torch.nonzero(away <= edge * edge * (1 + SLACK)).view(-1)
    local = _Pairs(pairs.state[near] - middle, pairs.action[near], pairs.step[near])
    for part in compact(x, SUBGROUP, generator):
        centre = x[part].mean(0)
        edge = ((x[part] - centre).square().sum(1).sqrt() + reach[part]).amax()
        away = torch.addmv(local.norm, local.state, centre, alpha=-2)
        column = torch.nonzero(away <= edge * edge * (1 + SLACK) - centre.square().sum() * pairs.less).view(
            -1
        )
        found = _Pairs(local.state[column], local.action[column], local.step[column])
        for rows in part.split(max(1, DENSE // max(1, len(column)))):
            short = torch.addmm(found.norm, x[rows], found.state.t(), alpha=-2)
            short += norm[rows][:, None] * pairs.less
            held = short <= (reach[rows].square() * (1 + SLACK))[:, None]
            counts = held.sum(1).tolist()
            place = torch.nonzero(held.view(-1)).view(-1)
            score = short.view(-1).index_select(0, place).mul_(square)
            index = place.remainder_(len(column))
            slack = 4 * (1 - pairs.less) * square * float(norm[rows].amax() + found.norm.amax())
            parts = zip(rows.tolist(), index.split(counts), score.split(counts), strict=True)
            for row, mine, weight in parts:
                kept, cut = _thinned(found, mine, weight, slack, k, most)
                step = found.step[kept]
                exact = (state[step] - state[group[row]]).square_().sum(1).mul_(square)
                exact, order = exact.sort(stable=True)
                if len(order) > most:
                    cut = min(cut, float(exact[most]))
                    exact, order = exact[:most].clone(), order[:most]
                yield int(group[row]), step[order], exact, cut


def _reach(x: Tensor, norm: Tensor, action: Tensor, square: float, k: int) -> Tensor:
    """(G,) state distance beyond which k members of the group beat any pair, whatever its action."""
    if len(x) < k:
        return torch.full((len(x),), math.inf)
    weight = torch.addmm(norm, x, x.t(), alpha=-2).add_(norm[:, None]).clamp_min_(0).mul_(square)
    weight += 2 * rounding(x.shape[1]) * square * norm.amax()
    furthest = (1 + action.abs()).square().sum(1)  # of the box's actions from this one
    return (weight + furthest).kthvalue(k, dim=1).values.mul_((1 + SLACK) / square).sqrt_()


def _thinned(
    pairs: _Pairs, index: Tensor, weight: Tensor, slack: float, k: int, most: int
) -> tuple[Tensor, float]:
    """Which of some pairs of a row no k others beat, and from which weight on pairs were left out unseen.

    Args:
        pairs: of the subgroup.
        index: (P,) of the row's candidates in `pairs`, ascending.
        weight: (P,) their w_ij, up to `slack` too small.
        slack: rounding of the weights.
        k: how many others.
        most: entries of a list: many times more candidates are not looked at.
    """
    cut = math.inf
    seen = SEEN * most
    if len(index) > seen:
        least, order = weight.topk(seen + 1, largest=False)
        cut = float(least[-1])
        chosen = order[:-1].sort().values
        index, weight = index[chosen], weight[chosen]
    action = pairs.action.index_select(0, index)
    score = weight + pairs.size.index_select(0, index)
    for rivals in RIVALS:
        count = min(rivals + k, len(score))
        if count < k:
            break
        best = score.topk(count, largest=False, sorted=False).indices
        beaten = torch.cdist(action.index_select(0, best), action, p=1.0).mul_(2)
        beaten += score.index_select(0, best)[:, None]
        bound = beaten.amin(0) if k == 1 else beaten.kthvalue(k, dim=0).values
        left = torch.nonzero(score <= bound * (1 + TIE) + slack).view(-1)
        index, action, score = (values.index_select(0, left) for values in (index, action, score))
    return index, cut
