# SPDX-License-Identifier: Apache-2.0
"""HNPG: the natural-gradient identity, the critic against plain loops and dynamic programming, learning, bad input."""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from robopost_envs.lock import LockConfig
from torch import nn

from robopost.algos.natural import conjugate_gradients, gaussian_kl, natural_step
from robopost.algos.online.hnpg import HNPG, HNPGConfig, surrogate
from robopost.algos.online.trpo import NPG, TRPO, NPGConfig, TRPOConfig
from robopost.collect import collect
from robopost.compose import compose
from robopost.config import CollectConfig
from robopost.data.batch import Batch, Spec
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.errors import ConfigError, DataError
from robopost.loops import train
from robopost.nets.ensemble import EnsembleMLP
from robopost.nets.rows import Regression, Rows, StackedQ, tanh_
from robopost.policies.base import EPISODE_STEP
from robopost.policies.gaussian import Gaussian, GaussianConfig, normal_log_density
from robopost.policies.stepwise import Stepwise, StepwiseConfig

H, D, A = 3, 4, 2
SPEC = Spec({"state": ((D,), "float32")}, A, (-1.0,) * A, (1.0,) * A, H)
OPEN = replace(SPEC, max_steps=0)
KINDS = {"hnpg": (HNPG, HNPGConfig), "trpo": (TRPO, TRPOConfig), "npg": (NPG, NPGConfig)}


def make(name="hnpg", spec=SPEC, policy=None, seed=0, **config):
    cls, config_cls = KINDS[name]
    torch.manual_seed(seed)
    policy = policy or Stepwise(StepwiseConfig(hidden=[8, 8]), spec)
    config = {"hidden": [8, 8]} | config
    generator = torch.Generator().manual_seed(seed + 100)
    return cls(config_cls(**config), policy, spec, device=torch.device("cpu"), generator=generator)


def stationary(name="hnpg", spec=OPEN, **config):
    torch.manual_seed(1)
    policy = Gaussian(GaussianConfig(hidden=[8, 8], activation="tanh", squash=False, state_std=False), spec)
    return make(name, spec, policy, **({"gamma": 0.9, "rollout_steps": 6} | config))


def tensors(batch=20, seed=0, heads=H):
    """Fresh rows (H, B, ...), or recorded ones."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    last = (torch.arange(heads) == heads - 1)[:, None].expand(heads, batch)
    return {
        "action": draw(heads, batch, A).clamp(-1, 1),
        "chain": draw(heads, batch, A),
        "reward": draw(heads, batch),
        "done": last,
        "discount": (~last).float(),
        "obs/state": draw(heads, batch, D),
        "next_obs/state": draw(heads, batch, D),
    }


def rollout(algo, episodes=4, length=H, seed=0):
    """(T, N) steps of whole episodes, chains of the algorithm's own policy."""
    g = torch.Generator().manual_seed(seed)
    obs = {"state": torch.randn(length, episodes, D, generator=g)}
    step = torch.arange(length)[:, None].expand(length, episodes)
    flat = {"state": obs["state"].flatten(0, 1), EPISODE_STEP: step.flatten()}
    act = algo.policy.act(flat, generator=g)
    shape = lambda x: x.unflatten(0, (length, episodes))  # noqa: E731
    return Batch(
        obs=obs | {EPISODE_STEP: step},
        action=shape(act.chunk[:, 0]),
        reward=torch.randn(length, episodes, generator=g),
        next_obs={"state": torch.randn(length, episodes, D, generator=g)},
        terminated=step == length - 1,
        truncated=torch.zeros(length, episodes, dtype=torch.bool),
        discount=(step < length - 1).float() * algo.config.gamma,
        chain=shape(act.chain),
        log_prob=shape(act.log_prob),
    )


def recorded_data(episodes=6, length=H, seed=0, spec=SPEC):
    rng = np.random.default_rng(seed)
    made = [
        Episode(
            {"state": rng.normal(size=(length + 1, D)).astype(np.float32)},
            rng.uniform(-1, 1, (length, A)).astype(np.float32),
            rng.normal(size=length).astype(np.float32),
            terminated=True,
            truncated=False,
        )
        for _ in range(episodes)
    ]
    return Dataset.from_episodes(made, spec)


# -- natural gradient ---------------------------------------------------------------------------------------------


def bandit(dtype=torch.float64, heads=1, rows=40, seed=0):
    """A one-step Gaussian bandit per head: rows of parameters, surrogate and KL."""
    torch.manual_seed(seed)
    policy = Stepwise(StepwiseConfig(hidden=[4]), replace(SPEC, max_steps=heads)).to(dtype)
    g = torch.Generator().manual_seed(seed + 1)
    state = torch.randn(heads, rows, D, generator=g, dtype=dtype)
    chain = torch.randn(heads, rows, A, generator=g, dtype=dtype)
    advantage = torch.randn(heads, rows, generator=g, dtype=dtype) + chain[..., 0]
    matrix = Rows(policy, heads)
    with torch.no_grad():
        mean, log_std = (value.clone() for value in policy.heads(state))
        old = normal_log_density(chain, mean, log_std).sum(-1)

    def objective():
        return surrogate(advantage, normal_log_density(chain, *policy.heads(state)).sum(-1) - old)

    def divergence():
        return gaussian_kl(mean, log_std, *policy.heads(state)).sum(-1).mean(1)

    return policy, matrix, objective, divergence, (state, chain, advantage)


OPTIONS = {"max_kl": 1e-2, "damping": 0.1, "iterations": 60, "backtracks": 10}


def test_natural_gradient_matches_a_dense_solve():
    _, rows, objective, divergence, _ = bandit()
    old = rows.data.clone()
    gradient = rows.join(torch.autograd.grad(objective().sum(), rows.params))[0]
    slope = rows.join(torch.autograd.grad(divergence().sum(), rows.params, create_graph=True))[0]
    size = len(slope)
    columns = [
        rows.join(torch.autograd.grad(slope[i], rows.params, retain_graph=True, materialize_grads=True))[0]
        for i in range(size)
    ]
    fisher = torch.stack(columns)
    assert torch.allclose(fisher, fisher.t(), atol=1e-10)
    assert torch.linalg.eigvalsh(fisher).min() > -1e-10
    matrix = fisher + 0.1 * torch.eye(size, dtype=fisher.dtype)
    dense = torch.linalg.solve(matrix, gradient)
    solved = conjugate_gradients(lambda v: v @ matrix, gradient[None], 60, 1e-14)
    assert (solved[0] - dense).abs().max() < 1e-5
    result = natural_step(rows, objective, divergence, **OPTIONS)
    step = dense * (2e-2 / (dense @ matrix @ dense)).sqrt()
    assert torch.allclose(rows.data[0] - old[0], result.share * step, atol=1e-5)
    assert result.share == 1
    taken = rows.data[0] - old[0]
    quadratic = 0.5 * taken @ fisher @ taken
    assert torch.allclose(quadratic, result.quadratic, atol=1e-9)
    assert quadratic <= 1e-2 * (1 + 1e-6)
    assert result.after > result.before
    # Ten iterations, the default, are within a hair of the quadratic bound too.
    _, rows, objective, divergence, _ = bandit(seed=4)
    assert natural_step(rows, objective, divergence, **(OPTIONS | {"iterations": 10})).quadratic <= 1e-2 * (
        1 + 1e-6
    )


def test_fisher_of_a_linear_policy_by_hand():
    """Mean = W s + b, std = e^l: F = E[x x^T] / std^2 for each row of [W, b], 2 for each log-std."""
    policy = Stepwise(StepwiseConfig(hidden=[], log_std_init=0.5), replace(SPEC, max_steps=1)).double()
    state = torch.randn(1, 30, D, dtype=torch.float64)
    rows = Rows(policy, 1)
    mean, log_std = (value.detach().clone() for value in policy.heads(state))
    kl = gaussian_kl(mean, log_std, *policy.heads(state)).sum(-1).mean(1)
    slope = rows.join(torch.autograd.grad(kl.sum(), rows.params, create_graph=True))[0]
    v = torch.randn(len(slope), dtype=torch.float64)
    product = rows.join(torch.autograd.grad(slope @ v, rows.params))[0]
    x = torch.cat([state[0], torch.ones(30, 1, dtype=torch.float64)], 1)
    by_name = dict(zip([n for n, _ in policy.named_parameters()], policy.parameters(), strict=True))
    parts = dict(zip(by_name, v.split([p.numel() for p in by_name.values()]), strict=True))
    weight = torch.cat([parts["net.0.weight"].view(D, A), parts["net.0.bias"].view(1, A)])
    ours = dict(zip(by_name, product.split([p.numel() for p in by_name.values()]), strict=True))
    expected = x.t() @ x @ weight / 30 * np.exp(-1.0)
    assert torch.allclose(ours["net.0.weight"].view(D, A), expected[:D], atol=1e-10)
    assert torch.allclose(ours["net.0.bias"].view(1, A), expected[D:], atol=1e-10)
    assert torch.allclose(ours["log_std"], 2 * parts["log_std"], atol=1e-10)


def test_all_heads_at_once_equal_separate_calls():
    policy, rows, objective, divergence, (state, chain, advantage) = bandit(heads=3)
    advantage[2] *= 1e-7  # its residual is below the tolerance from the start: that head rests
    single = []
    for head in range(3):
        one = Stepwise(StepwiseConfig(hidden=[4]), replace(SPEC, max_steps=1)).double()
        for ours, theirs in zip(one.parameters(), policy.parameters(), strict=True):
            ours.data.copy_(theirs.data[head : head + 1])
        s, c, a = (x[head : head + 1] for x in (state, chain, advantage))
        mean, log_std = (value.detach().clone() for value in one.heads(s))
        old = normal_log_density(c, mean, log_std).sum(-1)
        matrix = Rows(one, 1)
        result = natural_step(
            matrix,
            lambda one=one, s=s, c=c, a=a, old=old: surrogate(
                a, normal_log_density(c, *one.heads(s)).sum(-1) - old
            ),
            lambda one=one, s=s, m=mean, sd=log_std: gaussian_kl(m, sd, *one.heads(s)).sum(-1).mean(1),
            **(OPTIONS | {"iterations": 10}),
        )
        single.append((matrix.data[0], result))
    result = natural_step(rows, objective, divergence, **(OPTIONS | {"iterations": 10}))
    for head, (data, alone) in enumerate(single):
        assert (rows.data[head] - data).abs().max() < 1e-8
        for name in ("before", "after", "share", "kl", "quadratic"):
            assert torch.allclose(getattr(result, name)[head], getattr(alone, name)[0], atol=1e-8), name


def test_line_search_refuses_halves_and_checks_kl():
    """One parameter: J = 2 x - c x^2 improves only up to a point, KL = x^2 / 2."""

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))

    def run(curve, kl_scale=1.0, **options):
        module = Scalar()
        rows = Rows(module, 2)
        objective = lambda: (2 * module.x - torch.tensor(curve)[:, None] * module.x.square()).squeeze(1)  # noqa: E731
        flat = lambda: (kl_scale * module.x.square() / 2 + module.x.pow(4) * 100).squeeze(1)  # noqa: E731
        options = {"max_kl": 0.5, "damping": 0.0, "iterations": 5, "backtracks": 4} | options
        return natural_step(rows, objective, flat, **options), rows.data[:, 0]

    # The full step is x = 1 (x^2 / 2 = max_kl), predicted gain 2.
    result, x = run([0.0, 4.0])
    assert result.share.tolist() == [1.0, 0.25]  # 2 - 4 < 0; 1 - 1 = 0 is no gain; 0.5 - 0.25 = 0.25 > 0.05
    assert x.tolist() == [1.0, 0.25]
    result, x = run([0.0, 1000.0])
    assert result.share.tolist() == [1.0, 0.0]
    assert x[1] == 0
    result, x = run([0.0, 1000.0], backtracks=0)
    assert x.tolist() == [1.0, 1.0]
    result, _ = run([0.0, 0.0], check_kl=True)  # x^2 / 2 + 100 x^4 <= 0.5 holds at 1/4 only
    assert result.share.tolist() == [0.25, 0.25]
    assert (result.kl <= 0.5).all()


def test_zero_advantages_change_nothing():
    algo = make(hybrid=False)
    before = algo._rows.data.clone()
    result = algo.policy_step({"state": torch.randn(H, 5, D)}, torch.randn(H, 5, A), torch.zeros(H, 5))
    assert torch.equal(algo._rows.data, before)
    assert torch.isfinite(result.kl).all()
    npg = make("npg")
    npg.policy_step({"state": torch.randn(H, 5, D)}, torch.randn(H, 5, A), torch.zeros(H, 5))
    assert torch.isfinite(npg._rows.data).all()


# -- critics ------------------------------------------------------------------------------------------------------


def plain(net, member):
    layers = []
    for layer in net:
        if hasattr(layer, "weight"):
            linear = nn.Linear(*layer.weight.shape[1:])
            linear.weight.data.copy_(layer.weight[member].t())
            linear.bias.data.copy_(layer.bias[member, 0])
            layers.append(linear)
        else:
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def fitted(net, on, off, steps=30):
    """The released inner loop in plain torch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [(net(x) - y).square().mean() for x, y in (on, off) if len(x)]
        sum(losses).backward()
        optimizer.step()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("hybrid", [True, False])
def test_backward_pass_agrees_with_a_plain_loop(hybrid):
    algo, fresh, old = make(hidden=[8, 6]), tensors(20), tensors(12, seed=1)
    nets = [plain(algo.critic.net, h) for h in range(H)]
    untouched = copy.deepcopy(nets)
    g = torch.Generator().set_state(algo.generator.get_state())
    for round_ in range(2):  # weights go on, Adam begins afresh
        metrics = algo._fit(fresh, old if hybrid else None)
        noise = torch.randn(H, 12, A, generator=g) if hybrid else None
        returns = fresh["reward"].flip(0).cumsum(0).flip(0)
        losses = []
        for h in reversed(range(H)):
            on = torch.cat([fresh["obs/state"][h], fresh["action"][h]], 1), returns[h][:, None]
            off = (torch.zeros(0), torch.zeros(0))
            if noise is not None:
                y = old["reward"][h][:, None]
                if h < H - 1:
                    after = old["next_obs/state"]
                    mean, log_std = algo.policy.heads(after.roll(1, 0))
                    action = (mean + log_std.exp() * noise)[h + 1].clamp(-1, 1)
                    with torch.no_grad():
                        y = y + nets[h + 1](torch.cat([after[h], action], 1))
                off = torch.cat([old["obs/state"][h], old["action"][h]], 1), y.detach()
            losses.append(fitted(nets[h], on, off))
        assert metrics["loss/critic"] == pytest.approx(np.sum(losses, 1).mean(), rel=1e-4), round_
    for h in range(H):
        ours = plain(algo.critic.net, h)
        for a, b, c in zip(ours.parameters(), nets[h].parameters(), untouched[h].parameters(), strict=True):
            assert (a - b).abs().max() < 1e-5
            assert (a - c).abs().max() > 1e-3


def test_without_fresh_rows_it_is_exact_backward_policy_evaluation():
    """A 3-state lock with tabular features: right = +1 switches A and B or pays 1 at the end, the policy takes it."""
    spec = Spec({"state": ((3,), "float32")}, 1, (-1.0,), (1.0,), H)
    policy = Stepwise(StepwiseConfig(hidden=[]), spec)
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
        policy.net[0].bias.fill_(3.0)  # beyond the bound: what is executed is +1
        policy.log_std.fill_(-20.0)
    algo = make(spec=spec, policy=policy, hidden=[32], critic_steps=400, critic_lr=1e-2)
    state, action = torch.arange(3).repeat_interleave(2), torch.tensor([-1.0, 1.0]).repeat(3)
    right = (action > 0) & (state < 2)
    after = torch.where(right, 1 - state, 2)
    reward = torch.zeros(H, 6)
    reward[-1] = torch.where(right, 1.0, 0.1)  # a failure is worth something too
    repeat = lambda x: x.expand(H, *x.shape).clone()  # noqa: E731
    recorded = {
        "obs/state": repeat(torch.eye(3)[state]),
        "next_obs/state": repeat(torch.eye(3)[after]),
        "action": repeat(action[:, None]),
        "reward": reward,
        "discount": torch.ones(H, 6),
    }
    none = {
        "obs/state": torch.zeros(H, 0, 3),
        "action": torch.zeros(H, 0, 1),
        "reward": torch.zeros(H, 0),
        "discount": torch.zeros(H, 0),
        "done": torch.zeros(H, 0, dtype=torch.bool),
    }
    algo._fit(none, recorded)
    exact = torch.zeros(H, 3, 2)
    exact[-1] = reward[-1].view(3, 2)
    for h in (1, 0):
        exact[h] = exact[h + 1][after, 1].view(3, 2)
    q = algo.critic(recorded["obs/state"], recorded["action"])
    assert (q.view(H, 3, 2) - exact).abs().max() < 1e-2


def test_values_average_q_over_executed_actions():
    algo = make(action_samples=7)
    obs = {"state": torch.randn(H, 5, D)}
    g = torch.Generator().set_state(algo.generator.get_state())
    value = algo._heads.value(obs)
    mean, log_std = algo.policy.heads(obs["state"])
    noise = torch.randn(H, 5, 7, A, generator=g)
    actions = (mean[:, :, None] + log_std.exp()[:, :, None] * noise).clamp(-1, 1)
    q = torch.stack([algo.critic(obs["state"], actions[:, :, i]) for i in range(7)], 2)
    assert torch.allclose(value, q.mean(2), atol=1e-5)


def test_minibatches_and_stacking_helpers():
    torch.manual_seed(0)
    net = EnsembleMLP(2, 3, [5], 1, "tanh")
    first = plain(net, 1)
    fit = Regression(net)
    other = net[0].weight[0].clone()
    x, y, pick = torch.randn(9, 3), torch.randn(9, 1), torch.randint(9, (4, 6))
    residual = fit.fit(1, x, y, torch.full((6, 1), 1 / 6), steps=4, lr=3e-4, pick=pick)
    optimizer = torch.optim.Adam(first.parameters(), lr=3e-4)
    for rows in pick:
        loss = (first(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(residual.square().mean(), loss, atol=1e-5)
    for a, b in zip(plain(net, 1).parameters(), first.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6
    assert torch.equal(net[0].weight[0], other)
    with torch.no_grad():
        assert torch.allclose(fit.predict(1, x), first(x), atol=1e-5)
    z = torch.linspace(-20, 20, 1001)
    assert (tanh_(z.clone()) - z.tanh()).abs().max() < 1e-6
    with pytest.raises(ConfigError, match=r"2 stacked members were expected"):
        Rows(nn.Linear(3, 3), 2)
    head = StackedQ(2, 3, 1, [4]).net[2]
    assert head.bias.abs().max() == 0
    assert head.weight.abs().max() <= 0.05


# -- one iteration ------------------------------------------------------------------------------------------------


def test_advantages_are_gae_on_fresh_rows_and_own_actions_on_recorded_ones(monkeypatch):
    algo, seen = make(gae_lambda=0.5), {}
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
    assert torch.allclose(seen["advantage"][:, :4], expected, atol=1e-5)
    assert torch.equal(seen["states"][:, :4], batch.obs["state"])
    assert torch.equal(seen["chain"][:, :4], batch.chain[:, :, 0, 0])
    # Recorded states in their own step; actions are drawn anew, A = Q - V of the refitted critic.
    states, known = seen["states"][:, 4:], data.obs["state"].view(6, H + 1, D)
    assert all((known[:, h] == row).all(1).any() for h in range(H) for row in states[h])
    q = algo.critic(states, seen["chain"][:, 4:].clamp(-1, 1))
    assert torch.allclose(seen["advantage"][:, 4:], q - values[1], atol=1e-5)
    assert all(torch.isfinite(item) and item.shape == () for item in metrics.values())
    assert {"loss/critic_recorded", "policy/kl", "policy/accepted"} <= metrics.keys()


def test_stationary_returns_bootstrap_where_an_episode_was_cut(monkeypatch):
    algo = stationary("trpo", critic_sweeps=2, critic_batch_size=5)
    batch = rollout(algo, length=6)
    cut = torch.zeros(6, 4, dtype=torch.bool)
    cut[2] = True
    batch = replace(batch, terminated=torch.zeros_like(cut), truncated=cut, discount=torch.full((6, 4), 0.9))
    targets, values = [], []
    real, value = algo._fit_head, algo._value
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
        assert set(recorded["discount"].unique().tolist()) <= {0.0, 0.9 * torch.ones(()).item()} | {
            float(torch.tensor(0.9))
        }
    assert not torch.allclose(critics[0], critics[1])


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
        algo.attach(recorded_data())
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
    """Mean success of the last five iterations of 1,000 steps."""
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
    with pytest.raises(ConfigError, match=r"policy=deterministic with horizon=1 is none"):
        make(policy=lab.make_policy("deterministic", SPEC))
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
