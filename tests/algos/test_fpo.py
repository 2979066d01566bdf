# SPDX-License-Identifier: Apache-2.0
"""FPO: losses by hand and by each prediction, stored pairs, ratios that follow densities, executed steps."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robopost.algos.generative.fpo import FPOConfig, log_ratios, loss_scale, matching_loss
from robopost.errors import ConfigError
from robopost.policies.flow import Flow

spec = importlib.util.spec_from_file_location("plain_flow_lab", Path(__file__).with_name("plain_flow_lab.py"))
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
KINDS = [("velocity", "own"), ("velocity", "epsilon"), ("sample", "velocity"), ("sample", "own")]


def ratios(algo, rows, obs):
    """Ratio (B,) of every decision under the policy now."""
    end, noise, t = rows["end"], rows["noise"], rows["t"]
    at = t[..., None, None]
    velocity = algo.policy.velocities(
        (1 - at) * noise + at * end[:, None], t, algo.policy.encoder(obs)
    ).detach()
    new = matching_loss(velocity, noise, end, t, rows["mask"], algo.space)
    return log_ratios(rows["loss"], new, rows["scale"], 3.0, True).exp()[:, 0]


@pytest.mark.parametrize(("prediction", "loss"), KINDS)
def test_equal_parameters_have_ratio_one(prediction, loss):
    algo = lab.make("fpo", policy_options={"prediction": prediction}, loss=loss)
    rows, obs = lab.rows_of(algo, lab.rollout(algo))
    assert (ratios(algo, rows, obs) - 1).abs().max() < 1e-5
    _, kl, metrics = algo.actor_loss(rows, obs)
    assert kl.abs() < 1e-6
    assert metrics["policy/clip_fraction"] == 0


@pytest.mark.parametrize(("prediction", "loss"), KINDS)
def test_raising_the_density_of_an_action_raises_its_ratio(prediction, loss):
    """One supervised step on one action, with noise and times of its own: rho > 1 in at least 95 % of 100 cases."""
    risen = 0
    for case in range(100):
        policy = lab.make_policy(seed=case, prediction=prediction)
        algo = lab.make("fpo", policy, seed=case, loss=loss)
        batch = lab.rollout(algo, decisions=2, envs=2, seed=case, short=False)
        rows, obs = lab.rows_of(algo, batch)
        one = {"state": obs["state"][:1].expand(64, -1)}
        chunk = rows["end"][:1].expand(64, -1, -1)
        g = torch.Generator().manual_seed(1000 + case)
        mask = torch.ones(64, 4, dtype=torch.bool)
        step = torch.autograd.grad(policy.bc_loss(one, chunk, mask, g), algo._actor_flat.params)
        for parameter, gradient in zip(algo._actor_flat.params, step, strict=True):
            parameter.data -= 0.02 * gradient
        risen += int(ratios(algo, rows, obs)[0] > 1)
    assert risen >= 95


def test_pairs_are_stored_and_used_again():
    algo = lab.make("fpo", pairs=5)
    rows, obs = lab.rows_of(algo, lab.rollout(algo))
    assert rows["noise"].shape == (12, 5, 4, 2)
    assert rows["t"].shape == rows["loss"].shape == (12, 5)
    assert len(set(rows["t"].flatten().tolist())) == 3  # 0, 1/3, 2/3: the solver's points
    state = algo.generator.get_state()
    first = algo.actor_loss(rows, obs)[0]
    assert torch.equal(algo.actor_loss(rows, obs)[0], first)
    assert torch.equal(algo.generator.get_state(), state)  # nothing is drawn in the loss
    assert rows["noise"].std().item() == pytest.approx(1.0, abs=0.15)


def test_losses_by_hand():
    """x_0 = 1, x_1 = 3 at t = 1/2; velocity 5 instead of 2: errors 3, of the noise 1.5, of the chunk 1.5."""
    one = lambda value: torch.full((1, 1, 2, 1), value)  # noqa: E731
    end, t = torch.full((1, 2, 1), 3.0), torch.full((1, 1), 0.5)
    mask = torch.tensor([[True, False]])
    velocity = torch.tensor([[[[5.0], [100.0]]]])
    for loss, expected in (("velocity", 9.0), ("epsilon", 2.25), ("sample", 2.25)):
        assert matching_loss(velocity, one(1.0), end, t, mask, loss).item() == pytest.approx(expected)
    t = torch.full((1, 1), 0.25)
    for loss, expected in (("velocity", 9.0), ("epsilon", 9 / 16), ("sample", 81 / 16)):
        assert matching_loss(velocity, one(1.0), end, t, mask, loss).item() == pytest.approx(expected)


def test_the_weighted_losses_are_errors_of_noise_and_chunk():
    """What the velocity says about x_0 and x_1, against the true ones."""
    policy = lab.make_policy(prediction="velocity")
    g = torch.Generator().manual_seed(0)
    noise, end = torch.randn(6, 3, 4, 2, generator=g), torch.randn(6, 4, 2, generator=g)
    t, mask = torch.rand(6, 3, generator=g), torch.ones(6, 4, dtype=torch.bool)
    at = t[..., None, None]
    x = (1 - at) * noise + at * end[:, None]
    velocity = policy.velocities(x, t, policy.encoder({"state": torch.randn(6, 3, generator=g)})).detach()
    errors = {"epsilon": x - at * velocity - noise, "sample": x + (1 - at) * velocity - end[:, None]}
    for name, error in errors.items():
        found = matching_loss(velocity, noise, end, t, mask, name)
        torch.testing.assert_close(found, error.square().mean((2, 3)), rtol=1e-4, atol=1e-6)


def test_the_default_loss_is_the_policys_own():
    """prediction=sample: the plain error of what the network gives, as in cloning."""
    policy = lab.make_policy(prediction="sample")
    algo = lab.make("fpo", policy)
    rows, obs = lab.rows_of(algo, lab.rollout(algo, short=False))
    cond = policy.encoder(obs)
    for pair in range(algo.config.pairs):
        t = rows["t"][:, pair]
        at = t[:, None, None]
        x = (1 - at) * rows["noise"][:, pair] + at * rows["end"]
        error = (policy.output(x, t, cond) - rows["end"])[:, :2].square().mean((1, 2))
        torch.testing.assert_close(rows["loss"][:, pair], error, rtol=1e-4, atol=1e-5)


def test_the_ratio_is_clamped_pair_by_pair():
    old, new = torch.tensor([[5.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    scale = torch.tensor([[1.0]])
    assert log_ratios(old, new, scale, 3.0, average=True).tolist() == [[1.0]]
    assert log_ratios(old, new, scale, 3.0, average=False).tolist() == [[3.0, -1.0]]
    assert log_ratios(old, new, 2 * scale, 3.0, average=False).tolist() == [[3.0, -2.0]]


def test_normalised_losses_are_nats_of_a_gaussian():
    """Mean loss 0.5 of two rows, 2 actions: 2 steps 4 / (2 0.5), 1 step 2 / (2 0.5); rows without steps don't count."""
    loss = torch.tensor([[0.2, 0.4], [0.6, 0.8], [50.0, 50.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    torch.testing.assert_close(loss_scale(loss, mask, 2), torch.tensor([[4.0], [2.0], [0.0]]))
    # A policy that is N(mean, 0.3^2): the loss of an action under a moved mean, in nats.
    g = torch.Generator().manual_seed(0)
    action = 0.3 * torch.randn(200_000, 1, 1, generator=g, dtype=torch.float64)
    mask = torch.ones(len(action), 1, dtype=torch.bool)
    old, new = action[:, 0].square(), (action[:, 0] - 0.05).square()
    found = log_ratios(old, new, loss_scale(old, mask, 1), 99.0, average=True)[:, 0]
    normal = torch.distributions.Normal
    exact = normal(0.05, 0.3).log_prob(action) - normal(0.0, 0.3).log_prob(action)
    torch.testing.assert_close(found, exact[:, 0, 0], rtol=1e-2, atol=1e-4)


def test_the_references_losses_count_as_they_are():
    algo = lab.make("fpo", normalise_loss=False)
    rows, _ = lab.rows_of(algo, lab.rollout(algo))
    assert torch.equal(rows["scale"], torch.ones(12, 1))


def test_loss_by_hand_with_one_ratio_per_decision_and_per_pair():
    for average in (True, False):
        algo = lab.make("fpo", average_losses=average, clip=0.02, normalise_loss=False)
        rows, obs = lab.rows_of(algo, lab.rollout(algo))
        rows["loss"] = rows["loss"] + torch.linspace(-0.1, 0.2, rows["loss"].numel()).view_as(rows["loss"])
        shift = torch.linspace(-0.1, 0.2, rows["loss"].numel()).view_as(rows["loss"])
        ratio = shift.mean(1, keepdim=True).exp() if average else shift.exp()
        advantage = rows["advantage"][:, None]
        expected = -torch.minimum(ratio * advantage, ratio.clamp(0.98, 1.02) * advantage).mean()
        torch.testing.assert_close(algo.actor_loss(rows, obs)[0], expected, rtol=1e-4, atol=1e-5)


def test_steps_that_were_not_executed_change_nothing():
    algo = lab.make("fpo")
    rows, obs = lab.rows_of(algo, lab.rollout(algo))
    lab.output_layer(algo.policy).bias.data += 0.05
    loss = algo.actor_loss(rows, obs)[0]
    (gradient,) = torch.autograd.grad(loss, [lab.output_layer(algo.policy).bias])
    assert (gradient.view(4, 2)[:2] != 0).all()
    assert (gradient.view(4, 2)[2:] == 0).all()


def test_exploration_is_the_flow_itself():
    algo = lab.make("fpo")
    obs = {"state": torch.randn(5, 3)}
    action = algo.decide(obs, torch.Generator().manual_seed(1))
    sampled = algo.policy.act(obs, generator=torch.Generator().manual_seed(1))
    assert torch.equal(action.chunk, sampled.chunk)
    assert torch.equal(action.chain, sampled.chain[:, -1:])
    assert isinstance(algo.export_policy(), Flow)


def test_blocks_give_what_one_batch_gives(monkeypatch):
    algo = lab.make("fpo", pairs=4)
    flat = lab.rollout(algo).map(lambda tensor: tensor.flatten(0, 1))
    state = algo.generator.get_state()
    whole = algo.remember(flat)["loss"]
    monkeypatch.setattr("robopost.algos.generative.plain_flow.POINTS", 20)
    algo.generator.set_state(state)
    torch.testing.assert_close(algo.remember(flat)["loss"], whole, rtol=1e-4, atol=1e-5)


def test_epochs_move_actions_towards_the_reward():
    """One state, reward -|a - goal|^2; the second step of the chunk is never executed."""
    policy = lab.make_policy(lab.POINT, horizon=2, execute=1, steps=4, width=32, prediction="velocity")
    algo = lab.make("fpo", policy, batch_size=128, epochs=4, actor_lr=1e-3)
    goal = torch.tensor([0.8, -0.5])
    obs = {"state": torch.zeros(1000, 1)}

    def error():
        action = policy.act(obs, generator=torch.Generator().manual_seed(5)).chunk[:, 0]
        return (action - goal).square().sum(-1).mean().item()

    before = error()
    for _ in range(25):
        batch = lab.bandit(algo, 512, lambda action: -(action - goal).square().sum(-1))
        algo.update(replace(batch, chunk_mask=torch.tensor([True, False]).expand(1, 512, 2)))
    assert error() < 0.5 * before


def test_bad_values_are_named():
    for options, message in (
        ({"loss": "noise"}, r"algo.loss"),
        ({"pairs": 0}, r"algo.pairs=0 must be at least 1"),
        ({"clip": 0.0}, r"algo.clip=0.0 must be above 0"),
        ({"difference_bound": -1.0}, r"algo.difference_bound=-1.0 must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            FPOConfig(**options)
