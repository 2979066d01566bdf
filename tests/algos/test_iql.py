# SPDX-License-Identifier: Apache-2.0
"""IQL: expectiles, weights, in-sample evaluation, both presets against plain loops."""

import copy

import pytest
import torch
from torch import nn

from robopost.algos.offline.iql import (
    IQLConfig,
    advantage_weights,
    expectile_loss,
    gaussian_cloning_loss,
    q_loss,
    weighted_cloning_loss,
)
from robopost.errors import ConfigError

REFERENCE_POLICY = {"squash": False, "mean_tanh": True, "state_std": False}


def fit_value(samples, expectile):
    value = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([value], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        loss, _ = expectile_loss(samples - value, expectile)
        loss.backward()
        return loss

    optimizer.step(closure)
    return value.item()


def test_expectile_half_is_the_mean_and_half_the_squared_error():
    samples = torch.tensor([0.0, 1.0, 5.0])
    assert fit_value(samples, 0.5) == pytest.approx(2.0, abs=1e-4)
    diff = samples - 2.0
    assert expectile_loss(diff, 0.5)[0] == pytest.approx(0.5 * diff.square().mean().item())


def test_high_expectile_nears_the_maximum_and_the_loss_is_not_negative():
    samples = torch.tensor([0.0, 1.0, 5.0])
    assert 4.8 < fit_value(samples, 0.99) < 5.0
    # By hand at 0.7: 0.7 * 9 for +3, 0.3 * 4 for -2.
    assert expectile_loss(torch.tensor([3.0, -2.0]), 0.7)[0] == pytest.approx((6.3 + 1.2) / 2)
    assert expectile_loss(torch.randn(100), 0.9)[0] >= 0


def test_weights_are_exponential_capped_and_detached():
    advantage = torch.tensor([0.0, 1.0, 50.0], requires_grad=True)
    weights = advantage_weights(advantage, 3.0, 100.0)
    assert torch.allclose(weights, torch.tensor([1.0, 20.085537, 100.0]))
    assert not weights.requires_grad
    log_prob = torch.tensor([-1.0, -2.0, -3.0])
    assert weighted_cloning_loss(weights, log_prob) == pytest.approx((1 + 2 * 20.085537 + 300) / 3, rel=1e-6)


def test_beta_zero_is_behaviour_cloning(lab):
    algo, batch = lab.make("iql", beta=0.0), lab.make_batch()
    loss = algo.train_step(batch)["loss/actor"]
    fresh = lab.make("iql", beta=0.0)
    log_prob = fresh.policy.action_log_prob(batch.obs, batch.action[:, None])
    assert loss == pytest.approx(-log_prob.mean().item(), rel=1e-6)


def test_presets_scale_the_q_loss_differently():
    q, target = torch.tensor([[1.0], [2.0]]), torch.tensor([0.0])
    assert q_loss(q, target, "original")[0] == 5.0
    assert q_loss(q, target, "corl")[0] == 2.5


@pytest.mark.parametrize("variant", ["original", "corl"])
def test_closed_form_gradient_of_the_q_loss_is_autograd_s(variant):
    q = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    loss, gradient = q_loss(q, torch.randn(8, dtype=torch.float64), variant)
    assert torch.allclose(torch.autograd.grad(loss, q)[0], gradient.detach())


def test_closed_form_gradient_of_the_expectile_loss_is_autograd_s():
    diff = torch.randn(16, dtype=torch.float64, requires_grad=True)
    loss, gradient = expectile_loss(diff, 0.8)
    assert torch.allclose(torch.autograd.grad(loss, diff)[0], gradient.detach())


def test_closed_form_gradient_of_gaussian_cloning_is_autograd_s():
    mean = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    log_std = torch.randn(3, dtype=torch.float64, requires_grad=True)
    weights, action = torch.rand(16, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    loss, *gradients = gaussian_cloning_loss(weights, action, mean, log_std)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    expected = weighted_cloning_loss(weights, log_prob)
    assert torch.allclose(loss, expected)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, (mean, log_std)), strict=True):
        assert torch.allclose(gradient.detach(), reference)


@pytest.mark.parametrize("variant", ["original", "corl"])
def test_q_is_never_evaluated_at_unseen_actions(lab, variant, monkeypatch):
    algo, batch = lab.make("iql", variant=variant), lab.make_batch()
    real = type(algo.critic).forward

    def guarded(self, obs, action):
        assert action is batch.action, "Q evaluated at an action that is not in the data"
        assert obs is batch.obs, "Q evaluated at a state without its action"
        return real(self, obs, action)

    monkeypatch.setattr(type(algo.critic), "forward", guarded)
    monkeypatch.setattr(type(algo.policy), "sample", lambda *a, **k: pytest.fail("policy was sampled"))
    algo.update(batch)


@pytest.mark.parametrize("variant", ["original", "corl"])
def test_twenty_updates_agree_with_a_plain_loop(lab, variant):
    algo = lab.make("iql", variant=variant, actor_decay_updates=50, policy_options=REFERENCE_POLICY)
    actor, log_std = lab.plain_layers(algo.policy.net), nn.Parameter(algo.policy.log_std.detach().clone())
    value = lab.plain_layers(algo.value.net)
    critics = [lab.plain_layers(algo.critic.net, member) for member in range(2)]
    targets = copy.deepcopy(critics)
    v_opt = torch.optim.Adam(value.parameters(), lr=3e-4)
    q_opt = torch.optim.Adam([p for critic in critics for p in critic.parameters()], lr=3e-4)
    a_opt = torch.optim.Adam([*actor.parameters(), log_std], lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(a_opt, 50)

    losses = {}

    def apply(name, optimizer, loss):
        losses[name] = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for step in range(20):
        batch = lab.make_batch(seed=step)
        metrics = algo.update(batch)
        s, a, s2 = batch.obs["state"], batch.action, batch.next_obs["state"]
        x, mask = torch.cat([s, a], 1), 1 - batch.terminated.float()
        with torch.no_grad():
            tq = torch.min(targets[0](x), targets[1](x)).squeeze(1)
            old_next = value(s2).squeeze(1)
        u = tq - value(s).squeeze(1)
        old_adv = u.detach()
        apply("loss/value", v_opt, ((u > 0).float() * 0.7 * u**2 + (u <= 0).float() * 0.3 * u**2).mean())

        def update_policy(adv, s=s, a=a):
            weight = torch.exp(3.0 * adv).clamp(max=100.0)
            dist = torch.distributions.Normal(torch.tanh(actor(s)), log_std.clamp(-5, 2).exp())
            apply("loss/actor", a_opt, -(weight * dist.log_prob(a).sum(1)).mean())
            schedule.step()

        def update_q(next_v, batch=batch, x=x, mask=mask):
            y = batch.reward + 0.99 * mask * next_v
            loss = sum(((critic(x).squeeze(1) - y) ** 2).mean() for critic in critics)
            apply("loss/critic", q_opt, loss if variant == "original" else loss / 2)
            for target, critic in zip(targets, critics, strict=True):
                for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                    old.data.mul_(0.995).add_(0.005 * new.data)

        if variant == "original":
            with torch.no_grad():
                adv, next_v = tq - value(s).squeeze(1), value(s2).squeeze(1)
            update_policy(adv)
            update_q(next_v)
        else:
            update_q(old_next)
            update_policy(old_adv)
        tolerance = 1e-6 if step == 0 else 1e-5
        for name, loss in losses.items():
            assert metrics[name].item() == pytest.approx(loss, rel=tolerance, abs=tolerance), (step, name)
    assert losses.keys() == {"loss/value", "loss/actor", "loss/critic"}
    lab.assert_same_net(algo.policy.net, actor)
    lab.assert_same_net(algo.value.net, value)
    for member in range(2):
        lab.assert_same_net(algo.critic.net, critics[member], member)
        lab.assert_same_net(algo.critic_target.net, targets[member], member)
    assert torch.allclose(algo.policy.log_std, log_std, atol=1e-5)


def test_actor_learning_rate_decays_to_zero_and_stays(lab):
    algo, batch = lab.make("iql", actor_decay_updates=4), lab.make_batch()
    rates = []
    for _ in range(7):
        algo.update(batch)
        rates.append(algo.actor_optimizer.param_groups[0]["lr"])
    assert rates[0] == 3e-4
    assert rates[2] == pytest.approx(1.5e-4)
    assert rates[4] == rates[6] == pytest.approx(0.0, abs=1e-12)


def test_original_preset_starts_orthogonal(lab):
    weight = lab.make("iql").critic.net[2].weight[1]
    assert torch.allclose(weight @ weight.t(), 2 * torch.eye(16), atol=1e-5)


def test_policies_without_a_density_and_bad_values_are_refused(lab):
    with pytest.raises(ConfigError, match=r"Fix: policy=gaussian"):
        lab.make("iql", policy=lab.make_policy("deterministic"))
    with pytest.raises(ConfigError, match=r"algo.expectile=1.0 must lie in \(0, 1\)"):
        IQLConfig(expectile=1.0)
    with pytest.raises(ConfigError, match=r"Did you mean 'corl'"):
        IQLConfig(variant="corll")
