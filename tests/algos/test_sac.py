# SPDX-License-Identifier: Apache-2.0
"""SAC: losses by hand, direction of the temperature, agreement with a plain loop."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from robopost.algos.online.sac import SACConfig, actor_loss, temperature_loss
from robopost.errors import ConfigError


def test_actor_loss_takes_the_smallest_critic():
    log_prob, q = torch.tensor([-1.0, -3.0]), torch.tensor([[5.0, 1.0], [2.0, 4.0]])
    assert actor_loss(log_prob, q, torch.tensor(0.5)) == pytest.approx(((-0.5 - 2.0) + (-1.5 - 1.0)) / 2)


@pytest.mark.parametrize(("entropy", "direction"), [(-5.0, 1), (-1.0, -1)])
def test_temperature_rises_while_entropy_is_below_its_target(entropy, direction):
    log_temperature = torch.zeros((), requires_grad=True)
    loss = temperature_loss(log_temperature, torch.tensor([-entropy]), target_entropy=-2.0)
    (grad,) = torch.autograd.grad(loss, [log_temperature])
    assert math.copysign(1, -grad.item()) == direction
    assert grad == pytest.approx(entropy + 2.0)


def test_learned_temperature_moves_the_right_way_in_an_update(lab):
    low = lab.make("sac", target_entropy=-50.0)
    high = lab.make("sac", target_entropy=50.0)
    for algo in (low, high):
        algo.update(lab.make_batch())
    assert low.log_temperature < 0 < high.log_temperature
    fixed = lab.make("sac", learn_temperature=False, temperature=0.2)
    fixed.update(lab.make_batch())
    assert fixed.log_temperature.exp() == pytest.approx(0.2)
    assert not any("temperature_optimizer" in key for key in fixed.state_dict()["json"])


def plain_action(net, x, noise):
    """Mean and bounded log-std, reparameterised sample, density by the change of variables."""
    mean, raw = net(x).chunk(2, 1)
    dist = Normal(mean, (-5 + 3.5 * (torch.tanh(raw) + 1)).exp())
    pre = mean + dist.stddev * noise
    action = torch.tanh(pre)
    return action, (dist.log_prob(pre) - torch.log(1 - action**2)).sum(1)


@pytest.mark.parametrize("delay", [1, 2])
def test_twenty_updates_agree_with_a_plain_loop(lab, delay):
    algo = lab.make("sac", policy_delay=delay, critic_lr=1e-3)
    actor = lab.plain_layers(algo.policy.net)
    critics = [lab.plain_layers(algo.critic.net, member) for member in range(2)]
    targets = copy.deepcopy(critics)
    log_alpha = torch.zeros((), requires_grad=True)
    a_opt = torch.optim.Adam(actor.parameters(), lr=3e-4)
    q_opt = torch.optim.Adam([p for critic in critics for p in critic.parameters()], lr=1e-3)
    t_opt = torch.optim.Adam([log_alpha], lr=3e-4)
    g = torch.Generator().set_state(algo.generator.get_state())
    worst = 0.0
    for step in range(1, 21):
        batch = lab.make_batch(seed=step)
        metrics = algo.update(batch)
        s, a, s2 = batch.obs["state"], batch.action, batch.next_obs["state"]
        draw = lambda a=a: torch.randn((len(a), 1, a.shape[1]), generator=g)[:, 0]  # noqa: E731
        with torch.no_grad():
            a2, lp2 = plain_action(actor, s2, draw())
            x2 = torch.cat([s2, a2], 1)
            q2 = torch.min(targets[0](x2), targets[1](x2)).squeeze(1) - log_alpha.exp() * lp2
            y = batch.reward + (~batch.terminated).float() * 0.99 * q2
        x = torch.cat([s, a], 1)
        loss = sum(nn.functional.mse_loss(critic(x).squeeze(1), y) for critic in critics)
        worst = max(worst, abs(loss.item() - metrics["loss/critic"].item()))
        q_opt.zero_grad()
        loss.backward()
        q_opt.step()
        for target, critic in zip(targets, critics, strict=True):
            for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                old.data.mul_(0.995).add_(0.005 * new.data)
        if step % delay:
            continue
        for _ in range(delay):
            pi, lp = plain_action(actor, s, draw())
            x = torch.cat([s, pi], 1)
            loss = (log_alpha.exp().detach() * lp - torch.min(critics[0](x), critics[1](x)).squeeze(1)).mean()
            a_opt.zero_grad()
            loss.backward()
            a_opt.step()
            alpha_loss = (-log_alpha.exp() * (lp.detach() - 2.0)).mean()
            t_opt.zero_grad()
            alpha_loss.backward()
            t_opt.step()
        worst = max(worst, abs(loss.item() - metrics["loss/actor"].item()))
        worst = max(worst, abs(alpha_loss.item() - metrics["loss/temperature"].item()))
    assert worst < 1e-5
    lab.assert_same_net(algo.policy.net, actor)
    assert algo.log_temperature.item() == pytest.approx(log_alpha.item(), abs=1e-6)
    for member in range(2):
        lab.assert_same_net(algo.critic.net, critics[member], member)
        lab.assert_same_net(algo.critic_target.net, targets[member], member)


def test_backup_without_entropy_ignores_the_temperature(lab):
    batch = lab.make_batch()
    losses = [
        lab.make("sac", temperature=t, entropy_in_target=False).update(batch)["loss/critic"].item()
        for t in (0.1, 5.0)
    ]
    assert losses[0] == losses[1]


def test_policies_that_do_not_fit_and_bad_values_are_refused(lab):
    with pytest.raises(ConfigError, match=r"Fix: policy=gaussian policy.squash=true"):
        lab.make("sac", policy=lab.make_policy("gaussian", squash=False))
    with pytest.raises(ConfigError, match=r"algo.temperature=0.0 must be above 0"):
        SACConfig(temperature=0.0)


def test_the_actor_may_follow_the_mean_of_the_critics(lab):
    """RLPD: one actor update per many of the critics, towards their mean."""
    algo, batch = lab.make("sac", num_critics=3, actor_mean=True), lab.make_batch()
    chunk, log_prob, _ = algo.policy.sample(
        batch.obs, generator=torch.Generator().set_state(algo.generator.get_state())
    )
    expected = (log_prob - algo.critic(batch.obs, chunk[:, 0]).mean(0)).mean()
    assert torch.allclose(algo.actor_step(batch)["loss/actor"], expected, atol=1e-6)
    calls = []
    algo = lab.make("sac", policy_delay=4, actor_updates=1)
    real = algo.actor_step
    algo.actor_step = lambda batch: calls.append(algo.updates) or real(batch)
    for _ in range(8):
        algo.update(batch)
    assert calls == [4, 8]
