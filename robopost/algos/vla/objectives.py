# SPDX-License-Identifier: Apache-2.0
"""Losses and credits of on-policy distillation and of group-relative policy gradients, as pure functions.

Log-probabilities are those of all outcomes of a slot, (..., bins), at one temperature for student, teacher and
reference. A slot is one action dimension of one step of a chunk. `gap` is log pi - log pi_T: its mean under the student
is the reverse KL, its negative is the reward of on-policy distillation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# -- divergences of a slot, (..., bins) to (...) -------------------------------------------------------------


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities."""
    return (first.exp() * (first - second)).sum(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


def hard_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """-log pi of the teacher's likeliest outcome."""
    return -student.gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Generalised JSD: beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S (Agarwal et al. 2024).

    At the end points it would vanish: there it is the divergence it tends to after division by beta or 1 - beta,
    forward KL at 0 and reverse KL at 1.
    """
    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def restrict(index: Tensor, *log_probs: Tensor) -> tuple[Tensor, ...]:
    """Each of `log_probs` (..., bins) on the outcomes `index` (..., k), renormalised."""
    return tuple(item.gather(-1, index).log_softmax(-1) for item in log_probs)


# -- reverse KL, exact and sampled ---------------------------------------------------------------------------


def reward_gap(
    student: Tensor,
    teacher: Tensor,
    reference: Tensor | None = None,
    scale: float = 1.0,
    bound: float = math.inf,
) -> Tensor:
    """The gap d = (log pi - log pi_ref) - scale (log pi_T - log pi_ref), minus G-OPD's reward.

    Elementwise, and written as (log pi - log pi_T) - (scale - 1) (log pi_T - log pi_ref): with scale 1 the reference
    drops out to the last bit, and only the extrapolation is clamped to +-bound. Clamping the gap itself would take the
    gradient away where student and teacher are far apart. The fixed point is pi ~ pi_ref (pi_T / pi_ref)^scale.
    """
    gap = student - teacher
    if reference is None or scale == 1.0:
        return gap
    return gap - (scale - 1.0) * (teacher - reference).clamp(-bound, bound)


def exact_loss(student: Tensor, gap: Tensor) -> Tensor:
    """sum_k pi_k sg[d_k]: its value is E[d], its gradient that of E[d], as E[grad log pi] = 0; (..., bins) to (...)."""
    return (student.exp() * gap.detach()).sum(-1)


def sampled_loss(log_prob: Tensor, reward: Tensor, ratio: Tensor | float = 1.0) -> Tensor:
    """-sg[ratio r] log pi(a) of sampled outcomes (VLA-OPD, L_OPD), elementwise."""
    weight = reward.detach() * ratio
    return -weight * log_prob


def truncated_ratio(log_prob: Tensor, old: Tensor, cap: float) -> Tensor:
    """min(pi / pi_old, cap), without gradient: outcomes drawn a few updates ago."""
    return (log_prob - old).detach().exp().clamp(max=cap)


def later_sum(reward: Tensor, within: bool) -> Tensor:
    """Sum of what comes after each slot of an episode, exclusive; (D, ..., H, A) to the same shape.

    Args:
        reward: of the slots of D decisions in order, 0 where there is none.
        within: count later slots of the same decision too: in an autoregressive policy they depend on this one, in a
            parallel one they don't.
    """
    slots = reward.flatten(-2)
    total = slots.sum(-1)
    later = total.flip(0).cumsum(0).flip(0) - total
    out = later.unsqueeze(-1).expand_as(slots)
    if within:
        out = out + slots.flip(-1).cumsum(-1).flip(-1) - slots
    return out.view_as(reward)


# -- outcomes ------------------------------------------------------------------------------------------------


def group_advantages(outcome: Tensor, group: int, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """A = (R - mean) / (std + eps) within groups of `group` neighbours (GRPO, Shao et al. 2024, section 4.1).

    Args:
        outcome: (M,) of the episodes.
        group: divisor of M, at least 2.
        eps: see above; the standard deviation is the sample's (n - 1).

    Returns:
        (advantages (M,), bool (M,) False in groups whose outcomes are all equal: they teach nothing).
    """
    rows = outcome.unflatten(0, (-1, group))
    mixed = (rows.amax(1, keepdim=True) > rows.amin(1, keepdim=True)).expand_as(rows)
    advantage = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + eps)
    return torch.where(mixed, advantage, torch.zeros_like(rows)).flatten(), mixed.flatten()


def clipped_tokens(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), elementwise (Yu et al. 2025, DAPO, section 3.1)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def scope_weights(
    student: Tensor, teacher: Tensor, success: Tensor, group: int, temperature: float = 1.0
) -> Tensor:
    """Weights (M,) of episodes by outcome (SCOPE), summing to 1 over a group's successes and its failures.

    w^S = softmax(-l_S / tau) over successes: those the student found unlikely weigh more.
    w^T = softmax(+l_T / tau) over failures: those the teacher finds natural weigh more.

    Args:
        student: (M,) mean log-probability of an episode's outcomes under the student.
        teacher: (M,) the same under the teacher.
        success: (M,) bool.
        group: neighbours that are weighed against each other.
        temperature: tau.
    """
    score = torch.where(success, -student, teacher).unflatten(0, (-1, group)) / temperature
    solved = success.unflatten(0, (-1, group))
    shares = [score.masked_fill(out, -math.inf).softmax(1) for out in (~solved, solved)]
    return torch.where(solved, *shares).flatten()


def margin_shift(mean_reward: Tensor, success: Tensor, group: int, margin: float) -> Tensor:
    """What Uni-OPD adds to the reward of all slots of an episode: +d / 2 to successes, -d / 2 to failures; (M,).

    d = max(0, margin - (mean over successes - mean over failures)) in each group that has both, else 0. It makes
    successes score `margin` better than failures where the teacher does not.

    Args:
        mean_reward: (M,) mean of log pi_T - log pi over an episode.
        success: (M,) bool.
        group: neighbours that are compared.
        margin: delta.
    """
    rows, solved = (item.unflatten(0, (-1, group)) for item in (mean_reward, success))
    won = solved.sum(1, keepdim=True)
    lost = group - won
    good = (rows * solved).sum(1, keepdim=True) / won.clamp_min(1)
    bad = (rows * ~solved).sum(1, keepdim=True) / lost.clamp_min(1)
    short = torch.where((won > 0) & (lost > 0), (margin - (good - bad)).clamp_min(0.0), 0.0)
    return (torch.where(solved, short, -short) / 2).flatten()


# -- means over slots ----------------------------------------------------------------------------------------


def slot_mean(value: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of weight times value over valid slots / their number; 0, not NaN, where none is valid.

    Args:
        value: (..., H, A).
        valid: the same shape, bool; what `value` holds elsewhere does not matter, be it infinite.
        weight: broadcasts to it, None = 1.
    """
    value = value if weight is None else value * weight
    return torch.where(valid, value, torch.zeros_like(value)).sum() / valid.sum().clamp_min(1)


def episode_means(value: Tensor, valid: Tensor, episode: Tensor, episodes: int) -> tuple[Tensor, Tensor]:
    """Mean over an episode's valid slots (M,), and their number (M,).

    Args:
        value: (n, H, A) of n decisions.
        valid: (n, H, A) bool.
        episode: (n,) which episode a decision belongs to.
        episodes: M.
    """
    sums = torch.where(valid, value, torch.zeros_like(value)).sum((-1, -2))
    count = valid.sum((-1, -2)).to(value.dtype)
    zero = torch.zeros(episodes, dtype=value.dtype, device=value.device)
    total, number = zero.index_add(0, episode, sums), zero.index_add(0, episode, count)
    return total / number.clamp_min(1), number
