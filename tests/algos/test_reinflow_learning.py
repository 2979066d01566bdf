# SPDX-License-Identifier: Apache-2.0
"""ReinFlow: an update against a plain loop, the KL stop, images, the anchor, a bandit, bad settings."""

import copy
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from robopost.algos.generative.reinflow import ReinFlowConfig
from robopost.artefacts.checkpoint import load_policy
from robopost.compose import compose
from robopost.errors import ConfigError
from robopost.loops import train

spec = importlib.util.spec_from_file_location("reinflow_lab", Path(__file__).parent / "reinflow_lab.py")
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)


def test_an_update_agrees_with_a_plain_loop():
    """Two epochs of two minibatches: scaled rewards, GAE with both endings, chain, noise, entropy, AdamW, clipping."""
    algo = lab.make(epochs=2, weight_decay=0.01, actor_lr=1e-2, entropy_coef=0.1)
    batch = lab.rollout(algo)
    policy, noise, critic = (copy.deepcopy(x) for x in (algo.policy, algo.noise, algo.critic))
    g = torch.Generator().set_state(algo.generator.get_state())
    algo.update(batch)
    done = (batch.terminated | batch.truncated).float()
    sums, running = [], torch.zeros(4)
    for t in range(3):
        running = 0.99 * running + batch.reward[t]
        sums.append(running)
        running = running * (1 - done[t])
    reward = batch.reward / torch.stack(sums).std(correction=0)
    with torch.no_grad():
        v, v2 = (
            critic({"state": x.flatten(0, 1)}).view(3, 4)
            for x in (batch.obs["state"], batch.next_obs["state"])
        )
    advantage, running = torch.zeros(3, 4), torch.zeros(4)
    for t in reversed(range(3)):
        delta = reward[t] + 0.99 * (~batch.terminated[t]) * v2[t] - v[t]
        running = delta + 0.99 * 0.95 * (1 - done[t]) * running
        advantage[t] = running
    flat = batch.map(lambda x: x.flatten(0, 1))
    adv_all, ret_all = advantage.flatten(), (advantage + v).flatten()
    actor = [*policy.parameters(), *noise.parameters()]
    of_actor = torch.optim.AdamW(actor, lr=1e-2, weight_decay=0.01)
    of_critic = torch.optim.AdamW(critic.parameters(), lr=1e-3, weight_decay=0.01)
    times = torch.arange(4) / 4
    for _ in range(2):
        order = torch.randperm(12, generator=g)
        for rows in order.split(6):
            obs = {"state": flat.obs["state"][rows]}
            chain, adv = flat.chain[rows], adv_all[rows]
            embedded = torch.cat(
                [
                    policy.net.time(times).detach().expand(6, 4, -1),
                    obs["state"].flatten(1)[:, None].expand(-1, 4, -1),
                ],
                -1,
            )
            low, high = math.log(0.1**2), math.log(0.24**2)
            std = (0.5 * (low + (high - low) * (noise.net(embedded).tanh() + 1) / 2)).exp().view(6, 4, 4, 2)
            dist = torch.distributions.Normal(lab.euler(policy, obs, chain), std)
            mask = torch.ones(4, 4, 2)
            mask[-1, 2:] = 0
            first = torch.distributions.Normal(0.0, 1.0)
            log_prob = (dist.log_prob(chain[:, 1:]) * mask).sum((1, 2, 3)) + first.log_prob(chain[:, 0]).sum(
                (1, 2)
            )
            entropy = (dist.entropy() * mask).sum((1, 2, 3)) + 8 * first.entropy()
            ratio = ((log_prob / 36).clamp(-1, 1) - flat.log_prob[rows]).exp()
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
            surrogate = torch.min(ratio * adv, ratio.clamp(0.99, 1.01) * adv).mean()
            loss = -surrogate - 0.1 * (entropy / 36).mean()
            value_loss = (ret_all[rows] - critic(obs)).square().mean()
            for optimizer, params, term in (
                (of_actor, actor, loss),
                (of_critic, list(critic.parameters()), value_loss),
            ):
                optimizer.zero_grad()
                term.backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
    ours = [*algo.policy.parameters(), *algo.noise.parameters(), *algo.critic.parameters()]
    for mine, plain in zip(ours, [*actor, *critic.parameters()], strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=2e-5)


def test_anchor_is_the_distance_to_the_policy_it_began_with():
    algo = lab.make(anchor_coef=2.0, entropy_coef=0.0, actor_lr=2e-3)
    rows, obs = lab.rows_of(algo)
    assert algo.actor_loss(rows, obs)[2]["policy/anchor_distance"] == 0
    base = copy.deepcopy(algo.policy)
    with torch.no_grad():
        for p in algo.policy.net.parameters():
            p.add_(0.05)
    rows["advantage"] = torch.zeros(12)
    loss, _, metrics = algo.actor_loss(rows, obs)
    ends = [policy.chain(obs, rows["chain"][:, 0])[-1] for policy in (algo.policy, base)]
    distance = (ends[0] - ends[1]).square().mean().item()
    assert distance > 1e-4
    assert metrics["policy/anchor_distance"].item() == pytest.approx(distance, rel=1e-5)
    assert loss.item() == pytest.approx(2 * distance, rel=1e-4)
    for _ in range(60):
        algo.actor_step(rows)
    assert algo.actor_loss(rows, obs)[2]["policy/anchor_distance"] < 0.5 * distance


def test_kl_stop_holds_the_actor_and_not_the_critic_on_any_device(monkeypatch):
    """The masked form, which needs no host sync, ends where skipping ends."""
    ends = []
    for device in ("cpu", "meta"):  # a device name other than cpu takes the masked path
        algo = lab.make(epochs=4, target_kl=1e-7, actor_lr=0.05)
        batch = lab.rollout(algo)
        real = torch.randperm
        monkeypatch.setattr(
            torch, "randperm", lambda n, generator, device, real=real: real(n, generator=generator)
        )
        monkeypatch.setattr(algo, "device", type("D", (), {"type": device})())
        calls = []
        step = algo.actor_step
        monkeypatch.setattr(
            algo, "actor_step", lambda rows, step=step, calls=calls: calls.append(1) or step(rows)
        )
        algo.update(batch)
        monkeypatch.setattr(torch, "randperm", real)
        assert not algo._keep
        assert (len(calls) < 8) is (device == "cpu")
        ends.append([*algo.policy.parameters(), *algo.noise.parameters(), *algo.critic.parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_images_are_learnt_from_and_not_shifted(monkeypatch):
    algo = lab.make(lab.IMAGES, policy_options={"image_shift": 4})
    rows, obs = lab.rows_of(algo)
    monkeypatch.setattr("robopost.nets.encoder.random_shift", lambda *args: pytest.fail("shifted"))
    reached = lab.gradients(algo.actor_loss(rows, obs)[0], algo.policy)
    assert any(name.startswith("encoder.images.image.net") for name in reached)
    ours, critics = algo.policy.encoder, algo.critic.encoder
    assert not {id(p) for p in ours.parameters()} & {id(p) for p in critics.parameters()}
    before = [copy.deepcopy(x.state_dict()) for x in (ours, critics)]
    algo.critic_step({key: value for key, value in rows.items() if key.startswith(("obs/", "returns"))})
    same = [
        all(torch.equal(a[k], x.state_dict()[k]) for k in a)
        for a, x in zip(before, (ours, critics), strict=True)
    ]
    assert same == [True, False]
    algo.actor_step({key: value for key, value in rows.items() if key != "returns"})
    assert not torch.equal(before[0]["images.image.net.0.weight"], ours.images["image"].net[0].weight)


def test_observations_are_encoded_once_per_decision(monkeypatch):
    algo = lab.make(lab.IMAGES)
    calls = []
    algo.policy.encoder.register_forward_hook(lambda *args: calls.append(1))
    algo.decide(lab.observe(algo.policy, 3), torch.Generator())
    assert len(calls) == 1


@pytest.mark.parametrize(
    "options",
    [{"actor_lr": 4e-3}, {"actor_lr": 3e-3, "normalise_ratio": False, "clip": 0.2}],
    ids=["normalised", "joint"],
)
def test_bandit(options):
    """One-step episodes, through decide and update with a chunk of which half is executed."""
    policy = lab.bandit_policy(0)
    assert lab.bandit_distance(policy) > 1.3
    settings = {"noise_min": 0.05, "noise_max": 0.2, "entropy_coef": 0.0, "batch_size": 128}
    lab.bandit_learn(policy, 50, 0, samples=256, **settings | options)
    assert lab.bandit_distance(policy) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"normalise_ratio": False, "clip": 0.2}], ids=["normalised", "joint"]
)
@pytest.mark.parametrize(
    "policy_options",
    [{}, {"prediction": "velocity"}, {"variant": "shortcut"}],
    ids=["sample", "velocity", "shortcut"],
)
def test_bandit_at_the_usual_learning_rate(policy_options, options, seed):
    """1024 samples, 100 iterations, 5 epochs, Adam 3e-4."""
    policy = lab.bandit_policy(seed, **policy_options)
    settings = {"noise_min": 0.05, "noise_max": 0.2, "entropy_coef": 0.0}
    lab.bandit_learn(policy, 100, seed, **settings | options)
    assert lab.bandit_distance(policy) <= 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune_steps": -1}, "algo.finetune_steps=-1 must be 0"),
        ({"clip": 0.0}, "algo.clip=0.0 must be above 0"),
        ({"noise_min": 0.0}, r"algo.noise_min=0.0 must lie in \(0, 0.24\]"),
        ({"noise_max": 0.05}, r"algo.noise_min=0.1 must lie in \(0, 0.05\]"),
        ({"entropy_coef": -1.0}, "algo.entropy_coef=-1.0 must be 0 or more"),
        ({"log_prob_bound": -1.0}, "algo.log_prob_bound=-1.0 must be 0 or more"),
        ({"noise_decay_updates": -1}, "algo.noise_decay_updates=-1 must be 0 or more"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        ReinFlowConfig(**options)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ConfigError, match=r"algo.finetune_steps=5 must lie in 0..4, the steps of the policy's chain"
    ):
        lab.make(finetune_steps=5)
    with pytest.raises(ConfigError, match=r"adds noise to Euler steps, policy.solver=midpoint. Fix: "):
        lab.make(policy_options={"solver": "midpoint"})
    batch = lab.rollout(lab.make())
    with pytest.raises(
        ConfigError, match=r"algo.batch_size=500 is larger than a rollout of 12 executed chunks"
    ):
        lab.make(batch_size=500).update(batch)


def test_a_policy_with_a_camera_fine_tunes(tmp_path):
    """On the arm: its encoder learns through the actor's loss, and the result is a policy of its own."""
    sizes = ["policy=flow", "policy.horizon=2", "policy.steps=2", "policy.width=16", "policy.depth=1"]
    sizes += ["policy.image_features=8", "policy.normalise_action=bounds", "algo.hidden=[16]"]
    words = [
        "algo=reinflow",
        "env=arm_reach",
        "env.obs=pixels96",
        "env.max_steps=4",
        "env.num_envs=2",
        *sizes,
    ]
    words += [
        "algo.rollout_steps=2",
        "algo.batch_size=4",
        "algo.epochs=2",
        "algo.actor_lr=0.01",
        "device=cpu",
    ]
    words += ["loop.steps=16", "loop.log_every=8", "loop.checkpoint_every=8", "loop.eval_episodes=1"]
    words += ["track.console=false", "track.tensorboard=false", f"out={tmp_path / 'run'}"]
    folder = train(compose(words))
    first, last = (load_policy(path) for path in sorted((folder / "checkpoints").glob("step_*")))
    assert set(last.obs_keys) == {"state", "image"}
    changed = (a - b for a, b in zip(first.encoder.parameters(), last.encoder.parameters(), strict=True))
    assert max(x.abs().max().item() for x in changed) > 1e-3
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["policy/clip_fraction"] >= 0 for line in logged if "policy/clip_fraction" in line)
