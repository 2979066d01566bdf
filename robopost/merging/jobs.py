# SPDX-License-Identifier: Apache-2.0
"""How each tensor of a plan is computed, block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from robopost.merging import operators
from robopost.merging.plan import Plan
from robopost.merging.stream import Job, Source


def job(plan: Plan, name: str) -> Job:
    """How `name` is computed. Ends are copies of a parent: exact in every dtype."""
    config, sources = plan.config, plan.sources[name]
    if name in plan.copied:
        return Job(sources)
    alpha, method = plan.alphas[name], config.method
    if alpha == 0.0:
        return Job(sources[:1])
    if alpha == 1.0 and (method in ("linear", "slerp") or (method == "soup" and len(config.finetuned) == 1)):
        return Job(sources[1:2])
    if method == "continual" and alpha == 1.0:
        return Job(sources[-1:])
    return Job(sources, _combine(plan, name, alpha))


def _combine(plan: Plan, name: str, alpha: float) -> Callable[[Sequence[Tensor], int, Tensor], object]:
    config = plan.config
    count = len(config.finetuned)
    weights = config.weights or [1.0] * count
    scaled = [alpha * weight for weight in weights]

    def unchanged(blocks: Sequence[Tensor], out: Tensor) -> bool:
        # What no parent has changed stays as it is to the last bit.
        if all(torch.equal(blocks[0], other) for other in blocks[1 : count + 1]):
            out.copy_(blocks[0])
            return True
        return False

    def linear(blocks: Sequence[Tensor], first: int, out: Tensor) -> None:
        if out.dtype == blocks[0].dtype == blocks[1].dtype == torch.float32:
            operators.linear(blocks[0], blocks[1], alpha, out)
        else:
            out.copy_(operators.linear(blocks[0], blocks[1], alpha))

    if config.method == "linear":
        return linear
    function = _elementwise(plan, name, alpha, scaled, weights)

    def combine(blocks: Sequence[Tensor], first: int, out: Tensor) -> None:
        if not unchanged(blocks, out):
            out.copy_(function(blocks, first))

    return combine


def _elementwise(
    plan: Plan, name: str, alpha: float, scaled: list[float], weights: list[float]
) -> Callable[[Sequence[Tensor], int], Tensor]:
    config, count = plan.config, len(plan.config.finetuned)
    method = config.method
    if method == "task_arithmetic":
        return lambda blocks, first: operators.task_arithmetic(blocks[0], blocks[1:], scaled)
    if method in ("soup", "greedy_soup"):
        return lambda blocks, first: operators.linear(
            blocks[0], operators.weighted_mean(blocks[1:], weights), alpha
        )
    if method == "continual":
        return lambda blocks, first: operators.continual(blocks[0], blocks[1:], alpha)
    if method == "fisher":
        return lambda blocks, first: operators.linear(
            blocks[0], operators.fisher(blocks[: count + 1], blocks[count + 1 :]), alpha
        )
    if method == "dare":
        stem = plan.tied.get(name, name)
        seeds = [_seed(config.seed, stem, i) for i in range(count)]
        return lambda blocks, first: operators.dare(blocks[0], blocks[1:], scaled, config.drop, seeds, first)
    if method == "slerp":
        angle = _angle(plan.sources[name])
        return lambda blocks, first: operators.slerp(blocks[0], blocks[1], alpha, angle)
    cuts = [_threshold(plan.sources[name], i + 1, config.keep) for i in range(count)]
    return lambda blocks, first: operators.ties(blocks[0], blocks[1:], alpha, config.keep, cuts, weights)


def _seed(seed: int, name: str, parent: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}:{parent}".encode()).digest()[:8], "little")


def _angle(sources: Sequence[Source]) -> tuple[float, float, float]:
    """Products of two whole tensors, one block at a time."""
    (a, first), (b, second) = sources[:2]
    parts = [
        operators.products(x, y) for x, y in zip(a.blocks(first.name), b.blocks(second.name), strict=True)
    ]
    dot, one, two = (sum(part[i] for part in parts) for i in range(3))
    return dot, one, two


def _threshold(sources: Sequence[Source], parent: int, keep: float) -> float:
    (a, first), (b, second) = sources[0], sources[parent]

    def blocks() -> Iterator[Tensor]:
        for x, y in zip(a.blocks(first.name), b.blocks(second.name), strict=True):
            yield operators.working(y) - operators.working(x)

    return operators.threshold(blocks, first.count, keep)
