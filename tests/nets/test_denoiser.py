# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from robopost.errors import ConfigError
from robopost.nets.denoiser import BACKBONES, build_denoiser
from robopost.nets.masked import masked_mean
from robopost.nets.mlp import MLP, ResidualMLP, build_activation
from robopost.nets.time import SinusoidalEmbedding


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("times", [1, 2])
def test_every_input_reaches_every_output(backbone, times):
    torch.manual_seed(0)
    net = build_denoiser(backbone, 8, 3, 5, width=32, depth=2, times=times)
    # adaLN-Zero starts with closed gates: give all parameters values that let the signal through.
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2)
    x = torch.randn(4, 8, 3, requires_grad=True)
    cond = torch.randn(4, 5, requires_grad=True)
    time = [torch.rand(4, requires_grad=True) for _ in range(times)]
    out = net(x, cond, *time)
    assert out.shape == x.shape
    # the last output step of sample 0 depends on the first input step, the condition and each time of sample 0 alone
    grads = torch.autograd.grad(out[0, -1].sum(), [x, cond, *time])
    assert grads[0][0, 0].abs().sum() > 0
    for grad in grads:
        assert grad[0].abs().sum() > 0
        assert grad[1:].abs().sum() == 0


def test_time_embedding_by_hand():
    embed = SinusoidalEmbedding(4, max_frequency=100.0)
    value = embed(torch.tensor([0.5]))[0]
    expected = [math.sin(0.5), math.sin(50.0), math.cos(0.5), math.cos(50.0)]
    torch.testing.assert_close(value, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "unet", "horizon": 6, "width": 32, "depth": 3}, "horizon=6 must be a multiple of 4"),
        ({"backbone": "unet", "horizon": 8, "width": 20, "depth": 2}, "multiples of 8"),
        ({"backbone": "transformer", "horizon": 8, "width": 30, "depth": 1}, "width=30"),
        ({"backbone": "mpl", "horizon": 8, "width": 32, "depth": 1}, "Did you mean 'mlp'"),
        ({"backbone": "mlp", "horizon": 8, "width": 32, "depth": 0}, "depth=0"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    backbone, horizon = options.pop("backbone"), options.pop("horizon")
    with pytest.raises(ConfigError, match=message):
        build_denoiser(backbone, horizon, 2, 4, **options)


def test_mlp_orthogonal_init_and_layernorm():
    net = MLP(6, [32, 32], 4, "tanh", layernorm=True, init="orthogonal", out_gain=0.01)
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == ["Linear", "LayerNorm", "Tanh", "Linear", "LayerNorm", "Tanh", "Linear"]
    torch.testing.assert_close(net[3].weight @ net[3].weight.T, 2 * torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(net[6].weight @ net[6].weight.T, 1e-4 * torch.eye(4), atol=1e-9, rtol=0)
    assert not net[0].bias.any()
    with pytest.raises(ConfigError, match="'orthogonal'"):
        MLP(1, [], 1, init="ortogonal")
    with pytest.raises(ConfigError, match="Did you mean 'relu'"):
        build_activation("rely")


def test_residual_mlp_is_the_stated_sum():
    torch.manual_seed(0)
    net = ResidualMLP(3, 8, 2, 2, "tanh")
    x = torch.randn(5, 3)
    h = net.inp(x)
    for block in net.blocks:
        norm, act, first, act2, second = block
        h = h + second(act2(first(act(norm(h)))))
    torch.testing.assert_close(net(x), net.out(h))


def test_masked_mean_by_hand():
    value = torch.tensor([[[1.0, 3.0], [100.0, 100.0]], [[5.0, 7.0], [0.0, 2.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(value, mask).item() == pytest.approx((1 + 3 + 5 + 7 + 0 + 2) / 6)
    assert masked_mean(value, torch.zeros_like(mask)).item() == 0.0
