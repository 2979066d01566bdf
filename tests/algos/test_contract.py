# SPDX-License-Identifier: Apache-2.0
"""What every reinforcement-learning algorithm promises: state, metrics, determinism."""

import copy

import pytest
import torch

from robopost.errors import CheckpointError

NAMES = ("a2pr", "cal_ql", "cql", "iql", "ppo", "props", "rebrac", "sac", "td3", "td3_bc")


@pytest.mark.parametrize("name", NAMES)
def test_saved_at_n_and_loaded_goes_on_bitwise(lab, name):
    first = lab.make(name)
    for seed in range(3):
        first.update(lab.any_batch(first, seed))
    state = copy.deepcopy(first.state_dict())
    stream = first.generator.get_state()
    second = lab.make(name, seed=5)
    owned = [p for v in vars(second).values() if isinstance(v, torch.nn.Module) for p in v.parameters()]
    places = [p.data_ptr() for p in owned]
    optimizers = {k: v for k, v in vars(second).items() if isinstance(v, torch.optim.Optimizer)}
    masters = {k: v.param_groups[0]["params"][0] for k, v in optimizers.items()}
    second.load_state_dict(state)
    second.generator.set_state(stream)
    assert [p.data_ptr() for p in owned] == places, "loading must not move parameters"
    for key, optimizer in optimizers.items():
        assert getattr(second, key) is optimizer
        assert optimizer.param_groups[0]["params"][0] is masters[key]
    for seed in range(3, 7):
        batch = lab.any_batch(first, seed)
        a, b = first.update(batch), second.update(batch)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    one, two = first.state_dict(), second.state_dict()
    assert one["json"] == two["json"]
    assert one["tensors"].keys() == two["tensors"].keys()
    assert all(torch.equal(one["tensors"][key], two["tensors"][key]) for key in one["tensors"])
    assert first.updates == 7


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_detached_finite_scalars(lab, name):
    algo = lab.make(name)
    for _ in range(2):
        metrics = algo.update(lab.any_batch(algo))
    assert {"loss/actor"} <= metrics.keys()
    for key, value in metrics.items():
        assert value.shape == (), key
        assert not value.requires_grad, key
        assert torch.isfinite(value), key


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_json_and_keeps_global_randomness_alone(lab, name):
    import json

    algo = lab.make(name)
    batch = lab.any_batch(algo)
    before = torch.get_rng_state()
    algo.update(batch)
    assert torch.equal(torch.get_rng_state(), before), "updates draw from the algorithm's own generator only"
    assert json.loads(json.dumps(algo.state_dict()["json"])) is not None


def test_foreign_checkpoints_are_refused(lab):
    state = lab.make("td3").state_dict()
    with pytest.raises(CheckpointError, match=r"lacks|shape|doesn't know"):
        lab.make("sac").load_state_dict(state)
    other = lab.make("td3", num_critics=3)
    with pytest.raises(CheckpointError, match=r"shape"):
        other.load_state_dict(state)
