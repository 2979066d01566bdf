# SPDX-License-Identifier: Apache-2.0
"""PolicyFlow: ratios against exact densities, Gaussian PPO as a special case, learning rate, noise, modes."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from robopost_envs.multigoal import MultiGoalConfig, distances
from torch.distributions import Normal

from robopost.algos.generative.policyflow import (
    PolicyFlowConfig,
    adapted_lr,
    brownian_loss,
    log_ratio,
    noise_entropy,
    noise_kl,
)
from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.flow import Flow
from robopost.policies.gaussian import Gaussian, GaussianConfig

spec = importlib.util.spec_from_file_location("plain_flow_lab", Path(__file__).with_name("plain_flow_lab.py"))
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
VELOCITY = {"prediction": "velocity"}


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_the_first_ratio_is_one(prediction, solver):
    algo = lab.make("policyflow", policy_options={"prediction": prediction, "solver": solver})
    rows, obs = lab.rows_of(algo, lab.rollout(algo))
    velocity = algo.policy.velocity(rows["x"], rows["t"], algo.policy.encoder(obs))
    assert (velocity - rows["velocity"]).abs().max() < 1e-5
    _, kl, metrics = algo.actor_loss(rows, obs)
    assert kl.abs() < 1e-7
    assert metrics["policy/clip_fraction"] == 0
    ratio = log_ratio(rows["noise"], velocity - rows["velocity"], algo.noise(), rows["log_std"], rows["mask"])
    assert ratio.abs().max() < 2e-5


def test_with_a_constant_field_it_is_gaussian_ppo():
    """All weights 0 but the output's bias b: the action is x_0 + b + noise. Loss and gradients as Gaussian PPO's."""
    policy = lab.make_policy(execute=4, **VELOCITY)
    for parameter in policy.net.parameters():
        parameter.data.zero_()
    algo = lab.make("policyflow", policy, brownian_coef=0.0, entropy_coef=0.01, noise_init=0.3, clip=0.1)
    batch = lab.rollout(algo, short=False)
    rows, obs = lab.rows_of(algo, batch)
    start, executed = batch.chain.flatten(0, 1)[:, 0], batch.chain.flatten(0, 1)[:, 2]
    bias = lab.output_layer(policy).bias
    bias.data += 0.05 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(3))
    algo.noise.log_std.data += 0.03
    loss, kl, metrics = algo.actor_loss(rows, obs)
    ours = torch.autograd.grad(loss, [bias, algo.noise.log_std])

    mean = bias.detach().clone().requires_grad_()
    log_std = algo.noise.log_std.detach().clone().requires_grad_()
    new = Normal(start + mean.view(4, 2), log_std.exp())
    old = Normal(start, torch.full((4, 2), 0.3))
    ratio = (new.log_prob(executed) - old.log_prob(executed)).sum((1, 2)).exp()
    advantage = rows["advantage"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage).mean()
    expected = -surrogate - 0.01 * new.entropy()[0].sum()
    theirs = torch.autograd.grad(expected, [mean, log_std])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    exact = torch.distributions.kl_divergence(old, new).sum((1, 2)).mean()
    torch.testing.assert_close(kl, exact, rtol=1e-4, atol=1e-6)
    assert 0 < metrics["policy/clip_fraction"] < 1


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_a_translated_field_has_the_exact_density_ratio(solver):
    """v + c: N(a; x_1 + c, std^2) / N(a; x_1, std^2) for the given x_0, restricted to executed steps."""
    algo = lab.make("policyflow", policy_options=VELOCITY | {"solver": solver}, noise_init=0.4)
    batch = lab.rollout(algo)
    rows, obs = lab.rows_of(algo, batch)
    shift = torch.tensor([[0.2, -0.1], [0.3, 0.05], [1.0, 1.0], [-1.0, 2.0]])
    lab.output_layer(algo.policy).bias.data += shift.flatten()
    velocity = algo.policy.velocity(rows["x"], rows["t"], algo.policy.encoder(obs))
    ours = log_ratio(rows["noise"], velocity - rows["velocity"], algo.noise(), rows["log_std"], rows["mask"])
    _, end, action = batch.chain.flatten(0, 1).unbind(1)
    exact = Normal(end + shift, 0.4).log_prob(action) - Normal(end, 0.4).log_prob(action)
    exact = (exact * batch.chunk_mask.flatten(0, 1)[..., None]).sum((1, 2))
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    assert exact.abs().min() > 1e-3
    assert rows["mask"].sum(1).tolist() == [2] * 4 + [1] + [2] * 7


def test_times_are_points_of_the_solver():
    for solver, points in (("euler", [0, 1 / 3, 2 / 3]), ("midpoint", [i / 6 for i in range(6)])):
        algo = lab.make("policyflow", policy_options={"solver": solver})
        rows, _ = lab.rows_of(algo, lab.rollout(algo, decisions=30))
        assert sorted(set(rows["t"].tolist())) == pytest.approx(points)


def test_points_lie_between_noise_and_the_end_without_its_noise():
    algo = lab.make("policyflow")
    batch = lab.rollout(algo)
    rows, obs = lab.rows_of(algo, batch)
    start, end, noisy = batch.chain.flatten(0, 1).unbind(1)
    torch.testing.assert_close(end, algo.policy.chain(obs, start)[-1])
    at = rows["t"][:, None, None]
    torch.testing.assert_close(rows["x"], start + at * (end - start))
    torch.testing.assert_close(rows["noise"], noisy - end)
    high = algo.policy.normaliser.action_high
    assert torch.equal(
        algo.policy.normaliser.unnormalise_action(batch.action) <= high,
        torch.ones_like(batch.action, dtype=torch.bool),
    )


def test_steps_that_were_not_executed_change_nothing():
    algo = lab.make("policyflow", brownian_coef=0.5, entropy_coef=0.1)
    rows, obs = lab.rows_of(algo, lab.rollout(algo))
    lab.output_layer(algo.policy).bias.data += 0.1
    loss, kl, _ = algo.actor_loss(rows, obs)
    gradient = torch.autograd.grad(loss, [algo.noise.log_std, lab.output_layer(algo.policy).bias])
    for grad in gradient:
        assert (grad.view(4, 2)[:2] != 0).all()
        assert (grad.view(4, 2)[2:] == 0).all()
    hidden = ~rows["mask"][..., None]
    for key in ("noise", "velocity"):
        rows[key] = torch.where(hidden, rows[key] + 7.0, rows[key])
    again, kl_again, _ = algo.actor_loss(rows, obs)
    torch.testing.assert_close((again, kl_again), (loss, kl))


def test_terms_by_hand():
    mask = torch.tensor([[True, False]])
    noise, shift = torch.tensor([[[0.5], [9.0]]]), torch.tensor([[[0.2], [9.0]]])
    log_std, old = torch.tensor([[math.log(0.5)], [0.0]]), torch.tensor([[[math.log(0.4)], [0.0]]])
    # -(0.3 / 0.5)^2 / 2 - log 0.5 + (0.5 / 0.4)^2 / 2 + log 0.4
    expected = -0.18 + 0.78125 + math.log(0.8)
    assert log_ratio(noise, shift, log_std, old, mask).item() == pytest.approx(expected, abs=1e-6)
    # log(0.5 / 0.4) + (0.16 + 0.04) / 0.5 - 1/2
    assert noise_kl(shift, log_std, old, mask).item() == pytest.approx(math.log(1.25) - 0.1, abs=1e-6)
    assert noise_entropy(log_std, mask).item() == pytest.approx(Normal(0.0, 0.5).entropy().item(), abs=1e-6)
    # ((1 - 0.25) 2 - (1 - 0.25 4))^2
    one = lambda value: torch.tensor([[[value], [9.0]]])  # noqa: E731
    found = brownian_loss(one(2.0), one(4.0), one(1.0), torch.tensor([0.25]), mask)
    assert found.item() == pytest.approx(2.25)


def test_the_brownian_term_vanishes_where_velocities_keep_the_start():
    """v = (x_t - t v_old) / (1 - t) at every point: nothing to pull at."""
    x, old, t = torch.randn(5, 4, 2), torch.randn(5, 4, 2), torch.rand(5) * 0.9
    at = t[:, None, None]
    mask = torch.ones(5, 4, dtype=torch.bool)
    assert brownian_loss((x - at * old) / (1 - at), old, x, t, mask) < 1e-10


@pytest.mark.parametrize(
    ("kl", "lr", "expected"),
    [
        (0.021, 3e-4, 2e-4),
        (0.02, 3e-4, 3e-4),
        (0.006, 3e-4, 3e-4),
        (0.004, 3e-4, 4.5e-4),
        (0.0, 3e-4, 3e-4),
        (1.0, 1.2e-5, 1e-5),
        (1e-4, 9e-3, 1e-2),
    ],
)
def test_the_learning_rate_follows_the_kl(kl, lr, expected):
    found = adapted_lr(torch.tensor(lr), torch.tensor(kl), 0.01, 1e-5, 1e-2)
    assert found.item() == pytest.approx(expected)


def test_updates_use_the_adapted_learning_rate():
    """The rate before a step is the one the step is taken with, and a checkpoint holds it."""
    algo = lab.make("policyflow", actor_lr=1e-3, desired_kl=1e-3, batch_size=4)
    rate = algo.actor_optimizer.param_groups[0]["lr"]
    rows, obs = lab.rows_of(algo, lab.rollout(algo))
    rows |= {f"obs/{key}": value for key, value in obs.items()}
    algo.actor_step(rows)
    assert rate.item() == pytest.approx(1e-3)  # equal velocities: no reason to change it
    plain = algo.actor_loss
    for kl, expected in ((1.0, 1e-3 / 1.5), (1.0, 1e-3 / 1.5**2), (1e-4, 1e-3 / 1.5)):
        algo.actor_loss = lambda rows, obs, kl=kl: (plain(rows, obs)[0], torch.tensor(kl), {})
        before = algo._actor_flat.data.clone()
        moments = algo.actor_optimizer.state[algo._actor_flat.param]
        metrics = algo.actor_step(rows)
        assert rate is algo.actor_optimizer.param_groups[0]["lr"]
        assert rate.item() == pytest.approx(expected)
        assert metrics["policy/lr"].item() == pytest.approx(expected)
        count = moments["step"].item()
        mean = moments["exp_avg"] / (1 - 0.9**count)
        spread = (moments["exp_avg_sq"] / (1 - 0.999**count)).sqrt() + 1e-8
        taken = before * (1 - expected * 1e-5) - expected * mean / spread
        torch.testing.assert_close(algo._actor_flat.data, taken, rtol=1e-4, atol=1e-7)
    other = lab.make("policyflow", actor_lr=1e-3, desired_kl=1e-3, seed=5)
    other.load_state_dict(algo.state_dict())
    loaded = other.actor_optimizer.param_groups[0]["lr"]
    assert isinstance(loaded, torch.Tensor)
    assert torch.equal(loaded, rate)


def test_a_constant_learning_rate_stays():
    algo = lab.make("policyflow", actor_lr=1e-3, desired_kl=0.0)
    metrics = algo.update(lab.rollout(algo))
    assert "policy/lr" not in metrics
    assert algo.actor_optimizer.param_groups[0]["lr"] == 1e-3


def test_the_exported_policy_is_the_plain_flow():
    algo = lab.make("policyflow", noise_init=1.0)
    algo.update(lab.rollout(algo))
    policy = algo.export_policy()
    assert isinstance(policy, Flow)
    assert not any("noise" in name for name, _ in policy.named_parameters())
    obs = {"state": torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))}
    exported = policy.act(obs, generator=torch.Generator().manual_seed(1))
    explored = algo.decide(obs, torch.Generator().manual_seed(1))
    torch.testing.assert_close(explored.chain[:, 1], exported.chain[:, -1])
    spread = (explored.chain[:, 2] - explored.chain[:, 1]).std(0)
    torch.testing.assert_close(spread, algo.noise().exp(), rtol=0.05, atol=0.0)


def test_the_noise_stays_within_its_bounds():
    algo = lab.make("policyflow")
    algo.noise.log_std.data.copy_(torch.linspace(-9, 9, 8).view(4, 2))
    assert algo.noise().min() == -5
    assert algo.noise().max() == 2


def test_epochs_move_actions_towards_the_reward():
    """One state, reward -|a - goal|^2 on the first executed step."""
    policy = lab.make_policy(
        lab.POINT, horizon=2, execute=1, steps=4, width=32, solver="midpoint", prediction="velocity"
    )
    algo = lab.make(
        "policyflow", policy, spec=lab.POINT, batch_size=128, epochs=4, noise_init=0.3, actor_lr=1e-3
    )
    goal = torch.tensor([0.8, -0.5])
    obs = {"state": torch.zeros(1000, 1)}

    def error():
        action = policy.act(obs, generator=torch.Generator().manual_seed(5)).chunk[:, 0]
        return (action - goal).square().sum(-1).mean().item()

    before = error()
    for _ in range(25):
        batch = lab.bandit(algo, 512, lambda action: -(action - goal).square().sum(-1))
        algo.update(replace(batch, chunk_mask=torch.tensor([True, False]).expand(1, 512, 2)))
    assert error() < 0.35 * before


@pytest.mark.parametrize("name", ["policyflow", "fpo"])
def test_policies_that_do_not_fit_are_refused(name):
    with pytest.raises(ConfigError, match=rf"algo={name} compares velocities .* policy.variant=shortcut"):
        lab.make(name, policy_options={"variant": "shortcut", "steps": 4})
    policy = lab.make_policy()
    policy.freeze_first(1)
    with pytest.raises(ConfigError, match=rf"algo={name} .* of this policy's 3 the first 1 are frozen"):
        lab.make(name, policy)
    gaussian = Gaussian(GaussianConfig(hidden=[8]), Spec({"state": ((3,), "float32")}, 1, (-1.0,), (1.0,)))
    with pytest.raises(ConfigError, match=rf"algo={name} fine-tunes a flow policy, policy=gaussian is none"):
        lab.make(name, gaussian)


def test_bad_values_are_named():
    for options, message in (
        ({"clip": 0.0}, r"algo.clip=0.0 must be above 0"),
        ({"noise_init": 0.0}, r"algo.noise_init=0.0 must lie in \[0.0067, 7.389\]"),
        ({"brownian_coef": -1.0}, r"algo.brownian_coef=-1.0 must be 0 or more"),
        ({"actor_lr": 1e-6}, r"algo.actor_lr=1e-06 must lie in \[1e-05, 0.01\]"),
        ({"lr_decay_updates": 5}, r"algo.lr_decay_updates=5 and algo.desired_kl=0.01 .* Fix: one of them 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            PolicyFlowConfig(**options)


def test_several_goals_are_kept():
    """From scratch on six equally good goals, shortened: the benchmark `multigoal` has the full form."""
    config = MultiGoalConfig()
    sizes = {"horizon": 1, "execute": 1, "steps": 4, "width": 32, "solver": "midpoint"}
    policy = lab.make_policy(lab.POINT, prediction="velocity", **sizes)
    options = {"noise_init": 1.0, "entropy_coef": 0.001, "brownian_coef": 0.05, "actor_lr": 1e-3}
    algo = lab.make("policyflow", policy, batch_size=256, epochs=5, **options)

    def reward(action):
        nearest = torch.from_numpy(distances(config, action.numpy()).min(1))
        return torch.exp(-0.5 * (nearest / config.width).square()).float()

    before = reward(algo.decide({"state": torch.zeros(2000, 1)}, algo.generator).chunk[:, 0]).mean()
    for _ in range(70):
        algo.update(lab.bandit(algo, 1024, reward))
    action = policy.act({"state": torch.zeros(2000, 1)}, generator=torch.Generator().manual_seed(0)).chunk[
        :, 0
    ]
    away = torch.from_numpy(distances(config, action.numpy()))
    held = torch.nn.functional.one_hot(away.argmin(1), config.goals) * (away.min(1).values < 0.9)[:, None]
    assert before < 0.25
    assert reward(action).mean() >= 0.6
    assert (held.double().mean(0) > 0.03).sum() >= 3
