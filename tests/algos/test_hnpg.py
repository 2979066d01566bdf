# SPDX-License-Identifier: Apache-2.0
"""HNPG: one iteration, checkpoints, per-step policies, learning in small, bad input."""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from robopost_envs.lock import LockConfig

from robopost.algos.online.hnpg import HNPG, HNPGConfig
from robopost.algos.online.trpo import NPGConfig, TRPOConfig
from robopost.collect import collect
from robopost.compose import compose
from robopost.config import CollectConfig
from robopost.errors import ConfigError, DataError
from robopost.loops import train
from robopost.nets import fused
from robopost.policies.base import EPISODE_STEP
from robopost.policies.family import Family, FamilyConfig
from robopost.policies.gaussian import Gaussian, GaussianConfig
from robopost.policies.stepwise import Stepwise, StepwiseConfig

spec = importlib.util.spec_from_file_location("hnpg_lab", Path(__file__).parent / "hnpg_lab.py")
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)
H, D, A, SPEC, OPEN = small.H, small.D, small.A, small.SPEC, small.OPEN
make, stationary, rollout, recorded_data = small.make, small.stationary, small.rollout, small.recorded_data


def test_zero_advantages_change_nothing():
    algo = make(hybrid=False)
    before = algo._rows.data.clone()
    result = algo.policy_step({"state": torch.randn(H, 5, D)}, torch.randn(H, 5, A), torch.zeros(H, 5))
    assert torch.equal(algo._rows.data, before)
    assert torch.isfinite(result.kl).all()
    npg = make("npg")
    npg.policy_step({"state": torch.randn(H, 5, D)}, torch.randn(H, 5, A), torch.zeros(H, 5))
    assert torch.isfinite(npg._rows.data).all()


# -- one iteration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_advantages_are_gae_on_fresh_rows_and_own_actions_on_recorded_ones(monkeypatch, normalised):
    algo, seen = make(gae_lambda=0.5, normalise_advantage=normalised), {}
    data = recorded_data()
    algo.attach(data)
    batch = rollout(algo)
    real = algo.policy_step

    def spy(states, chain, advantage):
        seen.update(states=states["state"], chain=chain, advantage=advantage)
        return real(states, chain, advantage)

    monkeypatch.setattr(algo, "policy_step", spy)
    values = []
    value = algo._heads.value
    monkeypatch.setattr(algo._heads, "value", lambda obs: values.append(value(obs)) or values[-1])
    metrics = algo.update(batch)
    assert seen["advantage"].shape == (H, 4 + 4)
    v = values[0]
    running, expected = torch.zeros(4), torch.zeros(H, 4)
    for h in reversed(range(H)):
        delta = batch.reward[h] + (v[h + 1] if h < H - 1 else 0) - v[h]
        running = delta + 0.5 * running
        expected[h] = running
    assert torch.equal(seen["states"][:, :4], batch.obs["state"])
    assert torch.equal(seen["chain"][:, :4], batch.chain[:, :, 0, 0])
    # Recorded states in their own step; actions are drawn anew, A = Q - V of the refitted critic.
    states, known = seen["states"][:, 4:], data.obs["state"].view(6, H + 1, D)
    assert all((known[:, h] == row).all(1).any() for h in range(H) for row in states[h])
    q = algo.critic(states, seen["chain"][:, 4:].clamp(-1, 1))
    expected = torch.cat([expected, q - values[1]], 1)
    if normalised:  # of each policy on its own
        expected = torch.stack([(row - row.mean()) / row.std() for row in expected])
    assert torch.allclose(seen["advantage"], expected, atol=1e-5)
    assert all(torch.isfinite(item) and item.shape == () for item in metrics.values())
    assert {"loss/critic_recorded", "policy/kl", "policy/accepted"} <= metrics.keys()


@pytest.mark.parametrize(("wanted", "fresh", "drawn"), [(0, 4, 4), (0, 9, 6), (11, 4, 11)])
def test_as_many_recorded_rows_as_fresh_ones_unless_said_otherwise(wanted, fresh, drawn):
    algo = make(offline_batch=wanted)
    algo.attach(recorded_data(episodes=6))
    assert {tensor.shape[:2] for tensor in algo._draw(fresh).values()} == {(H, drawn)}


def test_stationary_returns_and_advantages_bootstrap_where_an_episode_was_cut(monkeypatch):
    algo = stationary("trpo", critic_sweeps=2, critic_batch_size=5)
    batch = rollout(algo, length=6)
    cut = torch.zeros(6, 4, dtype=torch.bool)
    cut[2] = True
    batch = replace(batch, terminated=torch.zeros_like(cut), truncated=cut, discount=torch.full((6, 4), 0.9))
    targets, values, found = [], [], []
    real, value, step = algo._fit_head, algo._value, algo.policy_step
    monkeypatch.setattr(algo, "policy_step", lambda s, c, a: found.append(a) or step(s, c, a))
    monkeypatch.setattr(algo, "_value", lambda obs: values.append(value(obs)) or values[-1])
    monkeypatch.setattr(algo, "_fit_head", lambda h, x, y, n: targets.append(y) or real(h, x, y, n))
    algo.update(batch)
    after = values[0]  # V of the true next observations, before the fit
    expected, running = torch.zeros(6, 4), after[5]  # the rollout's end is no end either
    for t in reversed(range(6)):
        running = batch.reward[t] + 0.9 * (after[2] if t == 2 else running)
        expected[t] = running
    assert torch.allclose(targets[0], expected.view(-1, 1), atol=1e-5)
    assert len(targets) == 2
    _, v, after = values  # of the refitted critic
    running = torch.zeros(4)
    for t in reversed(range(6)):
        ends = t in (2, 5)
        delta = batch.reward[t] + 0.9 * (after[t] if ends else v[t + 1]) - v[t]
        running = delta + (0 if ends else 0.9 * 0.97) * running
        expected[t] = running
    assert torch.allclose(found[0], expected.view(1, -1), atol=1e-5)


def test_minibatches_hold_fresh_and_recorded_rows_in_halves(monkeypatch):
    algo = stationary(critic_batch_size=5, critic_steps=40, rollout_steps=3)
    algo.attach(recorded_data(spec=OPEN))
    seen = {}
    real = algo._regression.fit
    monkeypatch.setattr(algo._regression, "fit", lambda *a, **k: seen.update(k, rows=a) or real(*a, **k))
    algo.update(rollout(algo, episodes=4))
    _, x, target, weight = seen["rows"]
    assert len(x) == len(target) == 12 + 12
    assert seen["pick"].shape == (40, 10)
    assert set(seen["pick"][:, :5].flatten().tolist()) == set(range(12))
    assert set(seen["pick"][:, 5:].flatten().tolist()) == set(range(12, 24))
    assert weight.flatten().tolist() == pytest.approx([0.2] * 10)


def test_stationary_recorded_targets_follow_the_newest_critic(monkeypatch):
    algo = stationary(critic_sweeps=2, rollout_steps=3)
    algo.attach(recorded_data(spec=OPEN))
    goals, critics = [], []
    real = algo._bootstrap

    def spy(recorded, ahead, head):
        critics.append(algo._regression.predict(0, ahead[0]).clone())
        goals.append((real(recorded, ahead, head), recorded))
        return goals[-1][0]

    monkeypatch.setattr(algo, "_bootstrap", spy)
    algo.update(rollout(algo))
    for (goal, recorded), q in zip(goals, critics, strict=True):
        assert torch.allclose(goal, recorded["reward"][0][:, None] + recorded["discount"][0][:, None] * q)
        assert recorded["discount"].unique().tolist() == pytest.approx([0.0, 0.9])  # the last step terminates
    assert not torch.allclose(critics[0], critics[1])


def test_a_large_relu_policy_takes_the_step_of_one_without_fused_kernels():
    """These kernels have no second derivative: the Fisher products must not run through them."""
    if not fused.available():
        pytest.skip("torch has no oneDNN linear here")
    steps = []
    try:
        for enabled in (True, False):
            fused.force(enabled)
            torch.manual_seed(1)
            policy = Gaussian(GaussianConfig(hidden=[256, 256], squash=False), OPEN)
            algo = make("npg", OPEN, policy, gamma=0.9, rollout_steps=6)
            before = algo._rows.data.clone()
            batch = rollout(algo, episodes=8, length=6)
            rows = batch.map(lambda x: x.flatten(0, 1)).obs["state"]
            assert fused.usable(policy.net, rows) == enabled
            algo.update(batch)
            steps.append(algo._rows.data - before)
    finally:
        fused.force(None)
    # Rounding turns a ReLU here and there.
    assert (steps[0] - steps[1]).norm() < 0.05 * steps[1].norm()
    assert steps[1].norm() > 1e-2


@pytest.mark.parametrize("kind", ["stepwise", "stationary"])
def test_saved_at_n_and_loaded_goes_on_bitwise(kind):
    build = (
        (lambda seed: make(seed=seed)) if kind == "stepwise" else (lambda seed: stationary(rollout_steps=3))
    )
    first, second = build(0), build(5)
    for algo in (first, second):
        algo.attach(recorded_data(spec=SPEC if kind == "stepwise" else OPEN))
    before = torch.get_rng_state()
    for seed in range(2):
        first.update(rollout(first, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.generator.set_state(first.generator.get_state())
    for seed in range(2, 4):
        a, b = first.update(rollout(first, seed=seed)), second.update(rollout(second, seed=seed))
        assert all(torch.equal(a[key], b[key]) for key in a)
    one, two = first.state_dict()["tensors"], second.state_dict()["tensors"]
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_compile_mode_runs_and_agrees():
    plain_, compiled = make(hybrid=False), make(hybrid=False)
    if importlib.util.find_spec("torch._inductor") is None:
        pytest.skip("no compiler")
    compiled.iterate = torch.compile(compiled.iterate, dynamic=False, backend="eager")
    batch = rollout(plain_)
    a, b = plain_.update(batch), compiled.update(batch)
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_graph_agrees_with_eager():
    results = []
    for mode in ("eager", "cudagraph"):
        torch.manual_seed(0)
        device = torch.device("cuda")
        policy = Stepwise(StepwiseConfig(hidden=[8, 8]), SPEC).to(device)
        generator = torch.Generator(device=device).manual_seed(0)
        algo = HNPG(HNPGConfig(hidden=[8, 8]), policy, SPEC, device=device, generator=generator)
        algo.attach(recorded_data(device=device))
        algo.accelerate(mode)
        for seed in range(6):
            algo.update(rollout(make(), seed=seed).to(device))
        results.append(algo._rows.data.clone())
    assert torch.allclose(*results, atol=1e-5)


# -- policy -------------------------------------------------------------------------------------------------------


def test_the_step_chooses_the_policy():
    torch.manual_seed(0)
    policy = Stepwise(StepwiseConfig(hidden=[5]), SPEC)
    with torch.no_grad():
        policy.log_std.copy_(torch.randn(H, 1, A))
    state, step = torch.randn(6, D), torch.tensor([2, 0, 1, 1, 2, 0])
    obs = {"state": state, EPISODE_STEP: step}
    mean, log_std = policy.distribution(obs)
    every, stds = policy.heads(state.expand(H, 6, D))
    assert torch.allclose(mean[:, 0], every[step, torch.arange(6)], atol=1e-6)
    assert torch.equal(log_std, stds[step])
    _, log_prob, chain = policy.sample(obs, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(policy.log_prob(obs, chain), log_prob)
    normal = torch.distributions.Normal(mean, log_std.exp())
    assert torch.allclose(normal.log_prob(chain[:, 0]).sum((1, 2)), log_prob, atol=1e-5)
    assert torch.allclose(policy.entropy(obs), normal.entropy().sum((1, 2)), atol=1e-5)
    with pytest.raises(ConfigError, match=r"at step 3, policy=stepwise was made for 3 steps"):
        policy.distribution(obs | {EPISODE_STEP: step + 1})
    with pytest.raises(ConfigError, match=r"needs the step within the episode"):
        policy.distribution({"state": state})


# -- learning, in small -------------------------------------------------------------------------------------------


def learn(folder, horizon, iterations, *extra, quality=None, algo="hnpg", actions=10):
    """Mean success of the last five iterations of 300 steps."""
    n = 300 // horizon
    words = [f"algo={algo}", "env=lock", f"env.horizon={horizon}", f"env.num_envs={n}", "device=cpu"]
    if quality is not None:
        path = folder / f"data{quality}.zarr"
        collect(
            CollectConfig(
                env=LockConfig(horizon=horizon, actions=actions),
                episodes=300,
                quality=quality,
                num_envs=100,
                out=str(path),
            )
        )
        words.append(f"data.path={path}")
    steps = n * horizon * iterations
    words += [
        f"loop.steps={steps}",
        f"loop.log_every={n * horizon}",
        "loop.eval_episodes=2",
        f"env.actions={actions}",
    ]
    out = train(compose([*words, *extra, f"out={folder / 'run'}", "track.console=false"]))
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    rates = [
        float(line.split('"train/success": ')[1].split(",")[0]) for line in lines if "train/succ" in line
    ]
    return np.mean(rates[-5:])


FAST = ("algo.critic_lr=3e-3", "algo.max_kl=0.05", "algo.hidden=[32,32]", "track.tensorboard=false")


def test_recorded_data_solves_a_lock_that_fresh_data_alone_does_not(tmp_path):
    assert learn(tmp_path / "a", 3, 45, *FAST, quality=1 - 1 / 3) > 0.5
    assert learn(tmp_path / "b", 3, 45, *FAST, algo="trpo") < 0.25


def test_useless_data_does_not_stop_it(tmp_path):
    """The on-policy term alone solves an easy lock; uniform random recorded actions don't get in its way."""
    assert learn(tmp_path, 2, 60, *FAST, quality=0.0, actions=4) > 0.5


# -- bad input ----------------------------------------------------------------------------------------------------


def test_config_and_policies_that_do_not_fit_are_refused(lab):
    with pytest.raises(ConfigError, match=r"algo.max_kl=0 must be above 0"):
        HNPGConfig(max_kl=0)
    with pytest.raises(ConfigError, match=r"algo.gamma=1.5 must lie in \[0, 1\]"):
        HNPGConfig(gamma=1.5)
    with pytest.raises(ConfigError, match=r"algo.hybrid=true with algo=trpo is algo=hnpg"):
        TRPOConfig(hybrid=True)
    with pytest.raises(ConfigError, match=r"NPG has no line search"):
        NPGConfig(backtracks=3)
    with pytest.raises(
        ConfigError, match=r"algo.check_kl=true needs a line search, algo.backtracks=0 has none"
    ):
        TRPOConfig(backtracks=0)
    with pytest.raises(ConfigError, match=r"policy=deterministic with horizon=1 is none"):
        make(policy=lab.make_policy("deterministic", SPEC))
    with pytest.raises(ConfigError, match=r"policy=family with horizon=1 is none"):
        make("trpo", OPEN, Family(FamilyConfig(hidden=[8], balance_hidden=[8]), OPEN))
    with pytest.raises(ConfigError, match=r"algo.gamma=1 has no value function"):
        stationary(gamma=1.0)
    with pytest.raises(ConfigError, match=r"Fix: algo.rollout_steps=2048"):
        stationary(rollout_steps=0)
    with pytest.raises(ConfigError, match=r"must be a multiple of the 3 steps"):
        make(rollout_steps=5)
    with pytest.raises(ConfigError, match=r"critic_sweeps=2 must be 1"):
        make(critic_sweeps=2)
    with pytest.raises(ConfigError, match=r"policy.steps=4, episodes have 3 steps"):
        Stepwise(StepwiseConfig(steps=4), SPEC)
    with pytest.raises(ConfigError, match=r"names no time limit"):
        Stepwise(StepwiseConfig(), OPEN)
    with pytest.raises(ConfigError, match=r"policy.horizon=2"):
        StepwiseConfig(horizon=2)


def test_rollouts_and_data_that_do_not_fit_are_refused_before_anything_changes():
    algo = make()
    before = algo._rows.data.clone()
    with pytest.raises(ConfigError, match=r"none is attached. Fix: data.path=<store>, or algo.hybrid=false"):
        algo.update(rollout(algo))
    with pytest.raises(DataError, match=r"episode 0 of data.path has 4 steps, policy=stepwise has 3"):
        algo.attach(recorded_data(length=4))
    algo.attach(recorded_data())
    early = rollout(algo)
    early.terminated[1, 2] = True
    with pytest.raises(DataError, match=r"ended after 2 of 3 steps"):
        algo.update(early)
    late = rollout(algo)
    late.terminated[2, 0] = False
    with pytest.raises(DataError, match=r"goes on after step 3"):
        algo.update(late)
    with pytest.raises(DataError, match=r"needs chain"):
        algo.update(replace(rollout(algo), chain=None))
    assert torch.equal(algo._rows.data, before)
    assert algo.updates == 0


def test_heads_of_a_squashed_gaussian_execute_its_tanh():
    policy = Gaussian(GaussianConfig(hidden=[8]), OPEN)
    algo = make("trpo", OPEN, policy, gamma=0.9, rollout_steps=6)
    chain, obs = 3 * torch.randn(1, 5, A), {"state": torch.randn(1, 5, D)}
    assert torch.equal(algo._heads.executed(chain), chain.tanh())
    mean, log_std = policy.distribution({"state": obs["state"][0]})
    entropy = torch.distributions.Normal(mean, log_std.exp()).entropy().sum((1, 2)).mean()
    assert torch.allclose(algo._heads.entropy(obs), entropy)


def test_unbounded_actions_are_not_clipped():
    free = replace(SPEC, action_low=(-np.inf,) * A, action_high=(np.inf,) * A)
    algo = make(spec=free)
    chain = 50 * torch.randn(H, 5, A)
    assert torch.equal(algo._heads.executed(chain), chain)
    assert make()._heads.executed(chain).abs().max() == 1


def test_environments_that_do_not_fit_are_refused_before_the_first_update(tmp_path):
    base = ["device=cpu", "loop.steps=100", "track.console=false", f"out={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"policy=stepwise can't act where there are 2 discrete actions"):
        train(compose(["algo=trpo", "env=CartPole-v1", *base]))
    with pytest.raises(ConfigError, match=r"data.path is empty"):
        train(compose(["algo=hnpg", "env=lock", *base]))
    store = tmp_path / "d.zarr"
    collect(CollectConfig(env=LockConfig(horizon=3), episodes=3, num_envs=3, out=str(store)))
    with pytest.raises(DataError, match=r"has 3 steps, policy=stepwise has 4"):
        train(compose(["algo=hnpg", "env=lock", "env.horizon=4", f"data.path={store}", *base]))
    with pytest.raises(DataError, match=r"the environment has 'state'"):
        train(compose(["algo=hnpg", "env=lock", "env.horizon=13", f"data.path={store}", *base]))
    assert not (tmp_path / "run").exists()
