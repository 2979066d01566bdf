# SPDX-License-Identifier: Apache-2.0
"""PPO on tokens: the actor's loss by hand; the frame around it is tested with DPPO."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robopost.algos.vla.token_ppo import TokenPPO, TokenPPOConfig
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.policies.tokens import taken

found = importlib.util.spec_from_file_location("opd_lab", Path(__file__).parent / "opd_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)


def make(policy, **options):
    options = {"batch_size": 4, "epochs": 1, "hidden": [16]} | options
    return lab.make(policy, cls=TokenPPO, config_cls=TokenPPOConfig, **options)


def minibatch(algo, seed=0):
    batch = lab.rollout(algo.policy, lengths=[9, 4, 6, 2], seed=seed)
    flat = replace(batch, extra=None).map(lambda tensor: tensor.flatten(0, 1))
    rows = torch.nonzero(flat.chunk_mask.any(-1)).flatten()
    return flat.map(lambda tensor: tensor.index_select(0, rows))


def test_actor_loss_by_hand():
    policy = lab.make_policy(1)
    algo = make(policy, entropy_coef=0.05)
    batch = minibatch(algo)
    rows = algo.remember(batch)
    rows["advantage"] = torch.randn(len(batch), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        noise = torch.randn(algo._actor_flat.data.shape, generator=torch.Generator().manual_seed(3))
        algo._actor_flat.data.add_(0.2 * noise)
    loss, kl, metrics = algo.actor_loss(rows, batch.obs)
    log_probs = policy.log_probs(batch.obs).detach()
    log_ratio = taken(log_probs, rows["tokens"]) - rows["old"]
    total, count, spread, divergence = 0.0, 0, 0.0, 0.0
    for row in range(len(batch)):
        a = rows["advantage"][row].item()
        for h in range(int(batch.chunk_mask[row].sum())):
            for dim in range(2):
                r = log_ratio[row, h, dim].exp().item()
                total -= min(r * a, min(max(r, 0.8), 1.28) * a)
                spread -= (log_probs[row, h, dim].exp() * log_probs[row, h, dim]).sum().item()
                divergence += r - 1 - log_ratio[row, h, dim].item()
                count += 1
    assert count == 2 * 21
    assert loss.item() == pytest.approx((total - 0.05 * spread) / count, rel=1e-4)
    assert kl.item() == pytest.approx(divergence / count, rel=1e-3)
    assert metrics["policy/entropy"].item() == pytest.approx(spread / count, rel=1e-4)
    assert 0 < metrics["policy/clip_fraction"] < 1


def test_steps_that_were_not_executed_change_nothing():
    policy = lab.make_policy(1)
    algo = make(policy)
    batch = minibatch(algo)
    changed = (batch.chain + 5) % policy.bins
    there = batch.chunk_mask[:, None, :, None]
    other = replace(batch, chain=torch.where(there, batch.chain, changed))
    gradients = []
    for item in (batch, other):
        rows = algo.remember(item) | {"advantage": torch.arange(len(batch)).float()}
        algo._actor_flat.backward(algo.actor_loss(rows, item.obs)[0])
        gradients.append(algo._actor_flat.grad.clone())
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_bandit_is_solved():
    """A reward that grows with the bin: the mean bin rises, with a critic and without groups."""
    spec = Spec({"state": ((3,), "float32")}, 1, (-1.0,), (1.0,), 1)
    policy = lab.make_policy(0, spec=spec, horizon=1)
    algo = make(policy, batch_size=64, epochs=4, actor_lr=3e-3, scale_reward=False, temperature=1.2)
    assert policy.config.temperature == 1.2
    g, obs = torch.Generator().manual_seed(0), {"state": torch.ones(128, 3)}
    bins = []
    for _ in range(30):
        _, log_prob, chain = policy.sample(obs, generator=g)
        bins.append(chain.float().mean().item())
        done = torch.ones(128, dtype=torch.bool)
        mask = torch.ones(128, 1, dtype=torch.bool)
        reward, none = chain.flatten().float() / 15, torch.zeros(128)
        batch = Batch(obs, policy.decode(chain[:, 0]), reward, obs, done, ~done, none, mask, chain, log_prob)
        metrics = algo.update(batch.map(lambda tensor: tensor[None]))
    assert bins[0] < 9
    assert bins[-1] > 12
    assert metrics.keys() >= {"loss/actor", "loss/value", "policy/kl", "policy/entropy", "value/mean"}


def test_what_is_refused():
    with pytest.raises(ConfigError, match="algo=token_ppo fine-tunes a token policy, policy=flow is none"):
        make(lab.make_flow(0))
    for options in ({"clip_low": 0.0}, {"clip_high": -1.0}, {"entropy_coef": -1.0}, {"temperature": -2.0}):
        with pytest.raises(ConfigError, match=f"algo.{next(iter(options))}"):
            make(lab.make_policy(0), **options)
