# SPDX-License-Identifier: Apache-2.0
"""A balanced tree over state-action pairs whose leaves hold about 16 of them, with boxes around all nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAF = 16  # pairs a leaf holds at most
FAN = 4  # levels of the binary tree between two levels that keep boxes: 16 children
# Of a state's spread against an action's when a split is chosen. Below 1, leaves are narrow in their actions,
# which is what rules them out at query time; measured on HalfCheetah: 1 costs a third more, 0.1 as much memory.
STATE_WEIGHT = 0.5
FAR = 1e9  # action of the padding: its distance is finite and never the smallest


@dataclass
class Boxes:
    """Axis-parallel boxes around the nodes of one level: centres and half widths of states (P, S), actions (P, A)."""

    state: Tensor
    state_half: Tensor
    action: Tensor
    action_half: Tensor


@dataclass
class Tree:
    """Pairs in leaf order.

    Attributes:
        steps: (P, m) int64, dataset step of each place, N on padding.
        state: (P * m, S) states by place, 0 on padding.
        action: (P, A * m) actions by leaf, dimension by dimension, `FAR` on padding.
        levels: boxes of levels 4, 8, ... (or fewer nodes) down to the leaves, coarse to fine; each has `2 ** FAN`
            times the nodes of the one before it.
    """

    steps: Tensor
    state: Tensor
    action: Tensor
    levels: list[Boxes]

    @property
    def leaves(self) -> int:
        """P, a power of two."""
        return self.steps.shape[0]

    @property
    def width(self) -> int:
        """m, places per leaf."""
        return self.steps.shape[1]


def split(x: Tensor, depth: int) -> Tensor:
    """Halve the rows of x (N, D) `depth` times at the median of the dimension of largest variance.

    Returns:
        (2^depth, m) int64 rows per part, N where a part is padded.
    """
    rows, parts = x.shape[0], 2**depth
    width = -(-rows // parts)
    # Padding takes part as copies of the first rows, which are marked afterwards.
    index = torch.arange(parts * width, device=x.device)
    for level in range(depth):
        index = index.view(2**level, -1)
        cloud = x[index % rows]
        dim = cloud.var(1).argmax(1)
        value = cloud.gather(2, dim[:, None, None].expand(-1, cloud.shape[1], 1)).squeeze(2)
        index = index.gather(1, value.sort(dim=1, stable=True).indices).view(-1)
    return torch.where(index < rows, index, rows).view(parts, width)


def grow(state: Tensor, action: Tensor) -> Tensor:
    """(P, m) int64 steps per leaf of a tree over states (N, S) and actions (N, A), N on padding."""
    depth = max(math.ceil(math.log2(len(state) / LEAF)), 0)
    return split(torch.cat([state * STATE_WEIGHT, action], 1), depth)


def plant(steps: Tensor, state: Tensor, action: Tensor) -> Tree:
    """The tree whose leaves hold `steps` (P, m), with its boxes."""
    leaves, width = steps.shape
    padding = steps.view(-1) == len(state)
    at = torch.where(padding, 0, steps.view(-1))
    ordered = {"state": state[at], "action": action[at]}
    levels: list[Boxes] = []
    edges = {}
    for name, values in ordered.items():
        values = values.view(leaves, width, -1)
        hole = padding.view(leaves, width, 1)
        edges[name] = (values.masked_fill(hole, FAR).amin(1), values.masked_fill(hole, -FAR).amax(1))
    while True:
        boxes = []
        for low, high in edges.values():
            # Rounded centres must not let a pair out of its box.
            centre, half = (low + high) / 2, (high - low).clamp_min(0) / 2
            empty = low > high
            half = half * (1 + 1e-6) + centre.abs() * 1e-6
            boxes += [torch.where(empty, FAR, centre), torch.where(empty, 0.0, half)]
        levels.insert(0, Boxes(*boxes))
        count = len(boxes[0])
        if count <= 2**FAN:
            break
        edges = {
            name: (low.view(count >> FAN, 2**FAN, -1).amin(1), high.view(count >> FAN, 2**FAN, -1).amax(1))
            for name, (low, high) in edges.items()
        }
    ordered["state"][padding] = 0.0
    ordered["action"][padding] = FAR
    blocks = ordered["action"].view(leaves, width, -1).transpose(1, 2).reshape(leaves, -1)
    return Tree(steps, ordered["state"], blocks, levels)


def gap(x: Tensor, centre: Tensor, half: Tensor) -> Tensor:
    """(K,) squared distances from points x (K, D), which are overwritten, to boxes (K, D)."""
    return x.sub_(centre).abs_().sub_(half).clamp_min_(0).square_().sum(1)
