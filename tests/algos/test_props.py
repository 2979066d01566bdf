# SPDX-License-Identifier: Apache-2.0
"""PROPS: the gradient of its loss, what its window holds, less sampling error than on-policy sampling, plain PPO."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from robopost.algos.online.ppo import PPO, gae
from robopost.algos.online.props import PROPS, PROPSConfig, advantage_weight, sampling_loss
from robopost.compose import compose
from robopost.data.batch import Batch, Spec, stack
from robopost.evaluate.sampling_error import sampling_error
from robopost.loops import train
from robopost.policies.categorical import Categorical, CategoricalConfig


def tabular(states, arms, seed, **config):
    """PROPS on a fixed random softmax policy over one-hot states; the settings of the method's own toy tasks."""
    torch.manual_seed(seed)
    spec = Spec({"state": ((states,), "float32")}, 1, (0.0,), (arms - 1.0,), 0, arms)
    policy = Categorical(CategoricalConfig(hidden=[]), spec)
    with torch.no_grad():
        policy.net[0].weight.copy_(torch.randn(arms, states))
    settings = {"behaviour_steps": 8, "behaviour_lr": 0.05, "behaviour_minibatches": 4, "buffer_batches": 1}
    config = PROPSConfig(**(settings | config))
    return PROPS(
        config, policy, spec, device=torch.device("cpu"), generator=torch.Generator().manual_seed(seed)
    )


def collect(algo, steps, seed, copies=1, start=0):
    """`steps` vector steps as the loop takes them, in states drawn at random; reward counts the vector steps."""
    g = torch.Generator().manual_seed(seed)
    size, m = algo.spec.obs["state"][0][0], algo.config.behaviour_steps
    rows, actor, nothing = [], algo.policy, torch.zeros(copies, dtype=torch.bool)
    for t in range(steps):
        if t * copies // m > (t - 1) * copies // m:
            actor = algo.behaviour(rows)
        state = torch.randint(size, (copies,), generator=g)
        obs = {"state": torch.nn.functional.one_hot(state, size).float()}
        action = actor.act(obs, generator=g)
        reward = torch.full((copies,), float(start + t))
        row = Batch(obs, action.chunk[:, 0], reward, obs, nothing, nothing, torch.full((copies,), 0.99))
        rows.append(replace(row, chain=action.chain, log_prob=action.log_prob))
    return rows


def error(algo, rows):
    obs = {"state": torch.cat([row.obs["state"] for row in rows])}
    return sampling_error(algo.policy, obs, torch.cat([row.chain for row in rows])).item()


def gaussian_data(lab, rows=64, **config):
    """A PROPS with samples of its own policy, as its behaviour update sees them."""
    algo = lab.make("props", **config)
    batch = lab.make_rollout(algo, steps=rows)
    return algo, batch, algo._target(batch)


def target(data):
    return data["target/0"], data["target/1"]


def gradient(algo, loss):
    algo._behaviour_flat.backward(loss)
    return algo._behaviour_flat.grad.clone()


# -- the loss -------------------------------------------------------------------------------------------------------


def test_gradient_at_the_target_policy_is_that_of_the_mean_log_probability(lab):
    algo, _, data = gaussian_data(lab)
    policy, obs = algo.behaviour_policy, {"state": data["obs/state"]}
    distribution = policy.distribution(obs)
    log_prob = policy.chain_log_prob(data["chain"], *distribution)
    ratio = (log_prob - data["log_prob"]).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio))
    full = gradient(algo, sampling_loss((policy.log_prob(obs, data["chain"]) - data["log_prob"]).exp(), 0.3))
    plain = gradient(algo, (policy.log_prob(obs, data["chain"]) - data["log_prob"]).exp().mean())
    score = gradient(algo, policy.log_prob(obs, data["chain"]).mean())
    assert full.norm() > 1e-3
    assert torch.allclose(full, plain, atol=1e-6)
    assert torch.allclose(full, score, atol=1e-6)
    assert gradient(algo, policy.divergence(policy.distribution(obs), target(data)).mean()).norm() < 1e-5


def test_samples_that_are_rare_enough_have_no_gradient_and_those_that_are_not_do():
    ratio = torch.tensor([0.5, 0.69, 0.71, 1.0, 1.29, 2.0], requires_grad=True)
    sampling_loss(ratio, 0.3).backward()
    assert ratio.grad.tolist() == pytest.approx([0, 0, 1 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert sampling_loss(ratio, 0.3).item() == pytest.approx((0.7 + 0.7 + 0.71 + 1 + 1.29 + 2) / 6)


def test_a_huge_divergence_coefficient_keeps_the_behaviour_policy_where_the_target_is(lab):
    moved = []
    for coefficient in (0.0, 1e6):
        algo, batch, data = gaussian_data(lab, behaviour_kl_coef=coefficient, behaviour_lr=1e-5)
        algo.behaviour([])
        algo._update_behaviour(batch)
        mean, log_std = algo.behaviour_policy.distribution({"state": data["obs/state"]})
        moved.append(
            max((mean - data["target/0"]).abs().max(), (log_std - data["target/1"]).abs().max()).item()
        )
    free, held = moved
    assert held < 1e-4 < free


@pytest.mark.parametrize("limit", [1e9, 0.1])
def test_a_step_follows_the_loss_of_the_paper(lab, limit):
    """mean max(r, clip r) + lambda KL(behaviour || policy) per action dimension, its gradient's norm limited."""
    options = {"behaviour_kl_coef": 3.0, "behaviour_target_kl": 0.0, "max_grad_norm": limit}
    algo, _, data = gaussian_data(lab, **options)
    policy, obs = algo.behaviour_policy, {"state": data["obs/state"]}
    with torch.no_grad():  # away from the policy, so that the two directions of the divergence differ
        algo._behaviour_flat.data.add_(0.2 * torch.randn_like(algo._behaviour_flat.data))
        policy.log_std.add_(0.5)
    normal = [Normal(mean, log_std.exp()) for mean, log_std in (policy.distribution(obs), target(data))]
    x = data["chain"][:, 0]
    ratio = (normal[0].log_prob(x) - normal[1].log_prob(x)).sum((1, 2)).exp()
    loss = torch.maximum(ratio, ratio.clamp(0.7, 1.3)).mean() + 3 * kl_divergence(*normal).mean()
    expected = gradient(algo, loss)
    expected *= min(1.0, limit / expected.norm().item())
    algo.behaviour_step(data)
    assert torch.allclose(algo._behaviour_flat.grad, expected, rtol=1e-3, atol=1e-5 * expected.norm().item())


def test_ros_takes_one_step_that_lowers_the_mean_log_probability_of_what_was_taken(lab):
    algo, batch, data = gaussian_data(lab, sampling="ros", behaviour_lr=0.01)
    algo.behaviour([])
    obs = {"state": data["obs/state"]}
    before = algo.behaviour_policy.log_prob(obs, data["chain"]).mean()
    expected = algo._behaviour_flat.data - 0.01 * gradient(algo, before)
    algo._update_behaviour(batch)
    after = algo.behaviour_policy.log_prob(obs, data["chain"]).mean()
    assert torch.allclose(algo._behaviour_flat.data, expected, atol=1e-7)
    assert torch.allclose(before, data["log_prob"].mean())
    assert after < before


def test_advantages_are_scaled_and_never_centred():
    weight = advantage_weight(torch.tensor([0.0, 1.0, -3.0, 6.0]))
    assert weight[0] == 0
    assert weight.tolist() == pytest.approx([0, *(np.array([1, 3, 6]) / np.std([0, 1, -3, 6]))], rel=1e-5)


def test_advantage_weighting_pushes_away_only_what_matters(lab):
    """The values are zero and every step ends its episode, so the advantage is the reward: only one sample has one."""
    options = {
        "behaviour_kl_coef": 0.0,
        "behaviour_epochs": 1,
        "behaviour_minibatches": 1,
        "max_grad_norm": 1e9,
    }
    options |= {"rollout_steps": 65, "behaviour_steps": 2, "buffer_batches": 1}
    algo, batch, _ = gaussian_data(lab, advantage_weighted=True, **options)
    for parameter in algo.value.parameters():
        parameter.data.zero_()
    reward = torch.zeros_like(batch.reward)
    reward[3, 1] = -2.0
    batch = replace(batch, reward=reward, discount=reward * 0, terminated=torch.ones_like(batch.terminated))
    algo.behaviour([])
    before = algo._behaviour_flat.data.clone()
    algo.behaviour_optimizer = torch.optim.SGD([algo._behaviour_flat.param], lr=1e-3)
    algo._update_behaviour(batch)
    moved = algo._behaviour_flat.data - before
    algo._behaviour_flat.data.copy_(before)
    obs = {"state": batch.obs["state"][3, 1:2]}
    alone = gradient(algo, algo.behaviour_policy.log_prob(obs, batch.chain[3, 1:2]).mean())
    scale = advantage_weight(reward.flatten()).max() / 128
    assert moved.norm() > 1e-5
    assert torch.allclose(moved, -1e-3 * scale * alone, atol=1e-7)


def test_kl_stop_changes_nothing_more_on_any_device(lab, monkeypatch):
    """The masked form, which needs no host sync, ends where leaving the loop ends."""
    states, counts = [], []
    for device in ("cpu", "meta"):  # a device name other than cpu takes the masked path
        algo, batch, _ = gaussian_data(lab, behaviour_target_kl=1e-3, behaviour_lr=1e-3)
        algo.behaviour([])
        monkeypatch.setattr(algo, "device", type("D", (), {"type": device})())
        monkeypatch.setattr(
            torch, "randperm", lambda n, generator, device, real=torch.randperm: real(n, generator=generator)
        )
        calls, real = [], algo.behaviour_step
        monkeypatch.setattr(
            algo, "behaviour_step", lambda rows, calls=calls, real=real: calls.append(1) or real(rows)
        )
        algo._update_behaviour(batch)
        metrics = algo._behaviour_metrics()
        counts.append(len(calls))
        states.append((metrics, algo._behaviour_flat.data.clone()))
        monkeypatch.undo()
    (first, stopped), (second, masked) = states
    assert counts[0] < counts[1]
    assert torch.equal(stopped, masked)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["policy/behaviour_steps"] == counts[0] - 1, (
        "the step that sees too large a divergence is not taken"
    )
    assert 0 < first["policy/behaviour_kl"] < 1e-3


# -- less sampling error --------------------------------------------------------------------------------------------


def compare(states, arms, steps, seeds, **config):
    """Mean errors of on-policy sampling, PROPS and ROS."""
    cases = {
        "on-policy": {"behaviour_epochs": 0},
        "props": {},
        "ros": {"sampling": "ros", "behaviour_lr": 1.0},
    }
    out = {}
    for name, options in cases.items():
        found = []
        for seed in range(seeds):
            algo = tabular(states, arms, seed, rollout_steps=steps, **(config | options))
            found.append(error(algo, collect(algo, steps, seed + 1000)))
        out[name] = float(np.mean(found))
    return out


def test_bandit_has_at_most_sixty_percent_of_the_on_policy_error():
    """Ten arms, 256 samples; on-policy sampling expects (A - 1) / 2n = 0.0176."""
    found = compare(1, 10, 256, 4, behaviour_minibatches=1)
    assert 0.5 < found["on-policy"] / (9 / 512) < 1.7
    assert found["props"] <= 0.6 * found["on-policy"]
    assert found["ros"] < found["on-policy"]


def test_tabular_task_has_at_most_half_of_the_on_policy_error():
    """Nine states, four actions, 1024 samples; on-policy sampling expects 9 * 3 / 2048 = 0.0132."""
    found = compare(9, 4, 1024, 1, behaviour_steps=32, behaviour_minibatches=1)
    assert 0.3 < found["on-policy"] / (27 / 2048) < 2
    assert found["props"] <= 0.5 * found["on-policy"]


def test_fixed_gaussian_policy_in_a_simulator_is_sampled_with_less_error(tmp_path, monkeypatch):
    """The small version of benchmarks/props_sampling.py: every seed has to be below on-policy sampling."""
    pytest.importorskip("mujoco")
    record, real = [], PROPS.update

    def update(self, batch):
        metrics = real(self, batch)
        record.append(metrics["policy/sampling_error"].item())
        return metrics

    monkeypatch.setattr(PROPS, "update", update)
    words = ["recipe=debug_props", "env=Hopper-v5", "policy.hidden=[]", "loop.eval_episodes=1"]
    words += ["algo.rollout_steps=1024", "algo.epochs=1", "algo.buffer_batches=1"]
    words += ["algo.behaviour_steps=32", "algo.behaviour_lr=1e-2", "algo.behaviour_minibatches=2"]
    words += ["track.tensorboard=false", "track.console=false"]
    for seed in range(2):
        for epochs in (0, 16):
            options = [f"algo.behaviour_epochs={epochs}", f"seed={seed}", f"out={tmp_path}/{seed}-{epochs}"]
            train(compose([*words, *options]))
        on_policy, props = record[-2:]
        assert 0 < props < 0.9 * on_policy
    assert np.mean(record[1::2]) < 0.75 * np.mean(record[::2])


# -- what the behaviour policy sees, and what PPO learns from ----------------------------------------------------------


@pytest.mark.parametrize(("copies", "steps", "m"), [(1, 12, 4), (4, 6, 8), (3, 8, 6), (3, 8, 4), (4, 5, 2)])
def test_window_holds_the_newest_samples_without_those_that_leave_next(copies, steps, m, monkeypatch):
    """Rewards count the vector steps, so they tell which ones each behaviour update sees."""
    algo = tabular(3, 4, 0, rollout_steps=steps, behaviour_steps=m, buffer_batches=2, batch_size=4, epochs=1)
    seen, learned = [], []
    monkeypatch.setattr(
        PROPS, "_update_behaviour", lambda self, batch: seen.append(batch.reward[:, 0].int().tolist())
    )
    real = PPO.update
    monkeypatch.setattr(PPO, "update", lambda self, batch: learned.append(batch) or real(self, batch))
    asked = []
    for index in range(4):
        rows = collect(algo, steps, index, copies, start=index * steps)
        algo.update(stack(rows))
        times = [t for t in range(steps) if t * copies // m > (t - 1) * copies // m]
        asked += [(index * steps + t, index * steps + (*times, steps)[i + 1]) for i, t in enumerate(times)]
    expected = []
    for now, following in asked:
        held = list(range(max(0, now - 2 * steps), now))
        expected.append(held[following - now :] if len(held) == 2 * steps else held)
    assert seen == [held for held in expected if held]
    if m % copies == 0:
        assert {
            len(held) * copies for now, held in zip(asked, expected, strict=True) if now[0] >= 2 * steps
        } == {2 * steps * copies - m}
    for index, batch in enumerate(learned):
        first = max(0, index - 1) * steps
        assert batch.reward[:, 0].int().tolist() == list(range(first, (index + 1) * steps))
        seams = [t for t in range(len(batch)) if batch.truncated[t].all()]
        assert seams == list(range(steps - 1, len(batch), steps))


def test_minibatches_have_the_size_of_a_full_window_as_soon_as_they_can(monkeypatch):
    """Sixteen steps are held, four of them leave: two minibatches of six, whatever there is so far."""
    sizes, asked = [], []
    real, update = PROPS.behaviour_step, PROPS._update_behaviour
    monkeypatch.setattr(
        PROPS, "behaviour_step", lambda self, rows: sizes[-1].append(len(rows["chain"])) or real(self, rows)
    )
    monkeypatch.setattr(
        PROPS, "_update_behaviour", lambda self, batch: sizes.append([]) or update(self, batch)
    )
    options = {"behaviour_steps": 4, "behaviour_minibatches": 2, "behaviour_epochs": 1, "batch_size": 4}
    algo = tabular(3, 4, 0, rollout_steps=16, behaviour_target_kl=0.0, **options)
    for taken in (4 / 3, 2):
        rows = collect(algo, 16, 0)
        asked.append(len(sizes))
        assert algo.update(stack(rows))["policy/behaviour_steps"].item() == pytest.approx(taken)
    assert asked == [3, 7]
    assert sizes == [[4], [6], [6, 6], *[[6, 6]] * 4]


def test_advantages_cross_neither_episode_ends_nor_seams(lab):
    """Two rollouts in one update have the advantages of each on its own, and the old one the current values."""
    algo = lab.make("props", buffer_batches=2, rollout_steps=6, batch_size=8, behaviour_epochs=0, lr=1e-9)
    found = []
    real = algo._advantages
    algo._advantages = lambda batch: found.append(real(batch)) or found[-1]
    batches = [lab.make_rollout(algo, steps=6, seed=seed) for seed in (1, 2, 3)]
    for batch in batches:
        algo.update(batch)
    assert [len(advantage) for advantage, _, _ in found] == [6, 12, 12]
    for index, batch in ((1, batches[1]), (0, batches[1]), (1, batches[2])):
        advantage = found[2][0] if batch is batches[2] else found[1 if index else 2][0]
        with torch.no_grad():
            value, after = algo.value(batch.obs), algo.value(batch.next_obs)
        done = batch.terminated | batch.truncated
        alone, _ = gae(batch.reward, batch.discount, done, value, after, 0.99 * 0.95)
        assert torch.allclose(advantage[6 * index : 6 * index + 6], alone, atol=1e-5)


def test_the_logged_sampling_error_is_that_of_all_rollouts_held(lab):
    algo = lab.make("props", buffer_batches=2, behaviour_epochs=0, sampling_error=True)
    batches = [lab.make_rollout(algo, seed=seed) for seed in range(3)]
    for index, batch in enumerate(batches):
        held = batches[max(0, index - 1) : index + 1]
        obs = {"state": torch.cat([part.obs["state"].flatten(0, 1) for part in held])}
        expected = sampling_error(algo.policy, obs, torch.cat([part.chain.flatten(0, 1) for part in held]))
        assert algo.update(batch)["policy/sampling_error"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_old_samples_start_the_update_at_ratio_one(lab):
    """Log-probabilities are those of the policy to be updated, whoever collected the samples."""
    algo = lab.make("props", buffer_batches=2, epochs=1, batch_size=32, lr=0.01)
    algo.update(lab.make_rollout(algo, steps=16))
    stale = lab.make_rollout(algo, steps=16, seed=2)
    first = []
    real = algo.minibatch_step
    algo.minibatch_step = lambda rows: first.append(real(rows)) or first[-1]
    algo.update(replace(stale, log_prob=stale.log_prob - 3.0))
    assert first[0]["policy/kl"].abs() < 1e-6
