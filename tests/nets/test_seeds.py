# SPDX-License-Identifier: Apache-2.0
"""Pieces of stacked seeds: a way out of vmap, stacked parameters, noise per seed, batched perceptrons."""

import pytest
import torch
from torch import nn

from robopost.nets import fused
from robopost.nets.ensemble import EnsembleMLP
from robopost.nets.flat import Flat, adam
from robopost.nets.mlp import MLP
from robopost.nets.seeds import SeedNoise, StackedFlat
from robopost.nets.vectorise import available, by_rows, escape, force, vectorise

N = 3


@pytest.fixture(params=["direct", "documented"])
def way(request):
    """Both implementations of `vectorise` and `escape`."""
    if request.param == "direct" and not available():
        pytest.skip("this torch lacks the functions of the direct way")
    force(request.param == "direct")
    yield request.param
    force(None)
    fused.force(None)


def test_the_direct_way_is_taken_on_the_tested_torch():
    assert available()


@pytest.mark.usefixtures("way")
def test_every_slice_gets_its_own_result_and_constants_are_repeated():
    x, y = torch.arange(6.0).view(N, 2), torch.ones(N, 4)
    out = vectorise(lambda a, b: {"dot": a[0].sum() + b[0].sum(), "lr": torch.full((), 0.5)}, [x], [y])
    assert out["dot"].tolist() == [5.0, 9.0, 13.0]
    assert out["lr"].tolist() == [0.5] * N
    with pytest.raises(ValueError, match=r"3 slices|[Ee]xpected all tensors|size"):
        vectorise(lambda a, b: {"x": a[0]}, [x], [y[:2]])


@pytest.mark.usefixtures("way")
def test_escape_sees_all_slices_and_gradients_flow_through_it():
    w = torch.randn(N, 2, requires_grad=True)
    seen = []

    def whole(value, shared, turned):
        seen.append((value.shape, shared.shape, turned.shape, torch.is_grad_enabled()))
        return value * value.detach().sum(), torch.arange(3.0)

    def one(states, _):
        # An argument without a slice is repeated, one whose slices lie elsewhere is turned.
        turned = torch.movedim(states[0].expand(5, 2), 0, 1)
        scaled, index = escape(whole, states[0], torch.zeros(4), turned)
        return {"sum": scaled.sum(), "index": index}

    out = vectorise(one, [w], [w.detach()])
    assert seen == [((N, 2), (N, 4), (N, 2, 5), True)]
    assert torch.equal(out["index"], torch.arange(3.0))
    grad = torch.autograd.grad(out["sum"].sum(), w)[0]
    assert torch.allclose(grad, w.detach().sum().expand(N, 2))


@pytest.mark.usefixtures("way")
def test_a_function_of_rows_is_called_once_for_all_slices():
    table, calls = torch.arange(20.0).view(10, 2), []

    def lookup(index, shift):
        calls.append(index.shape)
        return table[index.tolist()] + shift  # nothing vmap could see through

    index, shift = torch.arange(N * 3).view(N, 3), torch.rand(N, 3, 2)
    out = vectorise(lambda a, b: {"rows": by_rows(lookup, a[0], b[0]).sum(-1)}, [index], [shift])
    assert calls == [(N * 3,)]
    assert torch.equal(out["rows"], (table[index] + shift).sum(-1))
    assert torch.equal(by_rows(lookup, index[0], shift[0]), table[index[0]] + shift[0])


def nets():
    out = []
    for seed in range(N):
        torch.manual_seed(seed)
        out.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    return out


@pytest.mark.usefixtures("way")
def test_stacked_parameters_take_every_seeds_own_step():
    modules, others = nets(), nets()
    flats, single = [Flat(m) for m in modules], [Flat(m) for m in others]
    stacked, target = StackedFlat(flats), StackedFlat(flats)
    names = [name for name, _ in modules[0].named_parameters()]
    ours = adam(stacked, 1e-2)
    theirs = [adam(flat, 1e-2) for flat in single]
    x = torch.randn(N, 8, 3, generator=torch.Generator().manual_seed(0))

    def one(states, inputs):
        params = dict(zip(names, states, strict=True))
        loss = torch.func.functional_call(modules[0], params, (inputs[0],)).square().mean()
        stacked.backward(loss)
        norm = stacked.clip(0.3)
        ours.step()
        target.lerp(stacked, 0.25)
        return {"loss": loss.detach(), "norm": norm}

    old = [flat.data.clone() for flat in single]
    out = vectorise(one, stacked.leaves, [x])
    norms = []
    for seed, (module, flat, optimizer) in enumerate(zip(others, single, theirs, strict=True)):
        loss = module(x[seed]).square().mean()
        flat.backward(loss)
        norms.append(flat.clip(0.3))
        assert torch.allclose(flat.grad, stacked.part(stacked.grad, seed), atol=1e-6)
        optimizer.step()
        assert out["loss"][seed] == pytest.approx(loss.item(), rel=1e-5)
        assert torch.allclose(flat.data, stacked.part(stacked.data, seed), atol=1e-6)
        assert torch.allclose(old[seed].lerp(flat.data, 0.25), target.part(target.data, seed), atol=1e-6)
        assert torch.equal(Flat(modules[seed]).data, old[seed])  # the algorithms' own memory is untouched
    assert torch.allclose(out["norm"], torch.stack(norms), rtol=1e-5)
    assert (out["norm"] > 0.3).any()


def test_joining_and_parting_are_inverse():
    flat = StackedFlat([Flat(module) for module in nets()])
    vectors = [torch.randn(26) for _ in range(N)]
    joined = flat.join(vectors)
    assert joined.shape == (N * 26,)
    assert all(torch.equal(flat.part(joined, seed), vectors[seed]) for seed in range(N))
    assert all(leaf.is_contiguous() and leaf.shape[0] == N for leaf in flat.leaves)


DRAWS = {
    "randn": lambda g: torch.randn((2, 3), generator=g),
    "rand": lambda g: torch.rand(2, 3, generator=g, dtype=torch.float64),
    "randint": lambda g: torch.randint(7, (5,), generator=g),
    "randperm": lambda g: torch.randperm(6, generator=g)[:2],
    "normal": lambda g: torch.normal(0.0, 2.0, (4,), generator=g),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", DRAWS)
def test_every_seed_draws_what_it_would_draw_alone(kind):
    ours, alone = ([torch.Generator().manual_seed(s) for s in range(N)] for _ in range(2))
    noise = SeedNoise(ours)

    def one(states, _):
        noise.anchor = states[0]
        with noise:
            return {"first": DRAWS[kind](ours[0]), "second": DRAWS[kind](ours[0])}

    out = vectorise(one, [torch.zeros(N)], [torch.zeros(N)])
    for key in ("first", "second"):
        assert torch.equal(out[key], torch.stack([DRAWS[kind](g) for g in alone]))
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, alone, strict=True))


@pytest.mark.usefixtures("way")
def test_draws_from_probabilities_and_from_foreign_streams():
    ours = [torch.Generator().manual_seed(s) for s in range(N)]
    noise, chance = SeedNoise(ours), torch.rand(N, 50)

    def one(states, _):
        noise.anchor = states[0]
        with noise:
            return {"coin": torch.bernoulli(states[0], generator=ours[0])}

    out = vectorise(one, [chance], [chance])["coin"]
    for seed in range(N):
        assert torch.equal(
            out[seed], torch.bernoulli(chance[seed], generator=torch.Generator().manual_seed(seed))
        )

    def foreign(states, _):
        noise.anchor = states[0]
        with noise:
            return {"x": states[0] + torch.randn(50)}

    with pytest.raises(RuntimeError, match="random"):
        vectorise(foreign, [chance], [chance])


MAKERS = {
    "one network": lambda width: MLP(5, [width, width], 3),
    "ensemble": lambda width: EnsembleMLP(2, 5, [width, width], 3),
    "linear": lambda width: MLP(5, [], 3),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("width", [16, 256])
@pytest.mark.parametrize("onednn", [True, False])
def test_perceptrons_of_all_seeds_equal_each_seeds_own(kind, width, onednn):
    if onednn and not fused.available():
        pytest.skip("this torch has no oneDNN linear on CPU")
    torch.manual_seed(0)
    net = MAKERS[kind](width)
    names = [name for name, _ in net.named_parameters()]
    params = [torch.randn(N, *p.shape, requires_grad=True) / 8 for p in net.parameters()]
    params = [p.detach().requires_grad_() for p in params]
    x = torch.randn(N, 64, 5, requires_grad=True)

    def one(states, inputs):
        with fused.stacked():
            assert fused.usable(net, inputs[0])
            out = torch.func.functional_call(net, dict(zip(names, states, strict=True)), (inputs[0],))
            frozen = fused.mlp(net, inputs[0], [p.detach() for p in states])
        return {"out": out, "frozen": frozen}

    fused.force(onednn)
    out = vectorise(one, params, [x])
    assert not fused.usable(MLP(5, [4], 2), torch.zeros(2, 5))  # outside of `stacked` as before
    fused.force(False)
    got = torch.autograd.grad(out["out"].square().sum(), [x, *params])
    got_frozen = torch.autograd.grad(out["frozen"].square().sum(), x)[0]
    for seed in range(N):
        mine = {name: p[seed].detach().requires_grad_() for name, p in zip(names, params, strict=True)}
        own = x[seed].detach().requires_grad_()
        expected = torch.func.functional_call(net, mine, (own,))
        torch.testing.assert_close(out["out"][seed], expected)
        torch.testing.assert_close(out["frozen"][seed], expected)
        grads = torch.autograd.grad(expected.square().sum(), [own, *mine.values()])
        for a, b in zip([g[seed] for g in got], grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got_frozen[seed], grads[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"unused|not have been used"):
        torch.autograd.grad(vectorise(one, params, [x])["frozen"].sum(), params)
