# SPDX-License-Identifier: Apache-2.0
"""HNPG's critics: against plain loops and dynamic programming, closed-form regression, values."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.nets.ensemble import EnsembleMLP
from robopost.nets.rows import Regression, Rows, StackedQ, tanh_
from robopost.policies.stepwise import Stepwise, StepwiseConfig

spec = importlib.util.spec_from_file_location("hnpg_lab", Path(__file__).parent / "hnpg_lab.py")
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)
H, D, A = small.H, small.D, small.A
make, tensors = small.make, small.tensors


def plain(net, member):
    layers = []
    for layer in net:
        if hasattr(layer, "weight"):
            linear = nn.Linear(*layer.weight.shape[1:])
            linear.weight.data.copy_(layer.weight[member].t())
            linear.bias.data.copy_(layer.bias[member, 0])
            layers.append(linear)
        else:
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def fitted(net, on, off, steps=30):
    """The released inner loop in plain torch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [(net(x) - y).square().mean() for x, y in (on, off) if len(x)]
        sum(losses).backward()
        optimizer.step()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("hybrid", [True, False])
def test_backward_pass_agrees_with_a_plain_loop(hybrid):
    algo, fresh, old = make(hidden=[8, 6]), tensors(20), tensors(12, seed=1)
    nets = [plain(algo.critic.net, h) for h in range(H)]
    untouched = copy.deepcopy(nets)
    g = torch.Generator().set_state(algo.generator.get_state())
    for round_ in range(2):  # weights go on, Adam begins afresh
        metrics = algo._fit(fresh, old if hybrid else None)
        noise = torch.randn(H, 12, A, generator=g) if hybrid else None
        returns = fresh["reward"].flip(0).cumsum(0).flip(0)
        losses = []
        for h in reversed(range(H)):
            on = torch.cat([fresh["obs/state"][h], fresh["action"][h]], 1), returns[h][:, None]
            off = (torch.zeros(0), torch.zeros(0))
            if noise is not None:
                y = old["reward"][h][:, None]
                if h < H - 1:
                    after = old["next_obs/state"]
                    mean, log_std = algo.policy.heads(after.roll(1, 0))
                    action = (mean + log_std.exp() * noise)[h + 1].clamp(-1, 1)
                    with torch.no_grad():
                        y = y + nets[h + 1](torch.cat([after[h], action], 1))
                off = torch.cat([old["obs/state"][h], old["action"][h]], 1), y.detach()
            losses.append(fitted(nets[h], on, off))
        assert metrics["loss/critic"] == pytest.approx(np.sum(losses, 1).mean(), rel=1e-4), round_
    for h in range(H):
        ours = plain(algo.critic.net, h)
        for a, b, c in zip(ours.parameters(), nets[h].parameters(), untouched[h].parameters(), strict=True):
            assert (a - b).abs().max() < 1e-5
            assert (a - c).abs().max() > 1e-3


def test_without_fresh_rows_it_is_exact_backward_policy_evaluation():
    """A 3-state lock with tabular features: right = +1 switches A and B or pays 1 at the end, the policy takes it."""
    spec = Spec({"state": ((3,), "float32")}, 1, (-1.0,), (1.0,), H)
    policy = Stepwise(StepwiseConfig(hidden=[]), spec)
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
        policy.net[0].bias.fill_(3.0)  # beyond the bound: what is executed is +1
        policy.log_std.fill_(-20.0)
    algo = make(spec=spec, policy=policy, hidden=[32], critic_steps=400, critic_lr=1e-2)
    state, action = torch.arange(3).repeat_interleave(2), torch.tensor([-1.0, 1.0]).repeat(3)
    right = (action > 0) & (state < 2)
    after = torch.where(right, 1 - state, 2)
    reward = torch.zeros(H, 6)
    reward[-1] = torch.where(right, 1.0, 0.1)  # a failure is worth something too
    repeat = lambda x: x.expand(H, *x.shape).clone()  # noqa: E731
    recorded = {
        "obs/state": repeat(torch.eye(3)[state]),
        "next_obs/state": repeat(torch.eye(3)[after]),
        "action": repeat(action[:, None]),
        "reward": reward,
        "discount": torch.ones(H, 6),
    }
    none = {
        "obs/state": torch.zeros(H, 0, 3),
        "action": torch.zeros(H, 0, 1),
        "reward": torch.zeros(H, 0),
        "discount": torch.zeros(H, 0),
        "done": torch.zeros(H, 0, dtype=torch.bool),
    }
    algo._fit(none, recorded)
    exact = torch.zeros(H, 3, 2)
    exact[-1] = reward[-1].view(3, 2)
    for h in (1, 0):
        exact[h] = exact[h + 1][after, 1].view(3, 2)
    q = algo.critic(recorded["obs/state"], recorded["action"])
    assert (q.view(H, 3, 2) - exact).abs().max() < 1e-2


def test_values_average_q_over_executed_actions():
    algo = make(action_samples=7)
    obs = {"state": torch.randn(H, 5, D)}
    g = torch.Generator().set_state(algo.generator.get_state())
    value = algo._heads.value(obs)
    mean, log_std = algo.policy.heads(obs["state"])
    noise = torch.randn(H, 5, 7, A, generator=g)
    actions = (mean[:, :, None] + log_std.exp()[:, :, None] * noise).clamp(-1, 1)
    q = torch.stack([algo.critic(obs["state"], actions[:, :, i]) for i in range(7)], 2)
    assert torch.allclose(value, q.mean(2), atol=1e-5)


def test_minibatches_and_stacking_helpers():
    torch.manual_seed(0)
    net = EnsembleMLP(2, 3, [5], 1, "tanh")
    first = plain(net, 1)
    fit = Regression(net)
    other = net[0].weight[0].clone()
    x, y, pick = torch.randn(9, 3), torch.randn(9, 1), torch.randint(9, (4, 6))
    residual = fit.fit(1, x, y, torch.full((6, 1), 1 / 6), steps=4, lr=3e-4, pick=pick)
    optimizer = torch.optim.Adam(first.parameters(), lr=3e-4)
    for rows in pick:
        loss = (first(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(residual.square().mean(), loss, atol=1e-5)
    for a, b in zip(plain(net, 1).parameters(), first.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6
    assert torch.equal(net[0].weight[0], other)
    with torch.no_grad():
        assert torch.allclose(fit.predict(1, x), first(x), atol=1e-5)
    z = torch.linspace(-20, 20, 1001)
    assert (tanh_(z.clone()) - z.tanh()).abs().max() < 1e-6
    with pytest.raises(ConfigError, match=r"2 stacked members were expected"):
        Rows(nn.Linear(3, 3), 2)
    head = StackedQ(2, 3, 1, [4]).net[2]
    assert head.bias.abs().max() == 0
    assert head.weight.abs().max() <= 0.05
