# SPDX-License-Identifier: Apache-2.0
"""TD3+BC: the acceptance checks of its actor loss. (The 20-update agreement is in test_td3.py.)"""

import pytest
import torch
from torch import nn

from robopost.algos.offline.td3_bc import TD3BCConfig, td3_bc_loss
from robopost.errors import ConfigError


def actor_gradient(algo, batch):
    loss, _ = algo.actor_loss(batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(algo.policy.parameters()))])


def test_loss_by_hand():
    q, action, data = torch.tensor([2.0, -4.0]), torch.tensor([[0.5], [0.0]]), torch.tensor([[0.0], [1.0]])
    loss, cloning = td3_bc_loss(q, action, data, 2.5)
    assert cloning == pytest.approx((0.25 + 1.0) / 2)
    assert loss == pytest.approx(0.625 - 2.5 / 3.0 * -1.0)


def test_alpha_zero_is_behaviour_cloning(lab):
    algo, batch = lab.make("td3_bc", alpha=0.0), lab.make_batch()
    loss = nn.functional.mse_loss(algo.policy(batch.obs)[:, 0], batch.action)
    cloning = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(algo.policy.parameters()))])
    assert torch.allclose(actor_gradient(algo, batch), cloning, atol=1e-8)


def test_scaling_q_leaves_the_actor_gradient_unchanged(lab):
    algo, batch = lab.make("td3_bc"), lab.make_batch()
    before = actor_gradient(algo, batch)
    with torch.no_grad():
        last = algo.critic.net[len(algo.critic.net) - 1]
        last.weight.mul_(37.0)
        last.bias.mul_(37.0)
    assert torch.allclose(actor_gradient(algo, batch), before, rtol=1e-4, atol=1e-7)


def test_summed_form_of_rebrac_has_the_same_direction(lab):
    """beta1 * sum_dims (pi - a)^2 - Q / mean|Q| with beta1 = 1 / (alpha A) is TD3+BC's loss over alpha."""
    algo, batch = lab.make("td3_bc"), lab.make_batch()
    action = algo.policy(batch.obs)[:, 0]
    q = algo.critic(batch.obs, action)[0]
    beta = 1 / (2.5 * 2)
    loss = (beta * (action - batch.action).square().sum(1) - q / q.abs().mean().detach()).mean()
    other = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(algo.policy.parameters()))])
    assert torch.allclose(actor_gradient(algo, batch), 2.5 * other, rtol=1e-4, atol=1e-7)


def test_config():
    with pytest.raises(ConfigError, match=r"algo.alpha=-1.0 must be 0"):
        TD3BCConfig(alpha=-1.0)
    assert TD3BCConfig().alpha == 2.5
