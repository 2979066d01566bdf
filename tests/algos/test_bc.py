# SPDX-License-Identifier: Apache-2.0
import copy
import math
from dataclasses import replace

import pytest
import torch

from robopost.algos.offline.bc import BC, BCConfig, learning_rate
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.policies.base import build_policy
from robopost.policies.deterministic import Deterministic, DeterministicConfig
from robopost.policies.diffusion import DiffusionConfig
from robopost.policies.flow import FlowConfig
from robopost.policies.gaussian import GaussianConfig
from robopost.policies.tokens import TokenMLPConfig
from robopost.registry import POLICIES

SPEC = Spec({"state": ((3,), "float32")}, 2, (-1.0, -1.0), (1.0, 1.0), 50)
CONFIGS = {
    "deterministic": DeterministicConfig(hidden=[16], horizon=4, history=2),
    "gaussian": GaussianConfig(hidden=[16], horizon=4, history=2),
    "token": TokenMLPConfig(hidden=[16], horizon=4, history=2, bins=9),
    "flow": FlowConfig(width=16, depth=1, horizon=4, history=2, steps=4),
    "diffusion": DiffusionConfig(width=16, depth=1, horizon=4, history=2, steps=4, train_steps=10),
}


def make(policy="deterministic", **options):
    torch.manual_seed(0)
    built = build_policy(CONFIGS[policy], SPEC)
    generator = torch.Generator().manual_seed(1)
    return BC(
        BCConfig(batch_size=16, **options), built, SPEC, device=torch.device("cpu"), generator=generator
    )


def make_batch(seed=0, size=16):
    """Chunks that are a simple function of the newest observation; the last steps of some are padding."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.rand(size, 2, 3, generator=generator) - 0.5
    chunk = state[:, -1:, :2].expand(-1, 4, -1).clone()
    mask = torch.arange(4) < torch.randint(1, 5, (size, 1), generator=generator)
    flags = torch.zeros(size, dtype=torch.bool)
    return Batch(
        {"state": state}, chunk, torch.zeros(size), {}, flags, flags, torch.ones(size), chunk_mask=mask
    )


def test_every_policy_with_weights_of_its_own_is_covered():
    # No weights to clone into, a correction on another policy, one that needs a coefficient (test_famo2o.py), the step
    # of the episode (test_hnpg.py) or discrete actions (test_categorical.py).
    # Those that need images: test_token_vla_training.py, test_flow_vla_training.py, tests/lerobot.
    other = {"pretrained", "reference", "residual", "residual_gaussian", "family", "stepwise", "categorical"}
    other |= {"token_vla", "flow_vla", "lerobot"}
    assert {entry.name for entry in POLICIES} - other == set(CONFIGS)


@pytest.mark.parametrize("policy", CONFIGS)
def test_learns_and_exports_a_policy_that_acts(policy):
    algo = make(policy, lr=5e-3, ema=0.9, warmup=5)
    with torch.no_grad():
        before = algo.policy.bc_loss(*loss_arguments(make_batch(99, 256)))
    for step in range(150):
        metrics = algo.update(make_batch(step))
    assert {"loss/bc", "grad/norm", "lr"} <= metrics.keys()
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    exported = algo.export_policy()
    with torch.no_grad():
        after = exported.bc_loss(*loss_arguments(make_batch(99, 256)))
    assert after < before - 0.3 * abs(before)
    assert exported.act(make_batch().obs, deterministic=True).chunk.shape == (16, 4, 2)


def loss_arguments(batch):
    return batch.obs, batch.action, batch.chunk_mask, torch.Generator().manual_seed(5)


def test_one_update_is_adamw_on_the_clipped_gradient():
    algo = make(lr=1e-2, warmup=0, weight_decay=0.1, grad_clip=0.05, ema=0.0)
    twin = copy.deepcopy(algo.policy)
    batch = make_batch()
    metrics = algo.update(batch)
    loss = twin.bc_loss(batch.obs, batch.action, batch.chunk_mask, None)
    loss.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in twin.parameters()))
    assert norm > 0.05
    torch.testing.assert_close(metrics["grad/norm"], norm)
    torch.testing.assert_close(metrics["loss/bc"], loss.detach())
    for ours, theirs in zip(algo.policy.parameters(), twin.parameters(), strict=True):
        # first AdamW step: decay, then lr * g / (|g| + eps) after bias correction
        grad = theirs.grad * 0.05 / (norm + 1e-6)
        expected = theirs.detach() * (1 - 1e-2 * 0.1) - 1e-2 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(ours.detach(), expected, atol=2e-5, rtol=1e-4)


def test_learning_rate_warms_up_then_follows_the_cosine():
    config = BCConfig(lr=1.0, warmup=10, decay_steps=100)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(4, config) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.04)))
    assert learning_rate(50, config) == pytest.approx(0.5)
    assert learning_rate(100, config) == pytest.approx(0.0)
    assert learning_rate(500, config) == pytest.approx(0.0)
    assert learning_rate(500, BCConfig(lr=1.0, warmup=10)) == 1.0


def test_average_follows_its_formula_and_stays_out_of_training():
    algo = make(lr=1e-2, warmup=0, ema=0.99)
    expected = [parameter.detach().clone() for parameter in algo.policy.parameters()]
    for step in range(5):
        algo.update(make_batch(step))
        decay = min(0.99, (2 + step) / (11 + step))
        for average, parameter in zip(expected, algo.policy.parameters(), strict=True):
            average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
    for average, ours in zip(expected, algo.export_policy().parameters(), strict=True):
        torch.testing.assert_close(ours, average)
        assert not ours.requires_grad
    assert algo.export_policy() is not algo.policy
    assert make(ema=0.0).export_policy().registry_name == "deterministic"


def test_average_shares_the_normaliser():
    algo = make(ema=0.99)
    stats = {"state": {"mean": [1.0] * 3, "std": [2.0] * 3}, "action": {"count": 3}}
    algo.policy.normaliser.fit(stats, source="later")
    assert algo.export_policy().normaliser.provenance["source"] == "later"
    torch.testing.assert_close(algo.export_policy().normaliser.obs_scale_state, torch.full((3,), 2.0))


def test_padding_changes_nothing():
    first, second = make(), make()
    batch = make_batch()
    other = replace(batch, action=torch.where(batch.chunk_mask.unsqueeze(-1), batch.action, 9.0))
    assert not torch.equal(batch.action, other.action)
    torch.testing.assert_close(
        first.update(batch)["loss/bc"], second.update(other)["loss/bc"], rtol=0, atol=0
    )
    for ours, theirs in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_held_padding_is_learnt():
    batch = make_batch()
    algo = make(padding="hold", ema=0.0)
    expected = algo.policy.bc_loss(batch.obs, batch.action, torch.ones_like(batch.chunk_mask), None).detach()
    assert not torch.equal(
        expected, algo.policy.bc_loss(batch.obs, batch.action, batch.chunk_mask, None).detach()
    )
    torch.testing.assert_close(algo.update(batch)["loss/bc"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["flow", "gaussian"])
def test_state_round_trip_continues_bitwise(policy):
    straight, resumed = make(policy), make(policy)
    for step in range(3):
        straight.update(make_batch(step))
        resumed.update(make_batch(step))
    state, stream = resumed.state_dict(), resumed.generator.get_state()
    fresh = make(policy)
    fresh.generator.set_state(stream)
    fresh.load_state_dict(state)
    for step in range(3, 6):
        straight.update(make_batch(step))
        fresh.update(make_batch(step))
    left, right = straight.state_dict()["tensors"], fresh.state_dict()["tensors"]
    assert left.keys() == right.keys()
    assert any(key.startswith("ema/") for key in left)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=0)


def test_single_actions_are_chunks_of_one():
    torch.manual_seed(0)
    policy = Deterministic(DeterministicConfig(hidden=[8]), SPEC)
    algo = BC(BCConfig(), policy, SPEC, device=torch.device("cpu"), generator=torch.Generator())
    batch = make_batch()
    flat = replace(
        batch, obs={"state": batch.obs["state"][:, -1]}, action=batch.action[:, 0], chunk_mask=None
    )
    expected = (policy(flat.obs)[:, 0] - flat.action).square().mean().detach()
    torch.testing.assert_close(algo.update(flat)["loss/bc"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"algo.lr=0.0 must be positive"),
        ({"ema": 1.0}, r"algo.ema=1.0 must lie in \[0, 1\)"),
        ({"batch_size": 0}, r"algo.batch_size=0"),
        ({"warmup": -1}, r"algo.warmup=-1"),
        ({"padding": "holds"}, r"Did you mean 'hold'"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BCConfig(**options)
