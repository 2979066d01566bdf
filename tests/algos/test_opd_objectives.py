# SPDX-License-Identifier: Apache-2.0
"""Divergences, estimators and credits of on-policy distillation, by hand and by enumeration."""

import itertools
import math

import pytest
import torch

from robopost.algos.vla.distill import DistillConfig, slot_losses
from robopost.algos.vla.objectives import (
    clipped_tokens,
    entropy,
    episode_means,
    exact_loss,
    group_advantages,
    hard_cross_entropy,
    jensen_shannon,
    kl,
    later_sum,
    margin_shift,
    restrict,
    reward_gap,
    sampled_loss,
    scope_weights,
    slot_mean,
    truncated_ratio,
)


def gradient(loss, parameter):
    return torch.autograd.grad(loss, parameter)[0]


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


# -- check 1: the estimators agree ---------------------------------------------------------------------------


@pytest.mark.parametrize(("variate", "least"), [(False, 0.99), (True, 0.993)])
def test_sampled_gradients_average_to_the_exact_one(variate, least):
    """Check 1 of the card: cosine at least .99 at 10,000 samples, better with the control variate."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(256, generator=g).requires_grad_()
    teacher = torch.randn(256, generator=g).log_softmax(-1)
    exact = gradient(kl(logits.log_softmax(-1), teacher), logits)
    tokens = torch.multinomial(logits.detach().softmax(-1), 10_000, replacement=True, generator=g)
    config = DistillConfig(kl_estimator="sample", control_variate=variate)
    rows = {"teacher": teacher.expand(10_000, -1), "tokens": tokens}
    student = logits.log_softmax(-1).expand(10_000, -1)
    sampled = gradient(slot_losses(config, student, rows).mean(), logits)
    assert cosine(sampled, exact) >= least
    few = {key: value[:100] for key, value in rows.items()}
    rough = gradient(slot_losses(config, logits.log_softmax(-1).expand(100, -1), few).mean(), logits)
    assert cosine(rough, exact) < 0.9, "100 samples are not enough: the exact form is worth having"


def test_control_variate_lowers_the_error():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(64, generator=g).requires_grad_()
    teacher = (2 * torch.randn(64, generator=g)).log_softmax(-1)
    exact = gradient(kl(logits.log_softmax(-1), teacher), logits)
    tokens = torch.multinomial(logits.detach().softmax(-1), 20_000, replacement=True, generator=g)
    errors = []
    for variate in (False, True):
        config = DistillConfig(kl_estimator="sample", control_variate=variate)
        rows = {"teacher": teacher.expand(20_000, -1), "tokens": tokens}
        loss = slot_losses(config, logits.log_softmax(-1).expand(20_000, -1), rows).mean()
        errors.append((gradient(loss, logits) - exact).norm().item())
    assert errors[1] < 0.9 * errors[0]


def test_exact_loss_is_the_kl_in_value_and_gradient():
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    student = logits.log_softmax(-1)
    loss = exact_loss(student, reward_gap(student, teacher))
    torch.testing.assert_close(loss, kl(student, teacher))
    torch.testing.assert_close(
        gradient(loss.sum(), logits), gradient(kl(logits.log_softmax(-1), teacher).sum(), logits)
    )


# -- check 2: fixed points -----------------------------------------------------------------------------------


def descend(loss, start, steps=3000, lr=0.05):
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(logits.log_softmax(-1)).backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 2.0])
def test_fixed_point_of_extrapolation(scale):
    """Check 2: pi ~ pi_ref (pi_T / pi_ref)^lambda within 1e-3; lambda = 1 is the teacher for every reference."""
    g = torch.Generator().manual_seed(0)
    teacher, reference, start = torch.randn(3, 16, generator=g).double()
    teacher, reference = teacher.log_softmax(-1), reference.log_softmax(-1)
    config = DistillConfig()
    config.reward_scale = scale
    rows = {"teacher": teacher, "reference": reference}
    found = descend(lambda student: slot_losses(config, student, rows), start, 1500)
    wanted = (reference + scale * (teacher - reference)).softmax(-1)
    assert (found - wanted).abs().max() <= 1e-3
    if scale == 1.0:
        torch.testing.assert_close(wanted, teacher.exp())


def test_scale_one_forgets_the_reference_to_the_bit_and_only_extrapolation_is_clamped():
    student, teacher, reference = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.equal(reward_gap(student, teacher, reference, 1.0, 0.1), student - teacher)
    gap = reward_gap(student, teacher, reference, 3.0, 10.0)
    assert torch.equal(gap, student - teacher - 2.0 * (teacher - reference).clamp(-10, 10))
    plain = reward_gap(student, teacher, reference, 3.0)
    torch.testing.assert_close(
        plain, (student - reference) - 3.0 * (teacher - reference), rtol=1e-4, atol=1e-4
    )
    assert (reward_gap(student, teacher).abs() > 10).any()


# -- check 3: myopia is explicit -----------------------------------------------------------------------------


def chain_gradients(within_chunk, return_to_go):
    """Gradients of a two-slot chain in the logits of its slots: of the objective, and of the KL of sequences.

    The second slot is conditioned on the first one's outcome: as a later slot of an autoregressive chunk, or as the
    next decision of an episode. Expectations are sums over all nine sequences.
    """
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, generator=g).double(), torch.randn(3, 3, generator=g).double()
    experts = [torch.randn(3, generator=g).double(), torch.randn(3, 3, generator=g).double()]
    experts = [item.log_softmax(-1) for item in experts]
    first.requires_grad_()
    second.requires_grad_()
    logs = [first.log_softmax(-1), second.log_softmax(-1)]
    joint = logs[0][:, None] + logs[1]
    whole = (joint.exp() * (joint - experts[0][:, None] - experts[1])).sum()
    wanted = torch.autograd.grad(whole, [first, second])
    loss = torch.zeros((), dtype=torch.double)
    for i, k in itertools.product(range(3), range(3)):
        first_log, second_log = first.log_softmax(-1), second[i].log_softmax(-1)
        student = torch.stack([first_log, second_log])
        teacher = torch.stack([experts[0], experts[1][i]])
        shape = (1, 1, 2) if within_chunk else (2, 1, 1)  # (decisions, H, A)
        student, teacher = (item.view(*shape, 3) for item in (student, teacher))
        rows = {"teacher": teacher, "tokens": torch.tensor([i, k]).view(shape)}
        if return_to_go:
            own = exact_loss(student, reward_gap(student, teacher)).detach()
            rows["bonus"] = later_sum(-own, within_chunk)
        probability = joint[i, k].exp().detach()
        loss = loss + probability * slot_losses(DistillConfig(), student, rows).sum()
    return torch.autograd.grad(loss, [first, second]), wanted


@pytest.mark.parametrize("within_chunk", [True, False])
def test_myopic_gradient_is_right_for_the_last_step_alone(within_chunk):
    found, wanted = chain_gradients(within_chunk, return_to_go=False)
    torch.testing.assert_close(found[1], wanted[1])
    assert (found[0] - wanted[0]).norm() > 0.1 * wanted[0].norm()


@pytest.mark.parametrize("within_chunk", [True, False])
def test_with_return_to_go_both_steps_are_right(within_chunk):
    found, wanted = chain_gradients(within_chunk, return_to_go=True)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


def test_later_sums_by_hand():
    reward = torch.arange(1.0, 9.0).view(2, 1, 2, 2)  # two decisions of one episode, chunks 2 x 2
    assert later_sum(reward, False).flatten().tolist() == [26, 26, 26, 26, 0, 0, 0, 0]
    assert later_sum(reward, True).flatten().tolist() == [35, 33, 30, 26, 21, 15, 8, 0]
    episodes = torch.stack([reward[:, 0], 10 * reward[:, 0]], 1)
    assert torch.equal(later_sum(episodes, True)[:, 1], 10 * later_sum(reward, True)[:, 0])


# -- check 4: mode seeking -----------------------------------------------------------------------------------


def gaussian_bins(mean, log_std):
    x = torch.linspace(-1, 1, 256)
    return (-0.5 * ((x - mean) / log_std.exp()) ** 2).log_softmax(-1)


def fit_gaussian(divergence):
    x = torch.linspace(-1, 1, 256)
    density = 0.6 * torch.exp(-0.5 * ((x - 0.6) / 0.08) ** 2) + 0.4 * torch.exp(
        -0.5 * ((x + 0.6) / 0.08) ** 2
    )
    # Far from both modes the density underflows; its logarithm is that of the nearer mode.
    teacher = torch.where(density > 0, density.log(), torch.tensor(-100.0)).log_softmax(-1)
    mean, log_std = torch.tensor(0.1, requires_grad=True), torch.tensor(math.log(0.3), requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], 0.02)
    config = DistillConfig(divergence=divergence)
    for _ in range(600):
        optimizer.zero_grad()
        slot_losses(config, gaussian_bins(mean, log_std), {"teacher": teacher}).backward()
        optimizer.step()
    student = gaussian_bins(mean.detach(), log_std.detach()).exp()
    return mean.item(), log_std.exp().item(), student[x.abs() < 0.3].sum().item()


def test_reverse_kl_takes_one_mode_and_forward_kl_fills_the_valley():
    """Check 4."""
    mean, std, valley = fit_gaussian("reverse")
    assert mean == pytest.approx(0.60, abs=0.01)
    assert std == pytest.approx(0.08, abs=0.005)
    assert valley < 0.001
    assert fit_gaussian("forward")[2] >= 0.25


# -- divergences ---------------------------------------------------------------------------------------------


def test_divergences_by_hand():
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    rows = {"teacher": teacher, "tokens": torch.tensor(0)}
    loss = lambda **options: slot_losses(DistillConfig(**options), student, rows).item()  # noqa: E731
    assert loss() == pytest.approx(reverse)
    assert loss(divergence="forward") == pytest.approx(forward)
    assert loss(divergence="hard_ce") == pytest.approx(math.log(2))
    assert loss(divergence="jsd", jsd_beta=0.0) == pytest.approx(forward)
    assert loss(divergence="jsd", jsd_beta=1.0) == pytest.approx(reverse)
    middle = [0.25 * 0.9 + 0.75 * 0.5, 0.25 * 0.1 + 0.75 * 0.5]
    half = 0.25 * sum(p * math.log(p / m) for p, m in zip((0.9, 0.1), middle, strict=True))
    half += 0.75 * sum(p * math.log(p / m) for p, m in zip((0.5, 0.5), middle, strict=True))
    assert loss(divergence="jsd", jsd_beta=0.25) == pytest.approx(half)
    for beta in (1e-4, 1 - 1e-4):
        near = jensen_shannon(student.double(), teacher.double(), beta).item() / min(beta, 1 - beta)
        assert near == pytest.approx(forward if beta < 0.5 else reverse, rel=1e-3)
    assert entropy(student).item() == pytest.approx(math.log(2))
    assert hard_cross_entropy(teacher, student.flip(0)).item() in (
        pytest.approx(-math.log(0.9)),
        pytest.approx(-math.log(0.1)),
    )


def test_top_k_is_the_teachers_and_renormalised():
    student = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    teacher = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    ours, theirs = restrict(torch.tensor([0, 1]), student, teacher)
    torch.testing.assert_close(ours.exp(), torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(theirs.exp(), torch.tensor([0.625, 0.375]))
    loss = slot_losses(DistillConfig(top_k=2), student, {"teacher": teacher})
    torch.testing.assert_close(loss, kl(ours, theirs))
    torch.testing.assert_close(
        slot_losses(DistillConfig(top_k=4), student, {"teacher": teacher}), kl(student, teacher)
    )


def test_sampled_loss_by_hand():
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    reward = torch.tensor([3.0, -4.0])
    ratio = truncated_ratio(log_prob, torch.tensor([-4.0, -1.0]), 5.0)
    torch.testing.assert_close(ratio, torch.tensor([5.0, math.exp(-1.0)]))
    assert not ratio.requires_grad
    loss = sampled_loss(log_prob, reward, ratio)
    torch.testing.assert_close(loss, torch.tensor([15.0, -8.0 * math.exp(-1.0)]))
    torch.testing.assert_close(gradient(loss.sum(), log_prob), torch.tensor([-15.0, 4.0 * math.exp(-1.0)]))


# -- outcomes ------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    advantage, mixed = group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]), 4)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    assert advantage[:4].tolist() == pytest.approx([0.75 / std] + 3 * [-0.25 / std], rel=1e-4)
    assert advantage[4:].tolist() == [0.0] * 8
    assert mixed.tolist() == [True] * 4 + [False] * 8


def test_clip_is_higher_upwards():
    ratio = torch.tensor([0.5, 0.5, 1.25, 1.5, 1.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    found = clipped_tokens(ratio, advantage, 0.2, 0.28)
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.8, -1.25, -1.28, 1.5]))


def test_scope_weights_of_the_card():
    """Check 7: the weights of section 2, not those of the released code."""
    mean = torch.tensor([-0.2, -0.5, -1.0, -2.0])
    unused = torch.full((4,), 7.0)
    won, lost = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    successes = scope_weights(mean, unused, won, 4)
    failures = scope_weights(unused, mean, lost, 4)
    assert successes.tolist() == pytest.approx([0.094, 0.127, 0.209, 0.569], abs=5e-4)
    assert failures.tolist() == pytest.approx([0.425, 0.315, 0.191, 0.070], abs=5e-4)
    assert successes.sum().item() == pytest.approx(1)
    assert failures.sum().item() == pytest.approx(1)
    # Both kinds in one group, and groups on their own.
    both = scope_weights(torch.cat([mean, unused]), torch.cat([unused, mean]), torch.cat([won, lost]), 8)
    torch.testing.assert_close(both, torch.cat([successes, failures]))
    torch.testing.assert_close(scope_weights(mean, unused, won, 1), torch.ones(4))
    warm = scope_weights(mean, unused, won, 4, temperature=2.0)
    torch.testing.assert_close(warm, (-mean / 2).softmax(0))


def test_margin_of_the_card():
    """Check 7: means .4 and .3, margin .4: d = .3, and the corrected means are exactly .4 apart."""
    reward = torch.tensor([0.5, 0.3, 0.2, 0.4], dtype=torch.double)
    success = torch.tensor([True, True, False, False])
    shift = margin_shift(reward, success, 4, 0.4)
    assert shift.tolist() == pytest.approx([0.15, 0.15, -0.15, -0.15])
    corrected = reward + shift
    assert (corrected[:2].mean() - corrected[2:].mean()).item() == pytest.approx(0.4, abs=1e-12)
    assert margin_shift(reward, success, 4, 0.05).tolist() == [0, 0, 0, 0]
    assert margin_shift(reward, success, 2, 0.4).tolist() == [0, 0, 0, 0], "no group has both outcomes"


# -- means ---------------------------------------------------------------------------------------------------


def test_masked_slots_are_left_out_whatever_they_hold():
    value = torch.tensor([[[1.0, 2.0], [math.inf, math.nan]]])
    valid = torch.tensor([[[True, True], [False, False]]])
    assert slot_mean(value, valid).item() == 1.5
    assert slot_mean(value, valid, torch.tensor(2.0)).item() == 3.0
    assert slot_mean(value, torch.zeros_like(valid)).item() == 0.0
    mean, count = episode_means(
        torch.cat([value, value + 1]), torch.cat([valid, valid]), torch.tensor([2, 0]), 3
    )
    assert mean.tolist() == [2.5, 0.0, 1.5]
    assert count.tolist() == [2, 0, 2]
