# SPDX-License-Identifier: Apache-2.0
"""PPO: GAE with both endings by hand, the first ratio, KL stop, agreement with a plain loop."""

import copy
from dataclasses import replace

import pytest
import torch

from robopost.algos.online.ppo import PPOConfig, approximate_kl, clipped_loss, gae, normalise
from robopost.errors import ConfigError, DataError


def test_gae_by_hand_with_both_endings():
    """Four steps: the second terminates, the third is cut by the time limit, the fourth goes on."""
    reward = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    value = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    next_value = torch.tensor([[20.0], [99.0], [31.0], [50.0]])
    terminated = torch.tensor([[False], [True], [False], [False]])
    truncated = torch.tensor([[False], [False], [True], [False]])
    discount = torch.where(terminated, 0.0, 0.5)
    advantage, returns = gae(reward, discount, terminated | truncated, value, next_value, 0.5 * 0.8)
    last = 4 + 0.5 * 50 - 40
    cut = 3 + 0.5 * 31 - 30  # bootstrapped with the true final observation, nothing from the next episode
    died = 2 - 20.0
    first = 1 + 0.5 * 20 - 10 + 0.4 * died
    assert torch.allclose(advantage[:, 0], torch.tensor([first, died, cut, last]))
    assert torch.allclose(returns, advantage + value)


def test_gae_keeps_environments_apart():
    reward = torch.randn(6, 3)
    value, next_value = torch.randn(6, 3), torch.randn(6, 3)
    done = torch.rand(6, 3) < 0.4
    discount = torch.full((6, 3), 0.9)
    together, _ = gae(reward, discount, done, value, next_value, 0.8)
    for n in range(3):
        pick = lambda x, n=n: x[:, n : n + 1]  # noqa: E731
        alone, _ = gae(*map(pick, (reward, discount, done, value, next_value)), 0.8)
        assert torch.equal(alone[:, 0], together[:, n])


def test_clipped_loss_and_kl_by_hand():
    ratio, advantage = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert clipped_loss(ratio, advantage, 0.2) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    log_ratio = torch.tensor([0.1, -0.1])
    assert approximate_kl(log_ratio) == pytest.approx((0.0051709 + 0.0048374) / 2, rel=1e-3)
    scaled = normalise(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(scaled, torch.tensor([-1.0, 0.0, 1.0]), atol=1e-6)


def test_first_minibatch_has_ratio_one(lab):
    algo = lab.make("ppo", epochs=1, batch_size=16)
    metrics = algo.update(lab.make_rollout(algo))
    assert metrics["policy/kl"].abs() < 1e-6
    assert metrics["policy/clip_fraction"] == 0
    # Normalised advantages at ratio 1: the surrogate is their mean, zero.
    assert metrics["loss/actor"].abs() < 1e-6


def test_two_epochs_agree_with_a_plain_loop(lab):
    algo = lab.make("ppo", entropy_coef=0.01, max_grad_norm=0.3)
    batch = lab.make_rollout(algo)
    policy, value = copy.deepcopy(algo.policy), copy.deepcopy(algo.value)
    g = torch.Generator().set_state(algo.generator.get_state())
    algo.update(batch)
    params = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.Adam(params, lr=3e-4, eps=1e-5)
    with torch.no_grad():
        v, v2 = value(batch.obs), value(batch.next_obs)
    advantage, running = torch.zeros(8, 2), torch.zeros(2)
    for t in reversed(range(8)):
        delta = batch.reward[t] + batch.discount[t] * v2[t] - v[t]
        running = delta + 0.99 * 0.95 * (~(batch.terminated | batch.truncated)[t]).float() * running
        advantage[t] = running
    flat = lambda x: x.reshape(16, *x.shape[2:])  # noqa: E731
    obs, chain, old = flat(batch.obs["state"]), flat(batch.chain), flat(batch.log_prob)
    adv_all, ret_all = flat(advantage), flat(advantage + v)
    for _ in range(2):
        order = torch.randperm(16, generator=g)
        for rows in order.split(8):
            mean, log_std = policy.distribution({"state": obs[rows]})
            dist = torch.distributions.Normal(mean, log_std.exp())
            log_prob = dist.log_prob(chain[rows][:, 0]).sum((1, 2))
            ratio = (log_prob - old[rows]).exp()
            adv = adv_all[rows]
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
            loss = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
            loss = loss + 0.5 * (value({"state": obs[rows]}) - ret_all[rows]).square().mean()
            loss = loss - 0.01 * dist.entropy().sum((1, 2)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 0.3)
            optimizer.step()
    for ours, theirs in zip([*algo.policy.parameters(), *algo.value.parameters()], params, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_kl_stop_changes_nothing_more_on_any_device(lab, monkeypatch):
    """The masked form, which needs no host sync, ends where the early break ends."""
    options = {"target_kl": 1e-4, "lr": 0.05, "epochs": 6}
    states = []
    for device in ("cpu", "meta"):  # a device name other than cpu takes the masked path
        algo = lab.make("ppo", **options)
        batch = lab.make_rollout(algo)
        monkeypatch.setattr(algo, "device", type("D", (), {"type": device})())
        monkeypatch.setattr(
            torch, "randperm", lambda n, generator, device, real=torch.randperm: real(n, generator=generator)
        )
        steps = 0
        real = algo.minibatch_step

        def counted(rows, real=real):
            nonlocal steps
            steps += 1
            return real(rows)

        algo.minibatch_step = counted
        algo.update(batch)
        assert not algo._keep
        states.append((steps, algo.state_dict()["tensors"]))
        monkeypatch.undo()
    (early, stopped), (full, masked) = states
    assert early < full == 12
    assert all(torch.equal(stopped[key], masked[key]) for key in stopped)
    free = lab.make("ppo", **(options | {"target_kl": 0.0}))
    free.update(lab.make_rollout(free))
    assert any(not torch.equal(free.state_dict()["tensors"][key], stopped[key]) for key in stopped)


def test_learning_rate_decays_linearly(lab):
    algo = lab.make("ppo", lr_decay_updates=4)
    batch, rates = lab.make_rollout(algo), []
    for _ in range(6):
        algo.update(batch)
        rates.append(algo.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([3e-4, 2.25e-4, 1.5e-4, 0.75e-4, 0.0, 0.0])


def test_policy_improves_on_a_bandit(lab):
    """Reward is the first action dimension: its mean has to rise."""
    algo = lab.make("ppo", rollout_steps=64, batch_size=64, epochs=4, lr=1e-2)
    means = []
    for seed in range(15):
        batch = lab.make_rollout(algo, steps=64, seed=seed)
        done = torch.ones_like(batch.terminated)
        batch = replace(
            batch, reward=batch.action[..., 0], terminated=done, discount=torch.zeros_like(batch.reward)
        )
        algo.update(batch)
        means.append(batch.action[..., 0].mean().item())
    assert means[-1] > means[0] + 0.4


def test_rollouts_and_policies_that_do_not_fit_are_refused(lab):
    algo = lab.make("ppo")
    with pytest.raises(DataError, match=r"chain and log_prob"):
        algo.update(replace(lab.make_rollout(algo), chain=None))
    big = lab.make("ppo", batch_size=64)
    rollout = lab.make_rollout(big)
    with pytest.raises(ConfigError, match=r"algo.batch_size=64 is larger than a rollout of 16 samples"):
        big.update(rollout)
    with pytest.raises(ConfigError, match=r"policy=deterministic has none"):
        lab.make("ppo", policy=lab.make_policy("deterministic"))
    with pytest.raises(ConfigError, match=r"algo.gae_lambda=1.2 must lie in \[0, 1\]"):
        PPOConfig(gae_lambda=1.2)
    with pytest.raises(ConfigError, match=r"normalise_advantage=false"):
        PPOConfig(batch_size=1)


@pytest.mark.parametrize("mean_tanh", [False, True])
@pytest.mark.parametrize("log_std", [0.3, 2.5])  # the second above its bound: no gradient
def test_closed_form_of_a_constant_std_is_the_gradient_of_the_loss(lab, mean_tanh, log_std):
    options = {"squash": False, "state_std": False, "mean_tanh": mean_tanh, "log_std_init": log_std}
    policy = lab.make_policy("gaussian", **options)
    algo = lab.make("ppo", policy=policy, max_grad_norm=1e9, entropy_coef=0.02, normalise_advantage=False)
    g = torch.Generator().manual_seed(0)
    batch = lab.make_rollout(algo)
    obs = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
    chain, size = batch.chain.flatten(0, 1), batch.reward.numel()
    # Ratios on both sides of both bounds, with advantages of both signs.
    old = policy.log_prob(obs, chain).detach() + 0.5 * torch.randn(size, generator=g)
    advantage, returns = torch.randn(2, size, generator=g)
    ratio = (policy.log_prob(obs, chain) - old).exp()
    loss = clipped_loss(ratio, advantage, 0.2) + 0.5 * (algo.value(obs) - returns).square().mean()
    loss = loss - 0.02 * policy.entropy(obs).mean()
    params = [*policy.parameters(), *algo.value.parameters()]
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params)])
    rows = {"chain": chain, "log_prob": old, "advantage": advantage, "returns": returns}
    metrics = algo.minibatch_step(rows | {f"obs/{key}": value for key, value in obs.items()})
    assert ((ratio > 1.2) & (advantage > 0)).any()
    assert ((ratio < 0.8) & (advantage < 0)).any()
    assert torch.allclose(algo._flat.grad, expected, atol=1e-6)
    assert (algo._flat.grad[: policy.size] == 0).all() == (log_std > 2)
    assert metrics["loss/actor"] == pytest.approx(clipped_loss(ratio, advantage, 0.2).item(), abs=1e-6)
