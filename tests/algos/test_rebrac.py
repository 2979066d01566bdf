# SPDX-License-Identifier: Apache-2.0
"""ReBRAC: its acceptance checks and agreement with the reference's formulas."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from robopost.algos.offline.rebrac import ReBRACConfig, rebrac_loss, squared_distance
from robopost.errors import ConfigError, DataError


def actor_gradient(algo, batch):
    loss, _ = algo.actor_loss(batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(algo.policy.parameters()))])


def reference_critic(net, member):
    """The reference's layers, linear, ReLU, LayerNorm, with one member's weights."""
    layers = []
    for layer in net:
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.ReLU):
            layers.append(nn.ReLU())
        elif weight.dim() == 3 and weight.shape[1] > 1:
            linear = nn.Linear(weight.shape[1], weight.shape[2])
            linear.weight.data.copy_(weight[member].t())
            linear.bias.data.copy_(layer.bias[member, 0])
            layers.append(linear)
        else:
            norm = nn.LayerNorm(weight.shape[-1])
            norm.weight.data.copy_(weight[member, 0])
            norm.bias.data.copy_(layer.bias[member, 0])
            layers.append(norm)
    return nn.Sequential(*layers)


def test_losses_by_hand():
    distance = squared_distance(
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    )
    assert distance.tolist() == [5.0, 9.0]
    loss = rebrac_loss(torch.tensor([2.0, -4.0]), distance, 0.1)
    assert loss == pytest.approx(0.1 * 7 + 1 / 3)


def test_without_its_additions_it_is_td3_bc_over_alpha(lab):
    """beta_1 = 1 / (alpha A), one critic, no LayerNorm: the gradient is TD3+BC's over alpha; beta_2 = 0: so is
    the critic's step."""
    options = {"num_critics": 1, "critic_lr": 3e-4}
    ours = lab.make(
        "rebrac", critic_layernorm=False, actor_bc_coef=1 / (2.5 * 2), critic_bc_coef=0.0, **options
    )
    theirs = lab.make("td3_bc", **options)
    for name in ("critic", "critic_target"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    batch = lab.make_batch()
    assert torch.allclose(
        actor_gradient(theirs, batch), 2.5 * actor_gradient(ours, batch), rtol=1e-4, atol=1e-7
    )
    losses = [algo.update(batch)["loss/critic"].item() for algo in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(ours.critic.parameters(), theirs.critic.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_the_actor_takes_the_smallest_critic_and_sums_over_dimensions(lab):
    algo, batch = lab.make("rebrac", actor_bc_coef=0.3), lab.make_batch()
    action = algo.policy(batch.obs)[:, 0]
    q = algo.critic(batch.obs, action)
    assert not torch.equal(q.argmin(0), torch.zeros(32, dtype=torch.int64))
    loss = (0.3 * (action - batch.action).square().sum(1) - q.amin(0) / q.amin(0).abs().mean()).mean()
    assert algo.actor_loss(batch)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_penalty_counts_only_where_the_next_action_is_known(lab):
    batch = lab.make_batch()
    unknown = replace(batch, extra=batch.extra | {"next_action_mask": torch.zeros(32, dtype=torch.bool)})
    with_penalty = lab.make("rebrac", critic_bc_coef=0.5).update(batch)
    without = lab.make("rebrac", critic_bc_coef=0.5).update(unknown)
    plain = lab.make("rebrac", critic_bc_coef=0.0).update(batch)
    assert with_penalty["value/penalty"] > 0 == without["value/penalty"]
    assert without["loss/critic"] == plain["loss/critic"] != with_penalty["loss/critic"]
    with pytest.raises(DataError, match="next_action"):
        lab.make("rebrac").update(replace(batch, extra=None))
    assert lab.make("rebrac").needs.extra == ("next_action",)


def test_critics_have_the_reference_s_form(lab):
    algo = lab.make("rebrac", hidden=[16, 16, 16])
    kinds = [type(layer).__name__ for layer in algo.critic.net]
    assert kinds == ["EnsembleLinear", "ReLU", "EnsembleLayerNorm"] * 3 + ["EnsembleLinear"]
    assert all((algo.critic.net[i].bias == 0.1).all() for i in (0, 3, 6))
    assert 2e-3 < algo.critic.net[9].weight.abs().max() <= 3e-3
    assert len(lab.make("rebrac", critic_layernorm=False).critic.net) == 5
    batch = lab.make_batch()
    x = torch.cat([batch.obs["state"], batch.action], 1)
    for member in range(2):
        plain = reference_critic(algo.critic.net, member)(x)[:, 0]
        assert torch.allclose(plain, algo.critic(batch.obs, batch.action)[member], atol=1e-6)


def test_twenty_updates_agree_with_the_formulas(lab):
    """Separate networks, default Adam, one operation per line: losses and parameters to 1e-5."""
    algo = lab.make("rebrac", hidden=[16, 16, 16], actor_bc_coef=0.05, critic_bc_coef=0.5)
    actor = lab.plain_layers(algo.policy.net)
    critics = [reference_critic(algo.critic.net, member) for member in range(2)]
    actor_t, critics_t = copy.deepcopy(actor), copy.deepcopy(critics)
    actor_opt = torch.optim.Adam(actor.parameters(), lr=1e-3)
    critic_opts = [torch.optim.Adam(critic.parameters(), lr=1e-3) for critic in critics]
    g = torch.Generator().set_state(algo.generator.get_state())
    for step in range(1, 21):
        batch = lab.make_batch(seed=step)
        metrics = algo.update(batch)
        s, a, s2 = batch.obs["state"], batch.action, batch.next_obs["state"]
        with torch.no_grad():
            noise = (torch.randn(a.shape, generator=g) * 0.2).clamp(-0.5, 0.5)
            a2 = (torch.tanh(actor_t(s2)) + noise).clamp(-1, 1)
            q2 = torch.min(*(net(torch.cat([s2, a2], 1)).squeeze(1) for net in critics_t))
            penalty = ((a2 - batch.extra["next_action"]) ** 2).sum(1) * batch.extra["next_action_mask"]
            y = batch.reward + (~batch.terminated).float() * 0.99 * (q2 - 0.5 * penalty)
        total = 0.0
        for critic, opt in zip(critics, critic_opts, strict=True):
            loss = ((critic(torch.cat([s, a], 1)).squeeze(1) - y) ** 2).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            total += loss.item()
        assert metrics["loss/critic"].item() == pytest.approx(total, abs=1e-5)
        if step % 2 == 0:
            pi = torch.tanh(actor(s))
            q = torch.min(*(net(torch.cat([s, pi], 1)).squeeze(1) for net in critics))
            loss = (0.05 * ((pi - a) ** 2).sum(1) - q / q.abs().mean().detach()).mean()
            assert metrics["loss/actor"].item() == pytest.approx(loss.item(), abs=1e-5)
            actor_opt.zero_grad()
            loss.backward()
            actor_opt.step()
            for target, net in zip([actor_t, *critics_t], [actor, *critics], strict=True):
                for old, new in zip(target.parameters(), net.parameters(), strict=True):
                    old.data.mul_(0.995).add_(0.005 * new.data)
    lab.assert_same_net(algo.policy.net, actor)
    lab.assert_same_net(algo.policy_target.net, actor_t)
    for nets, ours in ((critics, algo.critic.net), (critics_t, algo.critic_target.net)):
        for member, net in enumerate(nets):
            for a, b in zip(reference_critic(ours, member).parameters(), net.parameters(), strict=True):
                assert torch.allclose(a, b, atol=1e-5)


def test_chain_is_solved_where_cloning_goes_the_wrong_way(lab, chain):
    spec, data, states = chain
    extra = {"next_action": data.action, "next_action_mask": torch.zeros(len(data), dtype=torch.bool)}
    algo = lab.make("rebrac", spec=spec, tau=0.05, actor_bc_coef=0.05)
    for _ in range(600):
        algo.update(replace(data, extra=extra))
    assert (algo.policy(states) > 0).all()


def test_config():
    for name in ("actor_bc_coef", "critic_bc_coef"):
        with pytest.raises(ConfigError, match=rf"algo.{name}=-1.0 must be 0 or more"):
            ReBRACConfig(**{name: -1.0})
    assert (ReBRACConfig().batch_size, ReBRACConfig().hidden) == (1024, [256, 256, 256])
