# SPDX-License-Identifier: Apache-2.0
"""The effect that merging is for, on a small regression problem: better out of distribution than both parents."""

import math

import pytest
import torch
from torch import nn

from robopost.merging import operators

SEEDS = 3
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


class Tasks:
    """Six related functions of 4-D inputs, the same in every run; the last one is new. A one-hot vector names them."""

    def __init__(self, seed):
        family = torch.Generator().manual_seed(6)
        self.shared = 1.3 * torch.randn(4, 8, generator=family)
        self.mix = 1.0 + 0.8 * torch.randn(6, 8, generator=family)
        self.phase = torch.randn(6, generator=family)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, task, count, low=-1.0, noise=0.0):
        x = low + (1.0 - low) * torch.rand(count, 4, generator=self.generator)
        y = (self.mix[task] * torch.sin(x @ self.shared + self.phase[task])).sum(
            -1, keepdim=True
        ) / math.sqrt(8)
        y += noise * torch.randn(count, 1, generator=self.generator)
        code = torch.zeros(count, 6)
        code[:, task] = 1.0
        return torch.cat([x, code], -1), y


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))


def fit(net, batches, lr=1e-3):
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    for x, y in batches:
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def study(seed, co=False):
    """Mean squared errors (new task out of distribution, old tasks) at each alpha."""
    tasks = Tasks(seed)
    old = [tasks.draw(task, 2000) for task in range(5)]
    x, y = (torch.cat(part) for part in zip(*old, strict=True))
    pick = lambda count: torch.randint(len(x), (count,), generator=tasks.generator)  # noqa: E731
    base = network(seed)
    fit(base, ((x[i], y[i]) for i in (pick(256) for _ in range(1000))))
    fit(base, ((x[i], y[i]) for i in (pick(256) for _ in range(300))), lr=2e-4)
    corner = tasks.draw(5, 64, low=0.15, noise=0.1)
    tuned = network(seed)
    tuned.load_state_dict(base.state_dict())
    mixed = (
        (torch.cat([corner[0], x[i]]), torch.cat([corner[1], y[i]])) for i in (pick(192) for _ in range(500))
    )
    fit(tuned, mixed if co else (corner for _ in range(500)))
    outside = tasks.draw(5, 4000)
    seen = tuple(torch.cat(part) for part in zip(*(tasks.draw(t, 1000) for t in range(5)), strict=True))
    curve = []
    for alpha in GRID:
        merged = network(seed)
        first, second = base.state_dict(), tuned.state_dict()
        merged.load_state_dict({k: operators.linear(first[k], second[k], alpha) for k in first})
        with torch.no_grad():
            curve.append(tuple(float((merged(a) - b).square().mean()) for a, b in (outside, seen)))
    return curve


@pytest.fixture(scope="module")
def curves():
    return [study(seed) for seed in range(SEEDS)]


def test_the_merge_beats_both_parents_out_of_distribution(curves):
    at = GRID.index(0.75)
    for seed, curve in enumerate(curves):
        errors = [point[0] for point in curve]
        assert errors[at] < min(errors[0], errors[-1]), (seed, errors)


def test_the_merge_keeps_more_of_the_old_tasks_than_fine_tuning(curves):
    for curve in curves:
        old = [point[1] for point in curve]
        assert old[0] < 0.02
        assert old[-1] > 10 * old[0]
        assert old[0] < old[2] < 0.6 * old[-1]
        assert old == sorted(old)


def test_co_fine_tuning_keeps_the_old_tasks_at_every_alpha(curves):
    for point in study(0, co=True):
        assert point[1] < 0.03
