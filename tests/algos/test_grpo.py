# SPDX-License-Identifier: Apache-2.0
"""GRPO on tokens: the loss by hand, dropped groups, a bandit it must solve."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robopost.algos.vla.frame import Decisions
from robopost.algos.vla.grpo import GRPO, GRPOConfig
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError, DataError
from robopost.policies.tokens import taken

found = importlib.util.spec_from_file_location("opd_lab", Path(__file__).parent / "opd_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)
rollout = lab.rollout
LENGTHS = [9, 4, 6, 2]


def make(policy, **options):
    return lab.make(policy, cls=GRPO, config_cls=GRPOConfig, **{"group": 2} | options)


def test_loss_by_hand_after_the_policy_has_moved():
    policy = lab.make_policy(1)
    algo = make(policy, group=4, entropy_coef=0.1)
    batch = rollout(policy, lengths=LENGTHS, success=[1.0, 0.0, 0.0, 1.0])
    data, metrics = algo.prepare(Decisions.of(batch))
    with torch.no_grad():
        noise = torch.randn(algo._flat.data.shape, generator=torch.Generator().manual_seed(3))
        algo._flat.data.add_(0.2 * noise)
    loss, stats = algo.loss(data)
    log_probs = policy.log_probs({"state": data["obs/state"]})
    ratio = (taken(log_probs, data["tokens"]) - data["old"]).exp().detach()
    advantage = torch.tensor([0.5, -0.5, -0.5, 0.5]) / math.sqrt(4 * 0.25 / 3)
    total, count, beyond, spread = 0.0, 0, 0, 0.0
    rows = Decisions.of(batch)
    entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
    for row in range(len(rows)):
        a = advantage[rows.episode[row]].item()
        for h in range(int(rows.mask[row].sum())):
            for dim in range(2):
                r = ratio[row, h, dim].item()
                total -= min(r * a, min(max(r, 0.8), 1.28) * a)
                beyond += r < 0.8 or r > 1.28
                spread += entropy[row, h, dim].item()
                count += 1
    assert count == 2 * sum(LENGTHS)
    assert 0 < beyond < count
    assert loss.item() == pytest.approx((total - 0.1 * spread) / count, rel=1e-4)
    assert stats["policy/clip_fraction"].item() == pytest.approx(beyond / count)
    assert stats["policy/kl"] > 0
    assert metrics["data/mixed_groups"] == 1.0


def test_first_gradient_is_the_policy_gradient_of_the_advantage():
    policy = lab.make_policy(1)
    algo = make(policy, group=4)
    batch = rollout(policy, success=[1.0, 0.0, 0.0, 0.0])
    data, _ = algo.prepare(Decisions.of(batch))
    loss, _ = algo.loss(data)
    algo._flat.backward(loss)
    log_prob = taken(policy.log_probs({"state": data["obs/state"]}), data["tokens"])
    wanted = torch.autograd.grad(-(data["advantage"][:, None, None] * log_prob).mean(), algo._flat.params)
    torch.testing.assert_close(algo._flat.grad, torch.cat([item.flatten() for item in wanted]))


def test_groups_of_equal_outcomes_are_dropped():
    policy = lab.make_policy(1)
    algo = make(policy)
    batch = rollout(policy, lengths=LENGTHS, success=[1.0, 1.0, 0.0, 1.0])
    data, metrics = algo.prepare(Decisions.of(batch))
    assert metrics["data/mixed_groups"] == 0.5
    assert len(data["valid"]) == 2 + 1, "decisions of the third and the fourth episode"
    other = batch.map(lambda tensor: tensor)
    changed = replace(other, chain=torch.cat([(batch.chain[:, :2] + 3) % 16, batch.chain[:, 2:]], 1))
    losses = [algo.loss(algo.prepare(Decisions.of(item))[0])[0] for item in (batch, changed)]
    assert torch.equal(*losses)
    before = algo._flat.data.clone()
    metrics = algo.update(rollout(policy, success=[1.0, 1.0, 0.0, 0.0]))
    assert torch.equal(before, algo._flat.data)
    assert metrics["data/mixed_groups"] == 0.0
    assert algo.updates == 1


def test_returns_can_be_compared_in_place_of_successes():
    policy = lab.make_policy(1)
    batch = rollout(policy, success=[1.0, 1.0, 0.0, 0.0])
    returns = torch.tensor([3.0, 5.0, 2.0, 2.0]).expand(3, -1)
    batch = replace(batch, extra={"success": batch.extra["success"], "return": returns})
    algo = make(policy, outcome="return")
    data, metrics = algo.prepare(Decisions.of(batch))
    assert metrics["data/mixed_groups"] == 0.5
    assert sorted(set(data["advantage"].tolist())) == pytest.approx(
        [-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-4
    )
    with pytest.raises(ConfigError, match=r"unknown algo\.outcome 'reward'"):
        make(policy, outcome="reward")


def test_single_token_bandit_is_solved():
    """One slot of 16 bins, success in the upper quarter: from 25 % to nearly always, on outcomes alone."""
    spec = Spec({"state": ((3,), "float32")}, 1, (-1.0,), (1.0,), 1)
    policy = lab.make_policy(0, spec=spec, horizon=1)
    algo = make(policy, group=8, lr=3e-3, epochs=2)
    g, obs = torch.Generator().manual_seed(0), {"state": torch.ones(64, 3)}
    share = []
    for _ in range(60):
        _, log_prob, chain = policy.sample(obs, generator=g)
        success = (chain.flatten() >= 12).float()
        share.append(success.mean().item())
        none = torch.zeros(64, dtype=torch.bool)
        mask = torch.ones(64, 1, dtype=torch.bool)
        batch = Batch(
            obs, policy.decode(chain[:, 0]), success, obs, ~none, none, success, mask, chain, log_prob
        )
        extra = {"success": success[None], "return": success[None]}
        algo.update(replace(batch.map(lambda tensor: tensor[None]), extra=extra))
    assert share[0] < 0.5
    assert sum(share[-5:]) / 5 > 0.9


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"algo\.group=1: algo=grpo compares"):
        make(lab.make_policy(0), group=1)
    for options, words in (
        ({"clip_low": 1.0}, r"algo\.clip_low=1\.0 must lie in \(0, 1\)"),
        ({"clip_high": 0.0}, "algo.clip_high=0.0"),
        ({"epochs": 0}, "algo.epochs=0"),
        ({"lr": 0.0}, "algo.lr=0.0"),
        ({"entropy_coef": -1.0}, "algo.entropy_coef=-1.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(lab.make_policy(0), **options)
    with pytest.raises(ConfigError, match="algo=grpo fine-tunes a token policy, policy=flow is none"):
        make(lab.make_flow(0))
    policy = lab.make_policy(0)
    with pytest.raises(DataError, match="whole episodes"):
        make(policy).update(replace(rollout(policy), extra=None))
