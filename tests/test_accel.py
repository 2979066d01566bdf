# SPDX-License-Identifier: Apache-2.0
"""Acceleration: modes, errors, and equality of accelerated and plain updates."""

import gc
import importlib.util
from pathlib import Path

import pytest
import torch

from robopost.accel import (
    CudaGraph,
    accelerate,
    configure,
    keep_memory,
    leaves,
    map_tensors,
    resolve,
    startup_frozen,
)
from robopost.config import AccelConfig
from robopost.errors import ConfigError, DataError

CPU = torch.device("cpu")
spec = importlib.util.spec_from_file_location("algo_lab", Path(__file__).parent / "algos" / "conftest.py")
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)


def test_auto_is_eager_on_cpu_and_graphs_on_cuda():
    assert resolve("auto", CPU) == "eager"
    assert resolve("auto", torch.device("cuda")) == "cudagraph"
    with pytest.raises(ConfigError, match=r"accel.mode=cudagraph needs device=cuda"):
        resolve("cudagraph", CPU)
    with pytest.raises(ConfigError, match=r"Did you mean 'eager'"):
        resolve("eagre", CPU)
    with pytest.raises(ConfigError, match=r"accel.threads=-1"):
        configure(AccelConfig(threads=-1))
    fn = lambda: {}  # noqa: E731
    assert accelerate(fn, "auto", device=CPU) is fn


def test_memory_settings_of_the_user_come_first(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert not keep_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert keep_memory() in (True, False)
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_memory()


def test_inputs_have_readable_names():
    batch = lab.make_batch(4)
    names = leaves((batch, None, torch.zeros(1)))
    assert {"0.obs.state", "0.action", "0.discount", "2"} <= names.keys()
    doubled = map_tensors(batch, lambda name, tensor: tensor * 2 if name == "reward" else tensor)
    assert torch.equal(doubled.reward, batch.reward * 2)
    assert torch.equal(doubled.action, batch.action)
    assert doubled.chain is None


def fake_captured(args):
    """A graph that is captured without a GPU: only the input checks are under test."""
    graph = CudaGraph(lambda batch: {})
    graph._static = args
    graph._leaves = leaves(args)
    graph._graph = object()
    return graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: lab.make_batch(5), r"input '0\..*' has shape \(5,.*captured with \(4,"),
        (lambda b: b.map(lambda t: t.double()), r"has dtype torch.float64"),
        (lambda b: b.map(lambda t: t.to("meta")), r"has device meta"),
        (lambda b: map_tensors(b, lambda n, t: t) and _with_extra(b), r"input '0.extra.more' is new"),
    ],
)
def test_changed_inputs_are_named(change, message):
    batch = lab.make_batch(4)
    with pytest.raises(DataError, match=message):
        fake_captured((batch,))(change(batch))


def _with_extra(batch):
    from dataclasses import replace

    return replace(batch, extra={"more": torch.zeros(4)})


def run(name, mode, device, updates=6):
    torch.manual_seed(0)
    cls, config_cls, kind = lab.CLASSES[name]
    policy = lab.make_policy(kind).to(device)
    generator = torch.Generator(device=device).manual_seed(3)
    algo = cls(config_cls(hidden=[16, 16]), policy, lab.SPEC, device=device, generator=generator)
    algo.accelerate(mode)
    losses = []
    for seed in range(updates):
        metrics = algo.update(lab.make_batch(seed=seed).to(device))
        losses.append({key: value.item() for key, value in metrics.items()})
    return algo, losses


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones():
    eager, expected = run("td3_bc", "eager", CPU)
    compiled, got = run("td3_bc", "compile", CPU)
    for a, b in zip(expected, got, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=1e-5) for key in a)
    for a, b in zip(eager.policy.parameters(), compiled.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["td3", "td3_bc", "sac", "iql"])
def test_captured_updates_equal_eager_ones(name):
    device = torch.device("cuda")
    eager, expected = run(name, "eager", device, updates=12)
    captured, got = run(name, "cudagraph", device, updates=12)
    assert any(isinstance(v, CudaGraph) and v.captured for v in vars(captured).values())
    for a, b in zip(expected, got, strict=True):
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5) for key in a)
    for a, b in zip(eager.policy.parameters(), captured.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    state = captured.state_dict()
    captured.load_state_dict(state)
    assert not any(isinstance(v, CudaGraph) and v.captured for v in vars(captured).values())
    captured.update(lab.make_batch(seed=99).to(device))


def test_startup_objects_are_left_alone_only_within_the_context_and_only_once():
    @startup_frozen()
    def fails():
        frozen = gc.get_freeze_count()
        assert frozen > 1000
        with startup_frozen():  # somebody else's freeze stays his
            pass
        assert gc.get_freeze_count() == frozen
        raise ValueError("inside")

    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match="inside"):
        fails()
    assert gc.get_freeze_count() == 0
