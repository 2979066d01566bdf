# SPDX-License-Identifier: Apache-2.0
"""Cal-QL: its floor, returns-to-go, and the online phase. (The 20-update agreement is in test_cql.py.)"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from robopost.algos.offline.cal_ql import bound_rate, calibrated
from robopost.algos.offline.cql import push_down
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.errors import DataError

OPTIONS = [{}, {"importance_sampling": False}, {"lagrange_gap": 0.8, "max_backup": True}]


def with_returns(batch, value):
    return replace(batch, extra={"return_to_go": torch.full((len(batch),), value)})


def same_parameters(a, b):
    pairs = zip(a.state_dict()["tensors"].items(), b.state_dict()["tensors"].items(), strict=True)
    return all(key == other and torch.equal(x, y) for (key, x), (other, y) in pairs)


def as_cql(lab, **options):
    """CQL with Cal-QL's own settings, from the same weights."""
    return lab.make("cql", actor_lr=1e-4, temperature_lr=1e-4, min_q_weight=5.0, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "data action in the set", "antmaze"])
def test_returns_of_minus_infinity_are_cql(lab, options):
    ours, cql = lab.make("cal_ql", **options), as_cql(lab, **options)
    for seed in range(3):
        batch = lab.make_batch(seed=seed)
        metrics = ours.update(with_returns(batch, -float("inf")))
        cql.update(batch)
        assert metrics["value/bound_rate"] == 0
    assert same_parameters(ours, cql)


def test_high_returns_leave_nothing_to_push_down_at_policy_actions():
    g = torch.Generator().manual_seed(0)
    q_uniform = torch.randn(2, 8, 10, generator=g, requires_grad=True)
    q_policy = torch.randn(2, 8, 20, generator=g, requires_grad=True)
    density = torch.randn(8, 30, generator=g)
    returns = torch.full((8,), 5.5)
    floored = calibrated(q_policy, returns)
    assert (floored == 5.5).all()
    pushed = push_down(q_uniform, floored, density)
    uniform, policy = torch.autograd.grad(pushed.sum(), [q_uniform, q_policy])
    assert (policy == 0).all()
    # Uniform actions keep their own Q: its share of exp(Q - log density), the policy's counted at 5.5.
    weight = torch.exp(torch.cat([q_uniform, torch.full((2, 8, 20), 5.5)], -1) - density)
    assert torch.allclose(uniform, (weight / weight.sum(-1, keepdim=True))[..., :10], atol=1e-6)


def test_high_returns_in_an_update_give_the_uniform_part_alone(lab):
    """One update with G far above Q: the critic's gradient is that of the uniform terms and of the data."""
    algo, cql = lab.make("cal_ql"), as_cql(lab)
    batch = lab.make_batch()
    metrics = algo.update(with_returns(batch, 50.0))
    assert metrics["value/bound_rate"] == 1
    # The policy's terms, at 50 each, take all the weight: only the data's Q is moved, by -w / B.
    q = cql.critic(batch.obs, batch.action)
    with torch.no_grad():
        action, _ = cql.policy.draw(*cql.policy.distribution(batch.next_obs), second_noise(cql))
        target = batch.reward + batch.discount * cql.critic_target(batch.next_obs, action[:, 0]).amin(0)
    loss = (q - target).square().mean(1).sum() - 5.0 * q.mean(1).sum()
    expected = torch.autograd.grad(loss, list(cql.critic.parameters()))
    got = algo._critic_flat.grad
    assert torch.allclose(got, torch.cat([g.flatten() for g in expected]), atol=1e-5)


def second_noise(algo):
    """The noise of the target's action: CQL draws the actor's before it."""
    torch.randn(32, 1, 2, generator=algo.generator)
    return torch.randn(32, 1, 2, generator=algo.generator)


def test_floor_and_bound_rate_by_hand():
    q = torch.tensor([[[1.0, 4.0], [0.0, -2.0]]])  # one critic, two states, two actions
    returns = torch.tensor([2.0, -1.0])
    assert calibrated(q, returns).tolist() == [[[2.0, 4.0], [0.0, -1.0]]]
    assert bound_rate(q, returns).item() == 0.5
    assert bound_rate(q, torch.tensor([9.0, 9.0])).item() == 1.0


def test_floor_counts_each_samples_own_return(lab):
    """A return moves the update of its own transition only: half the batch bounded, half the rate."""
    algo, batch = lab.make("cal_ql"), lab.make_batch()
    returns = torch.where(torch.arange(32) < 8, 1e3, -1e3)
    rate = algo.update(replace(batch, extra={"return_to_go": returns}))["value/bound_rate"]
    assert rate.item() == 0.25


def episode(rewards, *, terminated=False):
    steps = len(rewards)
    return Episode(
        obs={"state": np.zeros((steps + 1, 5), np.float32)},
        action=np.zeros((steps, 2), np.float32),
        reward=np.asarray(rewards, np.float32),
        terminated=terminated,
        truncated=not terminated,
    )


def test_return_to_go_at_terminals_and_time_limits(lab):
    """The sum stops at both ends of an episode and never runs into the next one."""
    gamma = lab.make("cal_ql").needs.gamma
    data = Dataset.from_episodes([episode([1, 2, 3], terminated=True), episode([4, 5])], lab.SPEC)
    batch = data.transitions_at(torch.arange(5), gamma=gamma, extra=lab.make("cal_ql").needs.extra)
    expected = [1 + 0.99 * 2 + 0.99**2 * 3, 2 + 0.99 * 3, 3, 4 + 0.99 * 5, 5]
    assert batch.extra["return_to_go"].tolist() == pytest.approx(expected)
    assert batch.discount.tolist() == pytest.approx([0.99, 0.99, 0.0, 0.99, 0.99])


def test_return_to_go_of_sparse_failures(lab):
    """Only an episode of failures alone that a time limit cut is worth r / (1 - gamma)."""
    episodes = [episode([-5, -5, -5]), episode([-5, -5, 5], terminated=True), episode([-5, 5, -5])]
    episodes.append(episode([-5, -5], terminated=True))
    data = Dataset.from_episodes(episodes, lab.SPEC, sparse_reward=True)
    extra = data.transitions_at(torch.arange(11), gamma=0.99, extra=("return_to_go",)).extra
    expected = [-500.0] * 3
    expected += [-5 + 0.99 * -5 + 0.99**2 * 5, -5 + 0.99 * 5, 5]
    expected += [-5 + 0.99 * 5 + 0.99**2 * -5, 5 + 0.99 * -5, -5]
    expected += [-5 + 0.99 * -5, -5]
    assert extra["return_to_go"].tolist() == pytest.approx(expected, rel=1e-6)
    # Without the rule the floor of a failure is far too high.
    plain = Dataset.from_episodes(episodes, lab.SPEC).transitions_at(
        torch.arange(1), gamma=0.99, extra=("return_to_go",)
    )
    assert plain.extra["return_to_go"].tolist() == pytest.approx([-5 * (1 + 0.99 + 0.99**2)])


def test_online_phase_keeps_the_floor_unless_told_otherwise(lab):
    kept, dropped, cql = lab.make("cal_ql"), lab.make("cal_ql", calibrate_online=False), as_cql(lab)
    batch = lab.make_batch()
    for algo in (kept, dropped):
        algo.begin_online()
    metrics = {algo: algo.update(with_returns(batch, 50.0)) for algo in (kept, dropped)}
    cql.update(batch)
    assert same_parameters(dropped, cql)
    assert not same_parameters(kept, cql)
    assert metrics[dropped]["value/bound_rate"] == metrics[kept]["value/bound_rate"] == 1
    # Offline both are the same algorithm.
    first, second = lab.make("cal_ql"), lab.make("cal_ql", calibrate_online=False)
    for algo in (first, second):
        algo.update(with_returns(batch, 50.0))
    assert same_parameters(first, second)


def test_batches_without_returns_are_refused(lab):
    with pytest.raises(DataError, match=r"algo=cal_ql needs the return-to-go"):
        lab.make("cal_ql").update(lab.make_batch())
