# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from robopost.data.batch import Spec
from robopost.nets import fused
from robopost.nets.ensemble import EnsembleMLP
from robopost.nets.mlp import MLP, ResidualMLP
from robopost.nets.value import QEnsemble

SIZES = (23, [256, 256], 6)


@pytest.fixture(autouse=True)
def _reset():
    if not fused.available():
        pytest.skip("this torch has no oneDNN linear on CPU")
    yield
    fused.force(None)


def gradients(net, x, enabled):
    fused.force(enabled)
    assert fused.usable(net, x) == enabled
    out = net(x)
    return [out, *torch.autograd.grad(out.square().mean(), [x, *net.parameters()])]


@pytest.mark.parametrize(
    "make", [lambda: MLP(*SIZES), lambda: EnsembleMLP(1, *SIZES), lambda: EnsembleMLP(3, *SIZES)]
)
def test_values_and_all_gradients_equal_the_plain_network(make):
    torch.manual_seed(0)
    net, x = make(), torch.randn(64, 23, requires_grad=True)
    for ours, theirs in zip(gradients(net, x, True), gradients(net, x, False), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-4)


def test_frozen_q_has_the_plain_gradient_in_the_action_and_none_in_the_weights():
    spec = Spec({"state": ((17,), "float32")}, 6, (-1.0,) * 6, (1.0,) * 6)
    q = QEnsemble(spec, ["state"], [256, 256], 3)
    obs, action = {"state": torch.randn(64, 17)}, torch.randn(64, 6, requires_grad=True)
    results = []
    for enabled in (True, False):
        fused.force(enabled)
        value = q.frozen(obs, action, members=2)
        assert value.shape == (2, 64)
        assert torch.allclose(value, q(obs, action)[:2], atol=1e-5)
        results.append(torch.autograd.grad(value.sum(), action)[0])
        with pytest.raises(RuntimeError, match=r"unused|not have been used"):
            torch.autograd.grad(q.frozen(obs, action).sum(), list(q.parameters()))
    assert torch.allclose(*results, atol=1e-5)


def test_only_large_relu_perceptrons_take_the_fused_path():
    fused.force(True)
    x = torch.randn(64, 23)
    assert fused.usable(MLP(*SIZES), x)
    assert not fused.usable(MLP(*SIZES), x[:1])
    assert not fused.usable(MLP(23, [16], 6), x)
    assert not fused.usable(MLP(23, [256, 256], 6, "tanh"), x)
    assert not fused.usable(MLP(23, [256, 256], 6, layernorm=True), x)
    assert not fused.usable(EnsembleMLP(2, *SIZES, layernorm=True), x)
    assert not fused.usable(MLP(*SIZES).double(), x.double())
    assert not fused.usable(MLP(*SIZES), x[None])


def test_the_check_of_the_kernels_leaves_the_random_stream_alone():
    before = torch.get_rng_state()
    fused.available.cache_clear()
    assert fused.available()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kept", [0, 3, 40, 64])
@pytest.mark.parametrize("make", [lambda: MLP(*SIZES), lambda: EnsembleMLP(1, *SIZES)])
def test_rows_without_a_gradient_are_left_out_and_change_nothing(make, kept):
    torch.manual_seed(0)
    net, x = make(), torch.randn(64, 23, requires_grad=True)
    mask = torch.randperm(64) < kept
    results = []
    for enabled in (True, False):
        fused.force(enabled)
        loss = torch.where(mask[:, None], net(x), 0.0).square().sum()
        results.append(torch.autograd.grad(loss, [x, *net.parameters()]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (results[0][0].any(-1) == mask).all()


def test_a_backward_pass_sees_only_the_rows_it_needs(monkeypatch):
    fused.force(True)
    net, x = MLP(*SIZES), torch.randn(256, 23)
    out = torch.where((torch.arange(256) < 70)[:, None], net(x), 0.0).sum()
    rows = []
    plain = fused._dense
    monkeypatch.setattr(fused, "_dense", lambda a, *rest: (rows.append(min(a.shape)), plain(a, *rest))[1])
    torch.autograd.grad(out, list(net.parameters()))
    assert max(rows) <= 96


@pytest.mark.parametrize("options", [{"activation": "relu", "layernorm": False}, {"activation": "mish"}])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_residual_network_has_the_plain_values_and_gradients(blocks, options):
    torch.manual_seed(0)
    net, x = ResidualMLP(23, 256, blocks, 6, **options), torch.randn(4, 16, 23, requires_grad=True)
    results = []
    for enabled in (True, False):
        fused.force(enabled)
        out = net(x)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *net.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.detach().abs().max()))


def test_a_linear_layer_has_the_plain_values_and_gradients():
    torch.manual_seed(0)
    weight, bias = torch.randn(256, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    x = torch.randn(3, 20, 256, requires_grad=True)
    results = []
    for enabled in (True, False):
        fused.force(enabled)
        out = fused.linear(x, weight, bias)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, weight, bias])])
        with torch.no_grad():
            assert torch.equal(fused.linear(x, weight, bias), out)
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.detach().abs().max()))
