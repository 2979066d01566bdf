# SPDX-License-Identifier: Apache-2.0
"""TD3: targets, twin minimum, Polyak, delay, agreement with a plain loop."""

import copy

import pytest
import torch
from torch import nn

from robopost.algos.online.td3 import TD3Config, critic_loss, random_subset, smoothed_action, td_target
from robopost.errors import ConfigError


def test_target_takes_the_smallest_critic_and_cuts_on_termination_alone():
    reward = torch.tensor([1.0, 1.0, 1.0])
    # gamma 0.9: one step, two steps of an n-step return, and a terminated one.
    discount = torch.tensor([0.9, 0.81, 0.0])
    next_q = torch.tensor([[10.0, 20.0, 30.0], [12.0, 18.0, 30.0], [50.0, 50.0, -9.0]])
    assert torch.allclose(td_target(reward, discount, next_q), torch.tensor([10.0, 1 + 0.81 * 18, 1.0]))
    subset = torch.tensor([1, 2])
    assert torch.allclose(
        td_target(reward, discount, next_q, subset)[:2], torch.tensor([11.8, 1 + 0.81 * 18])
    )


def test_smoothing_noise_is_clipped_and_so_is_the_action():
    noise = torch.tensor([1.0, 10.0, -10.0, 0.5])
    action = torch.tensor([0.0, 0.0, -0.8, 0.95])
    assert torch.allclose(smoothed_action(action, noise, 0.2, 0.5), torch.tensor([0.2, 0.5, -1.0, 1.0]))


def test_critic_loss_sums_over_critics():
    q = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert critic_loss(q, torch.tensor([1.0, 1.0])) == pytest.approx((0 + 1) / 2 + (4 + 9) / 2)


def test_random_subset_is_distinct_and_covers_all_members():
    g = torch.Generator().manual_seed(0)
    draws = [random_subset(5, 2, g, torch.device("cpu")) for _ in range(50)]
    assert all(len(set(draw.tolist())) == 2 for draw in draws)
    assert set(torch.cat(draws).tolist()) == set(range(5))
    assert random_subset(2, 0, g, torch.device("cpu")) is None


def test_polyak_step_is_exact_and_delayed(lab):
    algo = lab.make("td3", policy_delay=2, tau=0.25)
    before = copy.deepcopy(algo.critic_target.state_dict())
    actor = copy.deepcopy(algo.policy.state_dict())
    algo.update(lab.make_batch(seed=1))
    assert all(torch.equal(value, before[key]) for key, value in algo.critic_target.state_dict().items())
    assert all(torch.equal(value, actor[key]) for key, value in algo.policy.state_dict().items())
    algo.update(lab.make_batch(seed=2))
    online = algo.critic.state_dict()
    for key, value in algo.critic_target.state_dict().items():
        assert torch.allclose(value, 0.75 * before[key] + 0.25 * online[key], atol=1e-7)
    for key, value in algo.policy_target.state_dict().items():
        assert torch.allclose(value, 0.75 * actor[key] + 0.25 * algo.policy.state_dict()[key], atol=1e-7)
    assert any(not torch.equal(value, actor[key]) for key, value in algo.policy.state_dict().items())


def test_actor_gradient_is_that_of_the_first_critic_and_leaves_critics_alone(lab):
    algo, batch = lab.make("td3", num_critics=3), lab.make_batch()
    loss, _ = algo.actor_loss(batch)
    ours = torch.autograd.grad(loss, list(algo.policy.parameters()))
    action = algo.policy.sample(batch.obs, deterministic=True)[0][:, 0]
    full = -algo.critic(batch.obs, action)[0].mean()
    theirs = torch.autograd.grad(full, list(algo.policy.parameters()))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours, theirs, strict=True))
    critic = copy.deepcopy(algo.critic.state_dict())
    algo.actor_step(batch)
    assert all(torch.equal(value, critic[key]) for key, value in algo.critic.state_dict().items())


@pytest.mark.parametrize("name", ["td3", "td3_bc"])
def test_twenty_updates_agree_with_a_plain_loop(lab, name):
    """Separate networks, default Adam, one operation per line: parameters to 1e-5."""
    algo = lab.make(name)
    cfg = algo.config
    actor = lab.plain_layers(algo.policy.net)
    critics = [lab.plain_layers(algo.critic.net, member) for member in range(2)]
    actor_t, critics_t = copy.deepcopy(actor), copy.deepcopy(critics)
    actor_opt = torch.optim.Adam(actor.parameters(), lr=3e-4)
    critic_opts = [torch.optim.Adam(critic.parameters(), lr=3e-4) for critic in critics]
    g = torch.Generator().set_state(algo.generator.get_state())
    losses = []
    for step in range(1, 21):
        batch = lab.make_batch(seed=step)
        metrics = algo.update(batch)
        s, a, s2 = batch.obs["state"], batch.action, batch.next_obs["state"]
        noise = (torch.randn(a.shape, generator=g) * 0.2).clamp(-0.5, 0.5)
        with torch.no_grad():
            a2 = (torch.tanh(actor_t(s2)) + noise).clamp(-1, 1)
            x2 = torch.cat([s2, a2], 1)
            q2 = torch.min(critics_t[0](x2), critics_t[1](x2)).squeeze(1)
            y = batch.reward + (~batch.terminated).float() * 0.99 * q2
        total = 0.0
        for critic, opt in zip(critics, critic_opts, strict=True):
            loss = nn.functional.mse_loss(critic(torch.cat([s, a], 1)).squeeze(1), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            total += loss.item()
        losses.append(abs(total - metrics["loss/critic"].item()))
        if step % 2 == 0:
            pi = torch.tanh(actor(s))
            q = critics[0](torch.cat([s, pi], 1))
            loss = -q.mean()
            if name == "td3_bc":
                loss = cfg.alpha / q.abs().mean().detach() * loss + nn.functional.mse_loss(pi, a)
            losses.append(abs(loss.item() - metrics["loss/actor"].item()))
            actor_opt.zero_grad()
            loss.backward()
            actor_opt.step()
            for target, net in zip([actor_t, *critics_t], [actor, *critics], strict=True):
                for old, new in zip(target.parameters(), net.parameters(), strict=True):
                    old.data.mul_(0.995).add_(0.005 * new.data)
    assert max(losses[:3]) < 1e-6  # from equal weights: two critic losses and one of the actor
    assert max(losses) < 1e-5
    lab.assert_same_net(algo.policy.net, actor)
    lab.assert_same_net(algo.policy_target.net, actor_t)
    for member in range(2):
        lab.assert_same_net(algo.critic.net, critics[member], member)
        lab.assert_same_net(algo.critic_target.net, critics_t[member], member)


def test_large_ensembles_layernorm_and_subset_learn(lab):
    algo = lab.make("td3", num_critics=10, target_subset=2, critic_layernorm=True, critic_lr=1e-2)
    batch = lab.make_batch()
    losses = [algo.update(batch)["loss/critic"].item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_explore_is_seeded_noisy_and_inside_the_bounds(lab):
    algo = lab.make("td3", exploration_noise=0.5)
    obs = lab.make_batch(size=200).obs
    draw = lambda seed: algo.explore(obs, torch.Generator().manual_seed(seed))  # noqa: E731
    quiet = algo.policy.act(obs, deterministic=True).chunk[:, 0]
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).abs().max() <= 1.0
    assert (draw(0) - quiet).std() == pytest.approx(0.5, rel=0.25)


def test_frozen_parameters_of_a_policy_stay(lab):
    policy = lab.make_policy("deterministic")
    policy.net[0].requires_grad_(False)
    algo = lab.make("td3", policy=policy, policy_delay=1)
    before = [p.clone() for p in policy.parameters()]
    algo.update(lab.make_batch())
    changed = [not torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True)]
    assert changed == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"algo.gamma=1.5 must lie in \[0, 1\]"),
        ({"tau": 0.0}, r"algo.tau=0.0 must lie in \(0, 1\]"),
        ({"target_subset": 3}, r"algo.target_subset=3 must lie in 0..2"),
        ({"policy_delay": 0}, "algo.policy_delay=0 must be at least 1"),
        ({"updates_per_step": 0.0}, "algo.updates_per_step=0.0 must be above 0"),
        ({"demo_fraction": 1.2}, r"algo.demo_fraction=1.2 must lie in \[0, 1\]"),
        ({"actor_lr": 0.0}, "algo.actor_lr=0.0 must be above 0"),
        ({"exploration_noise": -0.1}, "algo.exploration_noise=-0.1 must be 0 or more"),
    ],
)
def test_config_refuses_what_can_not_work(options, message):
    with pytest.raises(ConfigError, match=message):
        TD3Config(**options)


def test_policies_that_do_not_fit_are_named(lab):
    with pytest.raises(ConfigError, match=r"policy.horizon=4"):
        lab.make("td3", policy=lab.make_policy("deterministic", horizon=4))
    with pytest.raises(ConfigError, match=r"normalise_action='meanstd'"):
        lab.make("td3", policy=lab.make_policy("deterministic", normalise_action="meanstd"))
