# SPDX-License-Identifier: Apache-2.0
"""`Stack` on algorithms at hand: what it refuses, what it leaves alone, float64, methods as attributes."""

import importlib.util
from pathlib import Path

import pytest
import torch

from robopost.accel import CudaGraph, leaves
from robopost.algos import stack as stack_module
from robopost.algos.stack import Stack, obstacle
from robopost.errors import ConfigError
from robopost.loops.offline import batch_at

spec = importlib.util.spec_from_file_location("stacked_lab", Path(__file__).parent / "stacked_lab.py")
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
store = lab.store
N = lab.N
OFFLINE = lab.OFFLINE
separate = lab.separate
stacked = lab.stacked
assert_close = lab.assert_close
built = lab.built


def test_obstacles(store):
    (algo, *_), _ = built("td3_bc", store)
    assert obstacle(algo) == ""
    algo.policy.add_module("extra", torch.nn.Dropout(0.5))
    assert obstacle(algo) == "policy has a layer Dropout"
    (algo, *_), _ = built("td3_bc", store)
    algo.other = torch.optim.Adam(list(algo.critic.parameters()))
    assert obstacle(algo) == "other owns parameters outside `Flat`"
    del algo.other
    algo.parts = [algo._actor_flat]
    assert obstacle(algo) == "parts holds state in a list"
    del algo.parts
    algo.critic_optimizer = torch.optim.LBFGS([algo._critic_flat.param])
    assert "LBFGS" in obstacle(algo)
    (algo, *_), _ = built("bc", store)
    type(algo).stackable = False
    try:
        assert obstacle(algo) == "algo=bc can't run under torch.vmap"
        with pytest.raises(ConfigError, match="seeds can't be stacked"):
            Stack([algo])
    finally:
        del type(algo).stackable


def test_algorithms_keep_their_memory_until_stored(store):
    algos, dataset = built("td3_bc", store)
    before = [algo.state_dict()["tensors"]["policy/net.0.weight"].clone() for algo in algos]
    stack = Stack(algos)
    g = torch.Generator().manual_seed(0)
    batch = dataset.sample(N * 8, g).map(lambda tensor: tensor.unflatten(0, (N, -1)))
    for _ in range(2):
        metrics = stack.update(batch)
    assert all(value.shape == (N,) for value in metrics.values())
    for algo, weight in zip(algos, before, strict=True):
        assert torch.equal(algo.policy.net[0].weight, weight)
        assert type(algo.policy.net[0].weight) is torch.nn.Parameter  # nothing of vmap is left behind
        assert algo.updates == 0
    stack.store()
    for algo, weight in zip(algos, before, strict=True):
        assert not torch.equal(algo.policy.net[0].weight, weight)
        assert algo.updates == 2
    other = built("td3_bc", store)[0][0]
    with pytest.raises(ConfigError, match="different numbers of updates"):
        Stack([algos[0], other])


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("algo", [name for name in OFFLINE if name != "prdc"])  # its search is float32
def test_in_double_precision_nothing_but_rounding_differs(algo, store, monkeypatch):
    """The way through a CUDA graph, with an eager stand-in for the graph, against separate seeds.

    In float32, Adam makes visible differences of rounding where a gradient is almost 0; here they stay tiny.
    """
    calls = []

    def fake(fn, mode, *, device, generators):
        assert (mode, len(generators)) == ("cudagraph", N)

        def replay(*args):
            calls.append({tensor.shape[0] for tensor in leaves(args).values()})
            out = fn(*args)
            packed = torch.stack([value.detach().squeeze() for value in out.values()])
            return dict(zip(out, packed.clone().unbind(), strict=True))

        return replay

    monkeypatch.setattr(stack_module, "resolve", lambda mode, device: mode)
    monkeypatch.setattr(stack_module, "accelerate", fake)
    (apart, dataset), (together, _) = built(algo, store), built(algo, store)
    stack = Stack(together, "cudagraph")
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        batch = batch_at(dataset, apart[0], dataset.draw(N * 8, g, chunks=apart[0].needs.chunks))
        batch = batch.map(lambda t: (t.double() if t.is_floating_point() else t).unflatten(0, (N, -1)))
        metrics = stack.update(batch)
        for seed, own in enumerate(apart):
            alone = own.update(batch.map(lambda tensor, seed=seed: tensor[seed]))
            assert alone.keys() == metrics.keys()
            for key, value in alone.items():
                assert metrics[key][seed].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-9)
    assert len(calls) >= 6
    assert all(sizes == {N} for sizes in calls)
    stack.store()
    for a, b in zip(apart, together, strict=True):
        one, two = a.state_dict(), b.state_dict()
        assert one["json"] == two["json"]
        for key, value in one["tensors"].items():
            torch.testing.assert_close(two["tensors"][key], value, rtol=1e-9, atol=1e-9)


def test_methods_kept_as_attributes_see_all_seeds(store):
    """A bound method belongs to one seed's algorithm; in the stack it must not stay with the first."""
    algos, dataset = built("td3_bc", store)
    for algo in algos:
        algo.policy_loss = algo.actor_loss
    kept = type(algos[0]).actor_step
    type(algos[0]).actor_step = _step_by_attribute
    try:
        stack = Stack(algos)
        batch = dataset.sample(N * 8, torch.Generator().manual_seed(0))
        for _ in range(2):
            stack.update(batch.map(lambda tensor: tensor.unflatten(0, (N, -1))))
    finally:
        type(algos[0]).actor_step = kept
    assert seen == [stack._template]


seen = []


def _step_by_attribute(self, batch):
    loss, metrics = self.policy_loss(batch)
    seen.append(self.policy_loss.__self__)
    self._actor_flat.backward(loss)
    return metrics


def test_an_error_leaves_the_algorithms_whole(store):
    algos, dataset = built("td3_bc", store)
    stack = Stack(algos)
    with pytest.raises(Exception):  # noqa: B017 - whatever torch makes of a batch without seeds
        stack.update(dataset.sample(8, torch.Generator().manual_seed(0)))
    assert type(algos[0].policy.net[0].weight) is torch.nn.Parameter
    algos[0].policy.act({"state": torch.zeros(1, 3)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_of_a_stack_are_captured(store):
    algos, dataset = built("td3_bc", store, "device=cuda", mode="cudagraph")
    stack = Stack(algos, "cudagraph")
    g = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(10):
        stack.update(dataset.sample(N * 8, g).map(lambda tensor: tensor.unflatten(0, (N, -1))))
    assert all(graph.captured for graph in stack.graphs)
    assert all(isinstance(graph, CudaGraph) for graph in stack.graphs)
