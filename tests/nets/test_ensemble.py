# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from robopost.errors import ConfigError
from robopost.nets.ensemble import EnsembleMLP
from robopost.nets.mlp import MLP


def members_of(net: EnsembleMLP, layernorm: bool) -> list[nn.Sequential]:
    """The same networks as plain torch modules, built from the documented weight layout (E, in, out)."""
    out = []
    for e in range(net.members):
        layers: list[nn.Module] = []
        for layer in net:
            weight = getattr(layer, "weight", None)
            if weight is None:
                layers.append(type(layer)())
            elif layer.__class__.__name__ == "EnsembleLayerNorm":
                norm = nn.LayerNorm(weight.shape[-1])
                norm.weight.data, norm.bias.data = weight[e, 0].clone(), layer.bias[e, 0].clone()
                layers.append(norm)
            else:
                linear = nn.Linear(weight.shape[1], weight.shape[2])
                linear.weight.data, linear.bias.data = weight[e].T.clone(), layer.bias[e, 0].clone()
                layers.append(linear)
        out.append(nn.Sequential(*layers))
    return out


@pytest.mark.parametrize("layernorm", [False, True])
def test_equals_separate_networks_forward_and_gradient(layernorm):
    torch.manual_seed(0)
    net = EnsembleMLP(3, 5, [16, 8], 2, "tanh", layernorm)
    if layernorm:
        for layer in net:
            if layer.__class__.__name__ == "EnsembleLayerNorm":
                layer.weight.data.uniform_(0.5, 1.5)
                layer.bias.data.normal_()
    singles = members_of(net, layernorm)
    x = torch.randn(7, 5)
    out = net(x)
    assert out.shape == (3, 7, 2)
    expected = torch.stack([single(x) for single in singles])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for e, single in enumerate(singles):
        torch.testing.assert_close(net[0].weight.grad[e].T, single[0].weight.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net[-1].bias.grad[e, 0], single[-1].bias.grad, atol=1e-5, rtol=1e-5)


def test_own_input_for_each_member():
    net = EnsembleMLP(2, 3, [8], 1)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(net(x), torch.stack([net(x[0])[0], net(x[1])[1]]))


def test_members_differ_and_start_like_torch_linear():
    torch.manual_seed(1)
    net = EnsembleMLP(2, 100, [400], 1)
    first, second = net[0].weight
    assert not torch.equal(first, second)
    for weight in (first, second):
        assert weight.abs().max() <= 1 / math.sqrt(100)
        assert weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)  # std of U(-0.1, 0.1)


@pytest.mark.parametrize("build", [MLP, lambda *sizes: EnsembleMLP(2, *sizes)])
def test_layers_without_units_are_refused(build):
    for hidden in ([0], [8, 0], [-3]):
        with pytest.raises(ConfigError, match=r"hidden=\[.*at least 1 unit"):
            build(3, hidden, 1)
    assert build(3, [], 1)(torch.zeros(5, 3)).shape[-2:] == (5, 1)


def test_no_members_is_refused():
    with pytest.raises(ConfigError, match="members=0"):
        EnsembleMLP(0, 1, [], 1)
