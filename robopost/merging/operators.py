# SPDX-License-Identifier: Apache-2.0
"""Merging operators as pure functions of tensors. All arithmetic is in float32 (float64 for float64 parents).

Notation: base weights t0, fine-tuned weights ti, task vectors vi = ti - t0, coefficient `alpha`. Operators are
elementwise, except that SLERP needs a norm and TIES a threshold per tensor; both take them as arguments, so that a
tensor may be merged in blocks. Inputs are never modified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from robopost.errors import ConfigError

PARALLEL = 0.9995  # |cosine| above which SLERP is linear, as in the released code
FOLDED = 0x7FFFFFFF  # bits of a float32 without its sign: ordered like the magnitudes


def working(tensor: Tensor) -> Tensor:
    """`tensor` in the precision that merging computes in: float32, float64 for float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def linear(base: Tensor, tuned: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """(1 - alpha) base + alpha tuned (RETAIN, arXiv 2512.08333; WiSE-FT); exact at 0 and 1."""
    return torch.lerp(working(base), working(tuned), alpha, out=out)


def task_arithmetic(base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The base plus sum_i weights_i (tuned_i - base) (Ilharco et al. 2023, eq. 1); below 0 a skill is removed."""
    start = working(base)
    total = start.clone()
    for other, weight in zip(tuned, weights, strict=True):
        total.add_(working(other) - start, alpha=weight)
    return total


def weighted_mean(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights_i models_i / sum_i weights_i; equal weights are a uniform soup (Wortsman et al. 2022)."""
    total = sum(weights)
    if total == 0:
        raise ConfigError(f"weights={list(weights)} sum to 0. Fix: positive weights")
    first, *rest = models
    result = working(first) * (weights[0] / total)
    for model, weight in zip(rest, weights[1:], strict=True):
        result.add_(working(model), alpha=weight / total)
    return result


def continual_weights(alpha: float, count: int) -> list[float]:
    """Share of each of [base, tuned_1 .. tuned_n] after n merges in sequence, each by `alpha`.

    (1 - a)^n of the base and a (1 - a)^(n - i) of the i-th fine-tuned model (RETAIN, section on continual merging).
    """
    return [(1 - alpha) ** count, *(alpha * (1 - alpha) ** (count - i) for i in range(1, count + 1))]


def continual(base: Tensor, tuned: Sequence[Tensor], alpha: float) -> Tensor:
    """What merging `tuned` one after another gives: t <- (1 - alpha) t + alpha tuned_i."""
    return weighted_mean([base, *tuned], continual_weights(alpha, len(tuned)))


def slerp(a: Tensor, b: Tensor, t: float, angle: tuple[float, float, float] | None = None) -> Tensor:
    """Spherical interpolation sin((1-t)W)/sin W a + sin(tW)/sin W b, W the angle between the whole tensors.

    Args:
        a: at t = 0.
        b: at t = 1.
        t: position on the arc.
        angle: (a.b, |a|^2, |b|^2) of the whole tensors where `a` and `b` are blocks of them; default: of `a` and `b`.
    """
    if t in (0.0, 1.0):
        return working(b if t else a).clone()
    dot, norm_a, norm_b = products(a, b) if angle is None else angle
    cosine = dot / math.sqrt(norm_a * norm_b) if norm_a > 0 and norm_b > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return linear(a, b, t)
    omega = math.acos(cosine)
    first, second = (math.sin(part * omega) / math.sin(omega) for part in (1 - t, t))
    return (working(a) * first).add_(working(b), alpha=second)


def products(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """(a.b, |a|^2, |b|^2) with sums in float64; those of blocks add up."""
    first, second = a.reshape(-1).double(), b.reshape(-1).double()
    return float(first @ second), float(first @ first), float(second @ second)


def ties(
    base: Tensor,
    tuned: Sequence[Tensor],
    scale: float,
    keep: float,
    thresholds: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """TIES (Yadav et al. 2023, algorithm 1): trim, elect a sign, mean of the entries that agree with it.

    Args:
        base: t0.
        tuned: fine-tuned weights.
        scale: lambda, multiplies the merged task vector.
        keep: share of the entries of each task vector that is kept, largest magnitudes first, in (0, 1].
        thresholds: smallest magnitude kept per task vector where tensors are blocks; default: of these tensors.
        weights: of the task vectors in the election and in the mean, default 1.
    """
    start = working(base)
    total, mass = torch.zeros_like(start), torch.zeros_like(start)
    weights = [1.0] * len(tuned) if weights is None else weights
    vectors = [working(other) - start for other in tuned]
    if thresholds is None:
        thresholds = [threshold(lambda v=v: iter([v]), v.numel(), keep) for v in vectors]
    kept = [v.where(v.abs() >= cut, 0.0) for v, cut in zip(vectors, thresholds, strict=True)]
    for vector, weight in zip(kept, weights, strict=True):
        total.add_(vector, alpha=weight)
    sign = total.sign()
    total.zero_()
    for vector, weight in zip(kept, weights, strict=True):
        agrees = (vector.sign() == sign) & (vector != 0)
        total.add_(vector.where(agrees, 0.0), alpha=weight)
        mass.add_(agrees, alpha=weight)
    return start + scale * total / mass.where(mass != 0, 1.0)


def threshold(blocks: Callable[[], object], count: int, keep: float) -> float:
    """The ceil(keep * count)-th largest magnitude of a vector that is given in blocks, exactly.

    Radix selection over the bits of |v|, which are ordered like the values: one pass for the upper 16 bits, one for
    the lower. Memory: two histograms. Entries that tie with the threshold are all kept.

    Args:
        blocks: called once per pass; gives an iterator over the blocks of the vector.
        count: entries of the vector.
        keep: share to keep, in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep={keep} must lie in (0, 1]: the share of each task vector that TIES keeps")
    rank = math.ceil(keep * count - 1e-9)
    if rank >= count:
        return 0.0
    prefix = 0
    for shift in (16, 0):
        histogram = np.zeros(1 << 16, np.int64)
        for block in blocks():  # type: ignore[attr-defined]
            bits = block.reshape(-1).float().contiguous().numpy().view(np.uint32) & FOLDED
            if shift == 0:
                bits = bits[(bits >> 16) == prefix]
            histogram += np.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        above = histogram[::-1].cumsum()
        place = int(np.searchsorted(above, rank))
        digit = (1 << 16) - 1 - place
        rank -= int(above[place - 1]) if place else 0
        prefix = digit if shift else (prefix << 16) | digit
    return float(np.array([prefix], np.uint32).view(np.float32)[0])


def dare(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    drop: float,
    seeds: Sequence[int],
    first: int = 0,
) -> Tensor:
    """The base plus sum_i weights_i m_i (tuned_i - base) / (1 - drop) (Yu et al. 2024, eq. 2).

    m_i is 0 with probability `drop`, else 1.

    Args:
        base: t0.
        tuned: fine-tuned weights.
        weights: one per fine-tuned model.
        drop: share of the entries of each task vector that is dropped, in [0, 1).
        seeds: of the masks, one per fine-tuned model.
        first: index of the first entry where tensors are blocks: masks don't depend on how a tensor is cut.
    """
    if not 0 <= drop < 1:
        raise ConfigError(
            f"drop={drop} must lie in [0, 1): the share of each task vector that DARE sets to 0"
        )
    start = working(base)
    total = start.clone()
    for other, weight, seed in zip(tuned, weights, seeds, strict=True):
        kept = torch.from_numpy(uniforms(seed, first, start.numel()) >= drop).view(start.shape)
        total.add_((working(other) - start) * kept, alpha=weight / (1 - drop))
    return total


def uniforms(seed: int, first: int, count: int) -> np.ndarray:
    """Numbers first .. first + count - 1 of stream `seed`: uniform float64 in [0, 1), by a counter (splitmix64).

    A counter instead of a generator: any block of a tensor gets its numbers without those before it.
    """
    x = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(seed)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fisher(models: Sequence[Tensor], information: Sequence[Tensor]) -> Tensor:
    """sum_i F_i t_i / sum_i F_i per parameter (Matena and Raffel 2022, eq. 4).

    F_i >= 0 is the diagonal Fisher information of model i.

    Where no model has any information the plain mean is taken.
    """
    mass = torch.zeros_like(working(information[0]))
    total = torch.zeros_like(mass)
    for model, info in zip(models, information, strict=True):
        total.addcmul_(working(model), working(info))
        mass.add_(working(info))
    plain = weighted_mean(models, [1.0] * len(models))
    return torch.where(mass > 0, total / mass.where(mass > 0, 1.0), plain)


def greedy_soup(
    scores: Sequence[float], evaluate: Callable[[list[int]], float]
) -> tuple[list[int], list[tuple[list[int], float]]]:
    """Greedy soup (Wortsman et al. 2022, recipe 1): best first, a model stays where the average does not get worse.

    Args:
        scores: validation score per model, higher is better.
        evaluate: validation score of the uniform average of the models with these indices.

    Returns:
        (indices of the soup, what was tried as (indices, score)).
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen, best = order[:1], scores[order[0]]
    tried = [(list(chosen), best)]
    for index in order[1:]:
        score = evaluate([*chosen, index])
        tried.append(([*chosen, index], score))
        if score >= best:
            chosen, best = [*chosen, index], score
    return chosen, tried
