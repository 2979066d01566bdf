# SPDX-License-Identifier: Apache-2.0
"""The frame of on-policy fine-tuning, through DPPO: reward scale, advantages, warm-up, KL stop, padding, images."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robopost.algos.base import Metrics
from robopost.algos.generative import chunk_ppo
from robopost.algos.generative.chunk_ppo import ChunkPPOConfig, ReturnScale
from robopost.errors import ConfigError

spec = importlib.util.spec_from_file_location("chunk_lab", Path(__file__).parent / "chunk_lab.py")
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
TWO_ENVS = {"scale_reward": False, "batch_size": 4, "gamma": 0.9, "gae_lambda": 0.5}


def test_return_scale_by_hand():
    scale, gamma = ReturnScale(), 0.5
    # Environment 0 ends after its second decision; environment 1 makes two decisions and a row of padding.
    reward = torch.tensor([[1.0, 4.0], [2.0, -2.0], [3.0, 0.0]])
    done = torch.tensor([[False, False], [True, False], [False, False]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    first = [1.0, 2.0 + 0.5, 3.0, 4.0, -2.0 + 2.0]
    std = torch.tensor(first).std(unbiased=False)
    torch.testing.assert_close(scale.update(reward, done, valid, gamma), std)
    # The second rollout begins anew and joins the first one's moments.
    second = [5.0, 1.0 + 2.5]
    both = scale.update(
        torch.tensor([[5.0], [1.0]]), torch.zeros(2, 1).bool(), torch.ones(2, 1).bool(), gamma
    )
    torch.testing.assert_close(both, torch.tensor(first + second).std(unbiased=False))
    assert scale.count == 7
    torch.testing.assert_close(scale.mean, torch.tensor(first + second).mean())


def test_equal_returns_leave_rewards_as_they_are():
    yes = torch.ones(4, 2, dtype=torch.bool)
    assert ReturnScale().update(torch.full((4, 2), 0.3), yes, yes, 0.9) == 1.0
    assert ReturnScale().update(torch.zeros(4, 2), ~yes, yes, 0.9) == 1.0


def episodes():
    """Five decisions; a time limit after the third, the observation (0, 0, 7) its true end. V is the third number."""
    algo = lab.make(**TWO_ENVS)
    batch = lab.rollout(algo, decisions=5, envs=1)
    algo.critic.forward = lambda obs: obs["state"][:, 2]
    column = lambda *values: torch.tensor(values)[:, None]  # noqa: E731
    state = lambda *values: {"state": torch.nn.functional.pad(column(*values), (2, 0))[:, None]}  # noqa: E731
    ends = column(False, False, True, False, False)
    batch = replace(
        batch,
        obs=state(1.0, 2.0, 3.0, 4.0, 5.0),
        next_obs=state(2.0, 3.0, 7.0, 5.0, 6.0),
        reward=column(1.0, 0.0, -1.0, 2.0, 1.0),
        terminated=torch.zeros_like(ends),
        truncated=ends,
        discount=torch.full((5, 1), 0.9),
    )
    return algo, batch


def test_a_time_limit_is_bootstrapped_from_the_final_observation():
    algo, batch = episodes()
    # delta = r + 0.9 V(next) - V; A = delta + 0.45 A of the next decision of the same episode
    delta = [1 + 1.8 - 1, 0 + 2.7 - 2, -1 + 6.3 - 3, 2 + 4.5 - 4, 1 + 5.4 - 5]
    expected = [0.0] * 5
    for t in (4, 3, 2, 1, 0):
        expected[t] = delta[t] + (0.45 * expected[t + 1] if t not in (2, 4) else 0.0)
    data, _ = algo._data(batch, torch.ones(5, 1, dtype=torch.bool))
    assert data["advantage"].tolist() == pytest.approx(expected)
    assert expected == pytest.approx(
        [1.8 + 0.45 * (0.7 + 0.45 * 2.3), 0.7 + 0.45 * 2.3, 2.3, 2.5 + 0.63, 1.4]
    )
    assert data["returns"].tolist() == pytest.approx(
        [a + v for a, v in zip(expected, [1, 2, 3, 4, 5], strict=True)]
    )
    # A failure in the same place earns what it earned, and the authors' rule treats the time limit as one.
    failed = replace(batch, terminated=batch.truncated, truncated=torch.zeros_like(batch.truncated))
    failed = replace(failed, discount=torch.where(failed.terminated, 0.0, 0.9))
    cut, _ = algo._data(failed, torch.ones(5, 1, dtype=torch.bool))
    assert cut["advantage"].tolist() == pytest.approx([1.8 + 0.45 * (0.7 - 1.8), 0.7 - 1.8, -4.0, 3.13, 1.4])
    algo.config.bootstrap_time_limits = False
    old, _ = algo._data(batch, torch.ones(5, 1, dtype=torch.bool))
    assert torch.equal(old["advantage"], cut["advantage"])


def test_rewards_are_divided_by_the_scale():
    algo, batch = episodes()
    algo.config.scale_reward = True
    data, _ = algo._data(batch, torch.ones(5, 1, dtype=torch.bool))
    returns = torch.tensor([1.0, 0.9, -1 + 0.81, 2.0, 1 + 1.8])
    last = 1 / returns.std(unbiased=False) + 5.4 - 5
    assert data["advantage"][-1].item() == pytest.approx(last.item(), rel=1e-5)


def perturbed(batch):
    """Other numbers in the rows nothing was executed in."""
    padding, g = ~batch.chunk_mask.any(-1), torch.Generator().manual_seed(5)

    def change(tensor):
        tensor = tensor.clone()
        if tensor.dtype == torch.bool:
            tensor[padding] = torch.rand(tensor[padding].shape, generator=g) < 0.5
        else:
            tensor[padding] = 100 * torch.randn(tensor[padding].shape, generator=g)
        return tensor

    return replace(batch.map(change), chunk_mask=batch.chunk_mask)


def test_padding_never_contributes():
    results = []
    for change in (lambda batch: batch, perturbed):
        algo = lab.make(epochs=2, batch_size=5)
        batch = lab.rollout(algo, padded=2)
        assert batch.chunk_mask.any(-1).sum() == 10
        metrics = algo.update(change(batch))
        results.append((algo.state_dict()["tensors"], metrics))
    (tensors, metrics), (others, again) = results
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert all(torch.equal(metrics[key], again[key]) for key in metrics)


def test_every_decision_is_seen_once_per_epoch():
    seen = []
    algo = lab.make(epochs=3, batch_size=5)
    step = algo.actor_step
    algo.actor_step = lambda rows: seen.append(rows) or step(rows)
    batch = lab.rollout(algo, padded=2)
    algo.update(batch)
    assert len(seen) == 6
    there = batch.chunk_mask.any(-1)
    for epoch in range(3):
        rows = torch.cat([part["obs/state"] for part in seen[2 * epoch : 2 * epoch + 2]])
        assert sorted(rows[:, 0].tolist()) == sorted(batch.obs["state"][there][:, 0].tolist())
    assert not torch.equal(seen[0]["obs/state"], seen[2]["obs/state"])


def test_warm_up_trains_the_critic_alone():
    algo = lab.make(critic_warmup=2)
    state = lambda: {  # noqa: E731
        key: value.clone()
        for key, value in algo.state_dict()["tensors"].items()
        if not key.startswith("scale")
    }
    for seed in range(2):
        before = state()
        metrics = algo.update(lab.rollout(algo, seed=seed))
        after = state()
        assert "loss/actor" not in metrics
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed
        assert all(key.startswith("critic") for key in changed)
    before = algo._actor_flat.data.clone()
    assert "loss/actor" in algo.update(lab.rollout(algo, seed=2))
    assert not torch.equal(before, algo._actor_flat.data)


def test_the_actor_stays_once_target_kl_is_exceeded():
    def play(target_kl):
        algo = lab.make(epochs=3, batch_size=4, target_kl=0.0, actor_lr=1e-2)
        algo.update(lab.rollout(algo, seed=7))  # Adam has a state
        algo.config.target_kl = target_kl
        found, step = [], algo.actor_step

        def recorded(rows):
            metrics = step(rows)
            moments = algo.actor_optimizer.state[algo._actor_flat.param]
            found.append(
                (
                    metrics["policy/kl"],
                    algo._actor_flat.data.clone(),
                    moments["exp_avg"].clone(),
                    moments["step"].clone(),
                )
            )
            return metrics

        algo.actor_step = recorded
        algo.update(lab.rollout(algo, seed=8))
        return algo, found

    _, free = play(0.0)
    assert len(free) == 9
    kl = [float(entry[0]) for entry in free]
    limit = max(kl[:4]) / 2
    stop = next(index for index, value in enumerate(kl) if value > limit)
    assert stop >= 1  # before the first step the policy is the one that explored
    algo, held = play(limit)
    for index, (_, data, moment, count) in enumerate(held):
        last = min(index, stop - 1)
        assert torch.equal(data, free[last][1])
        assert torch.equal(moment, free[last][2])
        assert count == free[last][3]
    assert len(held) >= stop + 1
    assert torch.equal(algo._actor_flat.data, free[stop - 1][1])
    critic, unheld = (run[0]._critic_flat.data for run in ((algo, held), play(0.0)))
    assert torch.equal(critic, unheld)  # the critic goes on
    # The next rollout begins without the memory of it.
    before = algo._actor_flat.data.clone()
    algo.update(lab.rollout(algo, seed=9))
    assert not torch.equal(before, algo._actor_flat.data)


def test_images_reach_critic_and_policy(monkeypatch):
    policy = lab.make_policy(lab.IMAGES, image_features=8)
    algo = lab.make(policy)
    batch = lab.rollout(algo)
    assert {"state", "image"} <= batch.obs.keys()
    first = algo._values(batch.map(lambda t: t.flatten(0, 1)).obs)
    rows = {f"obs/{key}": value.flatten(0, 1) for key, value in batch.obs.items()}
    darker = rows | {"obs/image": rows["obs/image"] // 2}
    obs = lambda rows: {key[4:]: value for key, value in rows.items()}  # noqa: E731
    assert not torch.allclose(algo.critic(obs(darker)), first)
    chain = {"chain": batch.chain.flatten(0, 1), "log_prob": batch.log_prob.flatten(0, 1)}
    chain["advantage"] = torch.linspace(-1, 1, 12)
    kl, other = (algo.actor_loss(chain, obs(given))[1] for given in (rows, darker))
    assert kl < 1e-6 < other
    monkeypatch.setattr(chunk_ppo, "BLOCK", 5)
    torch.testing.assert_close(algo._values(obs(rows)), first, rtol=1e-5, atol=1e-6)
    convolutions = [module.images["image"] for module in (policy.encoder, algo.critic.encoder)]
    before = [[p.clone() for p in module.parameters()] for module in convolutions]
    algo.update(batch)
    for old, module in zip(before, convolutions, strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(old, module.parameters(), strict=True))


def test_learning_rates_fall_by_half_a_cosine():
    algo = lab.make(lr_decay_updates=4, actor_lr=1e-3, critic_lr=1e-2)
    rates = []
    for seed in range(5):
        algo.update(lab.rollout(algo, seed=seed))
        rates.append(
            (algo.actor_optimizer.param_groups[0]["lr"], algo.critic_optimizer.param_groups[0]["lr"])
        )
    shares = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    assert [a for a, _ in rates] == pytest.approx([1e-3 * share for share in shares])
    assert [c for _, c in rates] == pytest.approx([1e-2 * share for share in shares])


def test_weight_decay_is_decoupled():
    algo = lab.make(weight_decay=0.1, critic_lr=1e-2, critic_warmup=1, batch_size=12)
    before, rows = algo._critic_flat.data.clone(), {}
    algo._critic_flat.add_backward = lambda loss: None  # no gradient: decay alone
    algo.update(lab.rollout(algo))
    assert not rows
    torch.testing.assert_close(algo._critic_flat.data, before * (1 - 1e-2 * 0.1))


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones():
    results: list[tuple[torch.Tensor, torch.Tensor, Metrics]] = []
    for mode in ("eager", "compile"):
        algo = lab.make(epochs=2, finetune_steps=3, clip=0.1, target_kl=1.0)
        algo.accelerate(mode)
        for seed in range(2):
            metrics = algo.update(lab.rollout(algo, seed=seed))
        results.append((algo._actor_flat.data, algo._critic_flat.data, metrics))
    (actor, critic, metrics), (actor2, critic2, metrics2) = results
    torch.testing.assert_close(actor, actor2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(critic, critic2, rtol=1e-4, atol=1e-5)
    assert all(metrics[key].item() == pytest.approx(metrics2[key].item(), abs=1e-5) for key in metrics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_steps": 0}, r"algo.rollout_steps=0 must be at least 1"),
        ({"epochs": 0}, r"algo.epochs=0 must be at least 1"),
        ({"batch_size": 1}, r"algo.batch_size=1 must be at least 2"),
        ({"gamma": 1.1}, r"algo.gamma=1.1 must lie in \[0, 1\]"),
        ({"gae_lambda": -0.1}, r"algo.gae_lambda=-0.1 must lie in \[0, 1\]"),
        ({"actor_lr": 0.0}, r"algo.actor_lr=0.0 must be above 0"),
        ({"max_grad_norm": 0.0}, r"algo.max_grad_norm=0.0 must be above 0"),
        ({"target_kl": -1.0}, r"algo.target_kl=-1.0 must be 0 or more"),
        ({"critic_warmup": -1}, r"algo.critic_warmup=-1 must be 0 or more"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ChunkPPOConfig(**options)
