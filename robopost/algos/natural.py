# SPDX-License-Identifier: Apache-2.0
"""Natural-gradient steps for G independent policies at once (Schulman et al. 2015, TRPO, arXiv 1502.05477, app. C).

Surrogate and KL separate over policies whose parameters are disjoint, so one double back-propagation of the sums
gives every policy's gradient and Fisher-vector product; conjugate gradients and the line search decide per policy,
by masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.nets import fused
from robopost.nets.rows import Rows

ACCEPT_RATIO = 0.1  # of the linear prediction that an accepted step has to reach


@dataclass(frozen=True)
class StepResult:
    """What `natural_step` did, per policy (G,).

    Attributes:
        before, after: the surrogate at the old and the new parameters.
        share: accepted part of the full step, 0 where it was refused.
        kl: mean KL(old || new).
        quadratic: step^T F step / 2, damping left out.
    """

    before: Tensor
    after: Tensor
    share: Tensor
    kl: Tensor
    quadratic: Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows: (G, P), (G, P) to (G, 1)."""
    return (a * b).sum(1, keepdim=True)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """Solve A_g x_g = b_g for every row g.

    Args:
        product: (G, P) to (G, P), applies each A_g (symmetric, positive definite) to its row.
        b: (G, P).
        iterations: at most; a row rests once its squared residual is below `tolerance`.
        tolerance: of r^T r.
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = dot(r, r)
    for _ in range(iterations):
        ap = product(p)
        active = rr >= tolerance
        alpha = torch.where(active, rr / dot(p, ap), 0.0)
        x, r = x + alpha * p, r - alpha * ap
        new = dot(r, r)
        p = torch.where(active, r + new / rr * p, p)
        rr = torch.where(active, new, rr)
    return x


@torch.compiler.disable()
def natural_step(
    rows: Rows,
    surrogate: Callable[[], Tensor],
    divergence: Callable[[], Tensor],
    *,
    max_kl: float,
    damping: float,
    iterations: int,
    backtracks: int,
    check_kl: bool = False,
) -> StepResult:
    """theta_g <- theta_g + share * d_g sqrt(2 max_kl / d_g^T (F_g + damping I) d_g),  (F_g + damping I) d_g = grad J_g.

    Args:
        rows: the policies' parameters, changed in place.
        surrogate: J (G,) at the current parameters, differentiable.
        divergence: mean KL(old || current) (G,), twice differentiable; old are the parameters at the call.
        max_kl: delta.
        damping: added to F's diagonal.
        iterations: of conjugate gradients.
        backtracks: halvings that the line search tries; it takes the first with an improvement above 0 and above
            `ACCEPT_RATIO` of the linear prediction. 0 = the full step, unseen.
        check_kl: the line search also asks for KL <= max_kl.
    """
    with torch.enable_grad():
        objective = surrogate()
        gradient = rows.join(torch.autograd.grad(objective.sum(), rows.params)).detach()
        with fused.twice_differentiable():
            apart = divergence()
        slope = rows.join(torch.autograd.grad(apart.sum(), rows.params, create_graph=True))

    def fisher(v: Tensor) -> Tensor:
        product = torch.autograd.grad((slope * v).sum(), rows.params, retain_graph=True)
        return rows.join(product)

    direction = conjugate_gradients(lambda v: fisher(v) + damping * v, gradient, iterations)
    curved = fisher(direction)
    with torch.no_grad():
        before, old = objective.detach(), rows.data.clone()
        length = dot(direction, curved) + damping * dot(direction, direction)
        scale = torch.where(length > 0, (2 * max_kl / length).sqrt(), 0.0)
        step, predicted = scale * direction, (scale * dot(gradient, direction)).squeeze(1)
        quadratic = (0.5 * scale.square() * dot(direction, curved)).squeeze(1)
        share = torch.zeros_like(before)
        if backtracks == 0:
            share = torch.ones_like(before)
            rows.set(old + step)
            return StepResult(before, surrogate(), share, divergence(), quadratic)
        for attempt in range(backtracks):
            part = 0.5**attempt
            open_ = share == 0
            rows.set(old + torch.where(open_, part, share).unsqueeze(1) * step)
            gain = surrogate() - before
            good = (gain > 0) & (gain > ACCEPT_RATIO * part * predicted)
            if check_kl:
                good &= divergence() <= max_kl
            share = torch.where(open_ & good, part, share)
            # Reading the flags costs nothing on CPU; on a GPU it would stall, and further attempts change nothing.
            if share.device.type == "cpu" and bool((share > 0).all()):
                break
        rows.set(old + share.unsqueeze(1) * step)
        return StepResult(before, surrogate(), share, divergence(), quadratic * share.square())
