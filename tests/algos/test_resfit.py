# SPDX-License-Identifier: Apache-2.0
"""ResFiT: acceptance checks 1, 2, 4 and 5, losses by hand, a plain loop, warm-ups, images, refusals."""

import copy
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robopost.algos.online.resfit import (
    ResFiTConfig,
    abs_mean_squared,
    actor_loss,
    mse_per_head,
    residual_target,
)
from robopost.data.batch import Spec
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.data.mixture import MixedSampler
from robopost.errors import ConfigError, DataError
from robopost.policies.chunked import StepPolicy
from robopost.policies.deterministic import Deterministic, DeterministicConfig
from robopost.policies.residual import BASE_ACTION

found = importlib.util.spec_from_file_location("resfit_lab", Path(__file__).parent / "resfit_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)


@pytest.fixture
def base(tmp_path):
    return lab.save_base(tmp_path / "base")


@pytest.fixture
def policy(base):
    return lab.residual(base)


# -- check 1: zero start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bounds", "minmax"])
@pytest.mark.parametrize("scale", [0.05, 0.3, 2.0])
def test_executed_action_is_the_base_action_to_the_bit(tmp_path, mode, scale):
    spec = Spec({"state": ((3,), "float32")}, 2, (-0.7, -512.0), (1.3, 512.0), 50)
    base = lab.save_base(tmp_path / "base", spec)
    policy = lab.residual(base, spec, scale=scale)
    inner = policy.base
    action = {"mean": [0, 0], "std": [1, 1], "min": [-0.61, -391.7], "max": [1.1, 402.3], "count": 9}
    inner.normaliser.fit({"action": action}, obs="identity", action=mode)
    policy._copy_normaliser(inner)
    obs = {"state": 3 * torch.randn(1000, 3)}
    expected = StepPolicy(inner, 1000).act(obs, deterministic=True)
    assert torch.equal(policy.act(obs).chunk[:, 0], expected)
    # A base action that is given, at and beyond the bounds, is clipped and nothing else.
    given = torch.cat([expected * 1.7, expected])
    acted = policy.act({"state": obs["state"].repeat(2, 1), BASE_ACTION: given}).chunk[:, 0]
    assert torch.equal(acted, given.clamp(torch.tensor(spec.action_low), torch.tensor(spec.action_high)))


def test_sample_and_act_agree(policy):
    lab.randomise(policy, std=0.5)
    obs = {"state": torch.randn(300, 3), BASE_ACTION: torch.randn(300, 2)}
    sampled = policy.sample(policy.normaliser.obs(obs))[0]
    acted = policy.act(obs).chunk
    assert torch.allclose(policy.normaliser.unnormalise_action(sampled), acted, atol=1e-6)


# -- check 2: bounds -----------------------------------------------------------------------------------------------


def test_corrections_are_bounded_and_so_is_exploration(policy):
    lab.randomise(policy)
    algo = lab.make(policy, exploration_noise=0.5)
    raw = (torch.rand(2000, 2) * 2 - 1) * torch.tensor([1.0, 2.0])
    obs = {"state": 5 * torch.randn(2000, 3), BASE_ACTION: raw}
    change = (policy.act(obs).chunk[:, 0] - raw) / policy.normaliser.action_scale
    assert 0.29 < change.abs().max() <= 0.3 + 1e-6
    noisy = algo.explore(obs, torch.Generator().manual_seed(0))
    change = (noisy - raw) / policy.normaliser.action_scale
    assert 0.55 < change.abs().max() <= 0.3 + 0.3 + 1e-6
    assert (noisy.abs() <= torch.tensor([1.0, 2.0])).all()


def test_exploration_has_its_std_and_its_seed(policy):
    algo = lab.make(policy, exploration_noise=0.05)
    obs = {"state": torch.randn(4000, 3), BASE_ACTION: torch.zeros(4000, 2)}
    draw = lambda seed: algo.explore(obs, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert (draw(0) / policy.normaliser.action_scale).std() == pytest.approx(0.05, rel=0.05)


# -- check 4: n-step targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminated", [True, False])
def test_n_step_target_ends_with_the_episode_and_bootstraps_a_time_limit(terminated):
    spec, gamma = Spec({"state": ((1,), "float32")}, 1, (-1.0,), (1.0,), 3), 0.9
    buffer = ReplayBuffer(spec, 100)
    for t, reward in enumerate((0.0, 0.0, 1.0)):
        last = t == 2
        now, after = {"state": np.full((1, 1), t, np.float32)}, {"state": np.full((1, 1), t + 1, np.float32)}
        ends = (np.array([last and terminated]), np.array([last and not terminated]))
        buffer.add(now, np.zeros((1, 1), np.float32), np.array([reward], np.float32), after, *ends)
    batch = buffer.transitions_at(torch.arange(3), n_step=3, gamma=gamma)
    next_q = torch.stack([torch.full((3,), 5.0), torch.full((3,), 7.0), torch.full((3,), 2.0)])
    target = residual_target(batch.reward, batch.discount, next_q[:2], [])
    powers = torch.tensor([gamma**3, gamma**2, gamma**1])  # the true number of steps to the end
    expected = torch.tensor([gamma**2, gamma, 1.0]) + (0.0 if terminated else powers * 5.0)
    assert torch.allclose(target, expected)
    assert torch.equal(batch.next_obs["state"], torch.full((3, 1), 3.0))
    clamped = residual_target(batch.reward, batch.discount, next_q, [0.0, 1.0])
    assert torch.allclose(
        clamped, (torch.tensor([gamma**2, gamma, 1.0]) + (not terminated) * powers * 2).clamp(0, 1)
    )


# -- check 5: half and half ----------------------------------------------------------------------------------------


def demos(policy, episodes=3, length=8):
    """Labelled demonstrations whose reward is 7, and an empty buffer."""
    rng = np.random.default_rng(0)
    made = [
        Episode(
            {"state": rng.normal(size=(length + 1, 3)).astype(np.float32)},
            rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            np.full(length, 7.0),
            False,
            True,
        )
        for _ in range(episodes)
    ]
    dataset = policy.label_demos(Dataset.from_episodes(made, lab.SPEC))
    return dataset, ReplayBuffer(policy.spec, 100)


def test_batches_are_exactly_half_demonstrations(policy):
    dataset, buffer = demos(policy)
    sampler = MixedSampler(buffer, dataset, ResFiTConfig().demo_fraction)
    g = torch.Generator().manual_seed(0)
    with pytest.raises(DataError, match="the replay buffer is empty"):
        sampler.sample(256, g)
    obs = {"state": np.zeros((1, 3), np.float32), BASE_ACTION: np.zeros((1, 2), np.float32)}
    no = np.zeros(1, bool)
    buffer.add(obs, np.zeros((1, 2), np.float32), np.zeros(1, np.float32), obs, no, no)
    for _ in range(5):
        reward = sampler.sample(256, g).reward
        assert int((reward == 7).sum()) == 128
        assert int((reward == 0).sum()) == 128
    only = MixedSampler(ReplayBuffer(policy.spec, 100), dataset, 1.0)  # the explicit option
    assert int((only.sample(256, g).reward == 7).sum()) == 256


# -- losses --------------------------------------------------------------------------------------------------------


def test_reductions_by_hand():
    q = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    y = torch.tensor([2.0, 1.0])
    # Errors -1, 1 of heads 0 and 1, -3 in the batch's second sample.
    assert mse_per_head(q, y) == pytest.approx((1 + 1 + 1 + 9) / 4)
    assert abs_mean_squared(q, y) == pytest.approx((1.0**2 + 2.0**2) / 2)


def test_reference_reduction_gives_all_heads_of_a_sample_one_gradient_size():
    q = torch.tensor([[1.0], [3.5]], requires_grad=True)
    y = torch.zeros(1)
    (shared,) = torch.autograd.grad(abs_mean_squared(q, y), [q])
    assert torch.allclose(shared, torch.full((2, 1), 2 * 2.25 / 2))
    (own,) = torch.autograd.grad(mse_per_head(q, y), [q])
    assert torch.allclose(own, torch.tensor([[1.0], [3.5]]))


def test_actor_loss_is_over_all_heads_with_a_penalty():
    q = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    change = torch.tensor([[0.1, 0.2], [0.0, 0.3]])
    assert actor_loss(q, change, 0.0) == pytest.approx(-2.5)
    assert actor_loss(q, change, 2.0) == pytest.approx(-2.5 + 2 * (0.05 + 0.09) / 2)


@pytest.mark.parametrize("reduction", ["mse_per_head", "abs_mean_squared"])
def test_twelve_updates_agree_with_a_plain_loop(policy, reduction):
    """Separate networks per head, AdamW and clipping of torch, one operation per line: parameters to 1e-5."""
    options = {"critic_lr": 1e-2, "actor_lr": 1e-2, "weight_decay": 0.01, "max_grad_norm": 0.5, "tau": 0.1}
    algo = lab.make(
        policy,
        num_critics=3,
        critic_reduction=reduction,
        residual_penalty=0.1,
        target_noise=0.1,
        target_noise_clip=0.15,
        policy_delay=2,
        critic_warmup=4,
        critic_layernorm=False,
        **options,
    )
    lab.randomise(policy, std=0.3)
    algo.actor_target.load_state_dict(policy.net.state_dict())
    actor, heads = lab.plain(policy.net), [lab.plain(algo.critic.net, k) for k in range(3)]
    actor_t, heads_t = copy.deepcopy(actor), copy.deepcopy(heads)
    opt = lambda nets, lr: torch.optim.AdamW([p for n in nets for p in n.parameters()], lr, weight_decay=0.01)  # noqa: E731
    actor_opt, critic_opt = opt([actor], 1e-2), opt(heads, 1e-2)
    g = torch.Generator().set_state(algo.generator.get_state())
    correct = lambda net, s, b: 0.3 * torch.tanh(net(torch.cat([s, b], 1)))  # noqa: E731
    for step in range(1, 13):
        batch = lab.make_batch(policy.spec, seed=step)
        metrics = algo.update(batch)
        noise = (0.1 * torch.randn(batch.action.shape, generator=g)).clamp(-0.15, 0.15)
        subset = torch.randperm(3, generator=g)[:2]
        s, b = batch.obs["state"], batch.obs[BASE_ACTION]
        s2, b2 = batch.next_obs["state"], batch.next_obs[BASE_ACTION]
        with torch.no_grad():
            a2 = (b2 + correct(actor_t, s2, b2) + noise).clamp(-1, 1)
            q2 = torch.stack([net(torch.cat([s2, b2, a2], 1)).squeeze(1) for net in heads_t])
            y = batch.reward + batch.discount * q2[subset].min(0).values
        errors = torch.stack([net(torch.cat([s, b, batch.action], 1)).squeeze(1) - y for net in heads])
        if reduction == "mse_per_head":
            loss = sum(nn.functional.mse_loss(e, torch.zeros_like(e)) for e in errors) / 3
        else:
            loss = (errors.abs().mean(0) ** 2).mean()
        assert metrics["loss/critic"].item() == pytest.approx(loss.item(), abs=1e-5)
        lab.step_plain(critic_opt, loss, 0.5)
        for old, new in zip(heads_t, heads, strict=True):
            lab.blend(old, new, 0.1)
        if step > 4 and step % 2 == 0:
            change = correct(actor, s, b)
            inputs = torch.cat([s, b, (b + change).clamp(-1, 1)], 1)
            loss = -torch.stack([net(inputs) for net in heads]).mean() + 0.1 * (change**2).sum(1).mean()
            assert metrics["loss/actor"].item() == pytest.approx(loss.item(), abs=1e-5)
            lab.step_plain(actor_opt, loss, 0.5)
            lab.blend(actor_t, actor, 0.1)
        else:
            assert "loss/actor" not in metrics
    lab.same(policy.net, actor)
    lab.same(algo.actor_target, actor_t)
    for k in range(3):
        lab.same(algo.critic.net, heads[k], k)
        lab.same(algo.critic_target.net, heads_t[k], k)


# -- schedule and state --------------------------------------------------------------------------------------------


def test_the_actor_waits_for_the_critics(policy):
    algo = lab.make(policy, critic_warmup=6, policy_delay=4, actor_lr=1e-2)
    before = copy.deepcopy(policy.net.state_dict())
    for step in range(1, 9):
        metrics = algo.update(lab.make_batch(policy.spec, seed=step))
        assert ("loss/actor" in metrics) == (step == 8)
        moved = any(not torch.equal(value, before[key]) for key, value in policy.net.state_dict().items())
        assert moved == (step == 8)
    assert algo.needs.demo_fraction == 0.5
    assert algo.needs.updates_per_step == 4.0
    assert algo.needs.n_step == 3
    assert algo.needs.first_updates == 6


def test_the_frozen_policy_stays_as_it_is(policy):
    base = copy.deepcopy(policy.base.state_dict())
    algo = lab.make(policy, policy_delay=1, actor_lr=1e-2)
    for step in range(3):
        algo.update(lab.make_batch(policy.spec, seed=step))
    assert all(torch.equal(value, base[key]) for key, value in policy.base.state_dict().items())


@pytest.mark.parametrize("spec", [lab.SPEC, lab.PIXELS], ids=["state", "images"])
def test_saved_and_loaded_goes_on_bitwise(tmp_path, spec):
    base = lab.save_base(tmp_path / "base", spec, image_features=4)
    options = {"image_features": 4, "image_shift": 2}
    first, second = (
        lab.make(lab.residual(base, spec, **options), seed, policy_delay=2, actor_lr=1e-3) for seed in (0, 5)
    )
    for step in range(3):
        first.update(lab.make_batch(first.policy.spec, 8, step))
    state, stream = copy.deepcopy(first.state_dict()), first.generator.get_state()
    second.load_state_dict(state)
    second.generator.set_state(stream)
    for step in range(3, 6):
        batch = lab.make_batch(first.policy.spec, 8, step)
        a, b = first.update(batch), second.update(batch)
        assert all(torch.equal(a[key], b[key]) for key in a)
    one, two = first.state_dict()["tensors"], second.state_dict()["tensors"]
    assert all(torch.equal(one[key], two[key]) for key in one)


# -- images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seeing(tmp_path):
    base = lab.save_base(tmp_path / "base", lab.PIXELS, image_features=4)
    policy = lab.residual(base, lab.PIXELS, image_features=4, image_shift=2)
    return lab.make(policy, policy_delay=1, actor_lr=1e-2, critic_lr=1e-2)


def test_the_critics_alone_train_the_encoder(seeing):
    policy, batch = seeing.policy, lab.make_batch(seeing.policy.spec, 8)
    lab.randomise(policy, std=0.3)
    before = copy.deepcopy(policy.encoder.state_dict())
    seeing.actor_step(batch)
    assert all(torch.equal(value, before[key]) for key, value in policy.encoder.state_dict().items())
    seeing.critic_step(batch, None, None)
    assert all(not torch.equal(value, before[key]) for key, value in policy.encoder.named_parameters())


def test_encoder_gradient_is_that_of_the_critic_loss(seeing):
    policy = seeing.policy
    policy.encoder.shift = 0
    batch = lab.make_batch(seeing.policy.spec, 8)
    params = list(policy.encoder.parameters())
    after, here = policy.encode(batch.next_obs), policy.encode(batch.obs)
    with torch.no_grad():
        action = (after[BASE_ACTION] + policy.correction(after, seeing.actor_target)).clamp(-1, 1)
        target = batch.reward + batch.discount * seeing.critic_target(after, action).min(0).values
    loss = (seeing.critic(here, batch.action) - target).square().mean()
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])
    seeing.config.max_grad_norm = math.inf
    seeing.critic_step(batch, None, None)
    assert torch.allclose(seeing._encoder_flat.grad, expected, atol=1e-6)


def test_images_are_shifted_in_training_and_not_in_acting(seeing):
    batch = lab.make_batch(seeing.policy.spec, 8)
    stream = seeing.generator.get_state()
    seeing.critic_step(batch, None, None)
    assert not torch.equal(seeing.generator.get_state(), stream)
    assert torch.equal(seeing.policy.act(batch.obs).chunk, seeing.policy.act(batch.obs).chunk)


def test_states_alone_need_no_encoder(policy):
    algo = lab.make(policy)
    assert algo._encoder_flat is None
    stream = algo.generator.get_state()
    algo.critic_step(lab.make_batch(policy.spec), None, None)
    assert torch.equal(algo.generator.get_state(), stream)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_only_residual_policies():
    other = Deterministic(DeterministicConfig(hidden=[8]), lab.SPEC)
    with pytest.raises(ConfigError, match=r"algo=resfit corrects a frozen policy.*policy=residual"):
        lab.make(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_reduction": "mse"}, "algo.critic_reduction"),
        ({"target_range": [1.0]}, r"algo.target_range=\[1.0\] must be \[low, high\]"),
        ({"target_range": [1.0, 0.0]}, "low < high"),
        ({"max_grad_norm": 0.0}, "algo.max_grad_norm=0.0 must be above 0"),
        ({"critic_warmup": -1}, "algo.critic_warmup=-1 must be 0 or more"),
        ({"exploration_clip": -0.1}, "algo.exploration_clip=-0.1 must be 0 or more"),
        ({"target_subset": 11}, r"algo.target_subset=11 must lie in 0..10"),
    ],
)
def test_config_refuses_what_can_not_work(options, message):
    with pytest.raises(ConfigError, match=message):
        ResFiTConfig(**options)
