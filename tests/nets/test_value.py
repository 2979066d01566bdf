# SPDX-License-Identifier: Apache-2.0
"""Q-functions of several actions per observation."""

import pytest
import torch

from robopost.data.batch import Spec
from robopost.nets import value
from robopost.nets.value import QEnsemble

SPEC = Spec({"state": ((4,), "float32"), "goal": ((2, 2), "float32")}, 3, (-1.0,) * 3, (1.0,) * 3, 10)


@pytest.mark.parametrize("block", [1, 20, 10_000])
@pytest.mark.parametrize("history", [1, 2])
def test_many_actions_are_one_forward_each(block, history, monkeypatch):
    """Values and gradients, whatever the size of the blocks: 7 x 5 rows in 7, in 2 with a remainder, in 1."""
    monkeypatch.setattr(value, "BLOCK_ROWS", block)
    torch.manual_seed(0)
    net = QEnsemble(SPEC, ["state", "goal"], [8, 8], 2, history=history)
    lead = (history,) if history > 1 else ()
    obs = {"state": torch.randn(7, *lead, 4), "goal": torch.randn(7, *lead, 2, 2)}
    actions = torch.randn(7, 5, 3)
    together = net.many(obs, actions)
    alone = torch.stack([net(obs, actions[:, k]) for k in range(5)], -1)
    assert together.shape == (2, 7, 5)
    assert torch.allclose(together, alone, atol=1e-6)
    weight = torch.randn(2, 7, 5)
    ours = torch.autograd.grad((weight * together).sum(), list(net.parameters()))
    theirs = torch.autograd.grad((weight * alone).sum(), list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_orthogonal_gains():
    net = QEnsemble(SPEC, ["state"], [8, 8], 2, orthogonal=True, out_gain=0.5)
    layers = [layer for layer in net.net if hasattr(layer, "weight")]
    assert torch.allclose(layers[1].weight[0] @ layers[1].weight[0].t(), 2 * torch.eye(8), atol=1e-5)
    assert torch.allclose(layers[2].weight.norm(dim=1), torch.full((2, 1), 0.5), atol=1e-6)
    assert all((layer.bias == 0).all() for layer in layers)
