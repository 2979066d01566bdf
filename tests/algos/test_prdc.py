# SPDX-License-Identifier: Apache-2.0
"""PRDC: the acceptance checks of its objective. (The search is tested in tests/data/test_neighbours.py.)"""

import pytest
import torch

from robopost.algos.offline.prdc import PRDC, PRDCConfig, states
from robopost.data.batch import Spec
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.errors import ConfigError, DataError

CPU = torch.device("cpu")


def make_dataset(spec, state, action, reward, after):
    """Cut episodes of one step each: states (N, S), actions (N, A), rewards (N,), what follows (N, S)."""
    episodes = [
        Episode({"state": torch.stack([s, n]).numpy()}, a[None].numpy(), r[None].numpy(), False, True)
        for s, a, r, n in zip(state, action, reward, after, strict=True)
    ]
    return Dataset.from_episodes(episodes, spec, name="toy")


def toy(spec, rows=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    obs = spec.obs["state"][0][0]
    state = torch.randn(rows, obs, generator=g)
    action = torch.rand(rows, spec.action_dim, generator=g) * 2 - 1
    return make_dataset(spec, state, action, torch.randn(rows, generator=g), state.roll(-1, 0))


def make(lab, dataset, spec=None, seed=0, hidden=(16, 16), **config):
    spec = spec or lab.SPEC
    torch.manual_seed(seed)
    policy = lab.make_policy("deterministic", spec, hidden=list(hidden))
    generator = torch.Generator().manual_seed(seed + 100)
    algo = PRDC(PRDCConfig(hidden=list(hidden), **config), policy, spec, device=CPU, generator=generator)
    algo.attach(dataset)
    return algo


def draw(dataset, size=32, seed=0):
    return dataset.sample(size, torch.Generator().manual_seed(seed), extra=("step",))


def gradient(loss, module):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def test_a_huge_beta_is_td3_bc(lab):
    """The state decides alone: every neighbour is the sample itself, and whole updates are TD3+BC's."""
    dataset = toy(lab.SPEC)
    ours, theirs = make(lab, dataset, beta=1e4), lab.make("td3_bc")
    for step in range(6):
        batch = draw(dataset, seed=step)
        metrics = ours.update(batch)
        theirs.update(batch)
    assert metrics["neighbours/own"] == 1
    for name in ("policy", "policy_target", "critic", "critic_target"):
        for a, b in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_beta_zero_looks_at_actions_alone(lab):
    dataset = toy(lab.SPEC)
    algo, batch = make(lab, dataset, beta=0.0, alpha=0.0), draw(dataset)
    loss, metrics = algo.actor_loss(batch)
    action = algo.policy(batch.obs)[:, 0]
    nearest = (action[:, None] - dataset.action).square().mean(-1).amin(1)
    assert loss.item() == pytest.approx(nearest.mean().item(), rel=1e-5)
    assert metrics["loss/constraint"].item() == pytest.approx(nearest.mean().item(), rel=1e-5)
    # There are no lists without a state to list by.
    assert (metrics["neighbours/certified"], metrics["neighbours/fallback"]) == (0, 1)


@pytest.mark.parametrize(("k", "kth"), [(1, False), (3, False), (3, True)])
def test_the_target_is_the_nearest_pair_of_the_whole_dataset(lab, monkeypatch, k, kth):
    """The k nearest's mean, or the k-th; the gradient is 2 (pi - a*) / (B A), with none through the search."""
    dataset, beta = toy(lab.SPEC), 0.3
    algo, batch = make(lab, dataset, beta=beta, alpha=0.0, k=k, kth=kth), draw(dataset)
    action = (torch.rand(32, 2, generator=torch.Generator().manual_seed(9)) * 2 - 1).requires_grad_()
    monkeypatch.setattr(algo.policy, "sample", lambda *_, **__: (action[:, None], None, None))
    loss, metrics = algo.actor_loss(batch)
    x = torch.cat([states(dataset, algo.policy) * beta, dataset.action], 1).double()
    query = torch.cat([batch.obs["state"] * beta, action.detach()], 1).double()
    distance, ids = torch.cdist(query, x, compute_mode="donot_use_mm_for_euclid_dist").sort(1)
    target = dataset.action[ids[:, k - 1 : k] if kth else ids[:, :k]].mean(1)
    (slope,) = torch.autograd.grad(loss, action)
    assert torch.allclose(slope, 2 * (action.detach() - target) / (32 * 2), atol=1e-8)
    own = ids[:, k - 1 : k] if kth else ids[:, :k]
    own = own == batch.extra["step"][:, None]
    assert 0 < own.float().mean() < 1, "the dataset tells the cases apart"
    assert metrics["neighbours/own"].item() == pytest.approx(own.float().mean().item())
    assert (metrics["neighbours/certified"], metrics["neighbours/fallback"]) == (1, 0)
    assert metrics["neighbours/distance"].item() == pytest.approx(distance[:, k - 1].mean().item(), rel=1e-5)


def test_scaling_q_leaves_the_actor_gradient_and_alpha_zero_leaves_the_constraint(lab):
    dataset = toy(lab.SPEC)
    algo, batch = make(lab, dataset), draw(dataset)
    before = gradient(algo.actor_loss(batch)[0], algo.policy)
    with torch.no_grad():
        last = algo.critic.net[len(algo.critic.net) - 1]
        last.weight.mul_(37.0)
        last.bias.mul_(37.0)
    assert torch.allclose(gradient(algo.actor_loss(batch)[0], algo.policy), before, rtol=1e-4, atol=1e-7)
    loss, metrics = make(lab, dataset, alpha=0.0).actor_loss(batch)
    assert loss.item() == metrics["loss/constraint"].item() > 0


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_q_differs_by_at_most_the_lipschitz_bound(lab, beta):
    """|Q(s, pi) - Q(s^, a^)| <= (L_s / beta + L_a) d for Q = u s + v a, and the bound is not idle."""
    dataset = toy(lab.SPEC, rows=500)
    algo, g = make(lab, dataset, beta=beta), torch.Generator().manual_seed(3)
    state, steps = states(dataset, algo.policy), torch.arange(500)
    action = torch.rand(500, 2, generator=g) * 2 - 1
    u, v = torch.randn(5, generator=g), torch.randn(2, generator=g)
    found = algo.neighbours.search(steps, action)
    near = found.ids[:, 0]
    gap = (state @ u + action @ v - state[near] @ u - dataset.action[near] @ v).abs()
    bound = (u.norm() / beta + v.norm()) * found.squared[:, 0].sqrt()
    assert (gap <= bound * (1 + 1e-5)).all()
    assert (gap / bound).max() > 0.5


def test_the_constraint_prevents_overestimation(lab):
    """No true Q exceeds 0; without the constraint the policy finds actions whose Q does."""
    spec, rows = Spec({"state": ((3,), "float32")}, 2, (-1.0,) * 2, (1.0,) * 2, 10), 1000
    g = torch.Generator().manual_seed(0)
    state = torch.randn(rows, 3, generator=g)
    noise = 0.1 * torch.randn(rows, 2, generator=g)
    action = (0.5 * (state @ torch.randn(3, 2, generator=g)).tanh() + noise).clamp(-1, 1)
    reward = -(action - 0.9).square().sum(1)
    after = 0.9 * state + 0.1 * torch.randn(rows, 3, generator=g)
    dataset = make_dataset(spec, state, action, reward, after)
    results = {}
    for alpha in (0.5, 1e6):
        rates = {"actor_lr": 1e-3, "critic_lr": 1e-3, "tau": 0.02, "gamma": 0.9}
        algo = make(lab, dataset, spec, hidden=(64, 64), alpha=alpha, batch_size=128, **rates)
        for _ in range(800):
            algo.update(dataset.sample(128, g, gamma=0.9, extra=("step",)))
        with torch.no_grad():
            chosen = algo.policy({"state": state})[:, 0]
            target = algo.neighbours.lookup(torch.arange(rows), chosen)[:, :2]
            q = algo.critic({"state": state}, chosen)[0]
        results[alpha] = ((chosen - target).norm(dim=1).mean().item(), q.max().item())
    assert results[0.5][1] <= 0 < results[1e6][1], results
    assert results[0.5][0] < 0.7 * results[1e6][0], results


def test_what_it_needs_is_said(lab):
    dataset = toy(lab.SPEC, rows=10)
    with pytest.raises(DataError, match=r"algo.k=10 needs at least 11 dataset steps, toy has 10"):
        make(lab, dataset, k=10)
    algo = make(lab, dataset)
    with pytest.raises(DataError, match="needs batches with the dataset step of each sample"):
        algo.actor_loss(lab.make_batch())
    algo.neighbours = None
    with pytest.raises(DataError, match=r"call attach\(dataset\) before the first update"):
        algo.actor_loss(draw(dataset))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "algo.alpha=-1.0 must be 0 or more"),
        ({"beta": float("nan")}, "algo.beta=nan must be 0 or more"),
        ({"k": 0}, "algo.k=0 must be at least 1"),
        ({"search": "list"}, "unknown algo.search 'list'. Did you mean 'lists'"),
        ({"list_bytes": -1}, r"algo.list_bytes=-1 must be 0 \(no lists\) or more"),
        ({"search": "lists", "list_bytes": 0}, "algo.search=lists needs lists"),
    ],
)
def test_config(options, message):
    with pytest.raises(ConfigError, match=message):
        PRDCConfig(**options)
