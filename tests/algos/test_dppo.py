# SPDX-License-Identifier: Apache-2.0
"""DPPO: densities, schedules and losses by hand, the acceptance checks of its card, a bandit it must solve."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

from robopost.algos.generative.chunk_ppo import ChunkPPO
from robopost.algos.generative.dppo import (
    DPPO,
    DPPOConfig,
    clip_ranges,
    denoising_weights,
    dppo_loss,
    step_log_prob,
)
from robopost.algos.online.ppo import clipped_loss, normalise
from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.errors import ConfigError
from robopost.policies.flow import Flow, FlowConfig
from robopost.policies.gaussian import Gaussian, GaussianConfig

spec = importlib.util.spec_from_file_location("chunk_lab", Path(__file__).parent / "chunk_lab.py")
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
FREE = {"log_prob_min": -math.inf, "log_prob_max": math.inf}
CHAINS = [
    pytest.param({"sampler": "ddpm"}, id="ddpm"),
    pytest.param({"sampler": "ddim"}, id="ddim"),
    pytest.param({"sampler": "ddim", "eta": 0.5, "finetune_steps": 2}, id="ddim, two of five steps"),
    pytest.param({"sampler": "ddpm", "finetune_steps": 3}, id="ddpm, three of five steps"),
    pytest.param({"sampler": "ddpm", "min_log_prob_std": 0.6}, id="wider densities than noise"),
]


def written_out(policy, chain, obs, kind, eta):
    """Means (B, K, H, A) and stds (K,) of Ho et al. 2020, eq. 7 and Song et al. 2021, eq. 12, a step at a time."""
    cfg, alphas, means, stds = policy.config, policy.alphas.double(), [], []
    stride = cfg.train_steps // cfg.steps
    for k in range(cfg.steps):
        parts = policy.frozen if k < policy.frozen_steps else {"encoder": policy.encoder, "net": policy.net}
        t = cfg.train_steps - 1 - k * stride
        x = chain[:, k]
        clean = parts["net"](x, parts["encoder"](obs), torch.full((len(x),), t / cfg.train_steps))
        a, before = alphas[t], alphas[t - stride] if t >= stride else torch.ones((), dtype=torch.float64)
        noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
        clean = clean.clamp(-1, 1)
        beta = 1 - a / before
        variance = beta * (1 - before) / (1 - a)
        if kind == "ddpm":
            mean = before.sqrt() * beta / (1 - a) * clean + (a / before).sqrt() * (1 - before) / (1 - a) * x
        else:
            variance = eta**2 * variance
            mean = before.sqrt() * clean + (1 - before - variance).clamp_min(0).sqrt() * noise
        means.append(mean.float())
        stds.append(variance.sqrt().item())
    return torch.stack(means, 1), stds


@pytest.mark.parametrize("options", CHAINS)
def test_log_prob_is_the_one_of_the_stored_chain_and_the_first_ratio_is_one(options):
    algo = lab.make(**options, **FREE)
    obs = lab.observe(algo.policy, 6)
    action = algo.decide(obs, torch.Generator().manual_seed(1))
    mean, std = written_out(algo.policy, action.chain, obs, options["sampler"], options.get("eta", 1.0))
    first = algo.tuned.start
    expected = []
    for k in range(first, 5):
        normal = Normal(mean[:, k], max(std[k], options.get("min_log_prob_std", 0.1)))
        # executed actions alone: the first 3 of 4
        expected.append(normal.log_prob(action.chain[:, k + 1])[:, :3].mean((1, 2)))
    torch.testing.assert_close(action.log_prob, torch.stack(expected, 1), rtol=0, atol=2e-5)

    rows = {"chain": action.chain, "log_prob": action.log_prob, "advantage": torch.linspace(-1, 2, 6)}
    cond = algo.policy.encoder(obs)
    density = algo.density(action.chain, cond, algo.density_std(algo.stds(cond, algo.tuned)))
    ratio = (algo.reduce(density, action.chain) - action.log_prob).exp()
    assert ratio.shape == (6, 5 - first)
    assert (ratio - 1).abs().max() < 1e-6
    loss, kl, metrics = algo.actor_loss(rows, obs)
    weights = torch.tensor([0.99 ** (4 - k) for k in range(first, 5)])
    assert loss.item() == pytest.approx(-(rows["advantage"].mean() * weights.mean()).item(), abs=1e-6)
    assert kl.item() == pytest.approx(0.0, abs=1e-7)
    assert metrics["policy/clip_fraction"] == 0


def test_noise_of_every_step_has_its_floor_and_no_tails():
    algo = lab.make(min_sampling_std=0.3, min_log_prob_std=0.5, noise_clip=0.7)
    raw = algo.policy.make_sampler("ddpm").std
    assert raw[0] > 0.5
    assert raw[-1] == 0.0
    std = algo.stds(torch.zeros(1, 3), range(5)).flatten()
    assert std.tolist() == pytest.approx([max(v, 0.3) for v in raw.tolist()])
    assert algo.density_std(std).tolist() == pytest.approx([max(v, 0.5) for v in raw.tolist()])
    obs = lab.observe(algo.policy, 400)
    chain = algo.decide(obs, torch.Generator().manual_seed(1)).chain
    mean, _ = written_out(algo.policy, chain, obs, "ddpm", 0.0)
    drawn = (chain[:, 1:] - mean) / std[:, None, None]
    assert drawn.abs().max() <= 0.7 + 1e-4
    assert (drawn.abs() > 0.69).float().mean() > 0.4  # 48 % of a standard normal lie beyond 0.7


def test_weights_and_clip_ranges():
    cpu = torch.device("cpu")
    weight, clip = denoising_weights(4, 0.9, cpu), clip_ranges(4, 0.001, 0.01, 3.0, cpu)
    assert weight.tolist() == pytest.approx([0.729, 0.81, 0.9, 1.0])
    assert clip[0].item() == pytest.approx(0.001)
    assert clip[-1].item() == pytest.approx(0.01)
    grown = [0.001 + 0.009 * (math.exp(3 * i / 3) - 1) / (math.exp(3) - 1) for i in range(4)]
    assert clip.tolist() == pytest.approx(grown)
    assert denoising_weights(1, 0.9, cpu).tolist() == [1.0]
    assert clip_ranges(1, 0.001, 0.01, 3.0, cpu).tolist() == pytest.approx([0.01])
    assert denoising_weights(3, 0.0, cpu).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("steps", [1, 5])
def test_one_fine_tuned_step_is_finite_and_learns(steps):
    algo = lab.make(policy_options={"steps": steps}, finetune_steps=1, clip=0.02, clip_base=0.001, epochs=2)
    before = algo._actor_flat.data.clone()
    metrics = algo.update(lab.rollout(algo))
    assert all(torch.isfinite(value) for value in metrics.values())
    assert torch.isfinite(algo._actor_flat.data).all()
    assert not torch.equal(algo._actor_flat.data, before)
    assert algo.per_step.clip.tolist() == pytest.approx([0.02])


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_first_steps_are_the_frozen_network_s(kind):
    algo = lab.make(finetune_steps=2, sampler=kind)
    obs = lab.observe(algo.policy, 5)
    before = algo.decide(obs, torch.Generator().manual_seed(1)).chain
    with torch.no_grad():
        algo._actor_flat.data.add_(0.05)
    after = algo.decide(obs, torch.Generator().manual_seed(1)).chain
    assert torch.equal(before[:, :4], after[:, :4])  # x_0 and what three frozen steps make of it
    assert not torch.equal(before[:, 4], after[:, 4])
    frozen = [parameter.clone() for parameter in algo.policy.frozen.parameters()]
    algo.update(lab.rollout(algo))
    assert all(torch.equal(a, b) for a, b in zip(frozen, algo.policy.frozen.parameters(), strict=True))


def test_one_step_of_unit_variance_is_gaussian_ppo():
    """A chain of one step on a chunk of one action is a Gaussian policy: PPO's loss and its gradient."""
    one = lab.Spec({"state": ((3,), "float32")}, 1, (-1.0,), (1.0,), 10)
    policy = lab.make_policy(one, horizon=1, execute=1, steps=1, prediction="sample")
    algo = lab.make(policy, min_sampling_std=1.0, min_log_prob_std=1.0, clip=0.2, **FREE)
    obs = lab.observe(policy, 64)
    action = algo.decide(obs, torch.Generator().manual_seed(1))
    advantage = normalise(torch.randn(64, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        algo._actor_flat.data.mul_(1.3)
    rows = {"chain": action.chain, "log_prob": action.log_prob, "advantage": advantage}
    loss, kl, _ = algo.actor_loss(rows, obs)

    mean = policy.net(action.chain[:, 0], policy.encoder(obs), torch.full((64,), 0.99)).clamp(-1, 1)
    log_ratio = Normal(mean, 1.0).log_prob(action.chain[:, 1]).flatten() - action.log_prob.flatten()
    expected = clipped_loss(log_ratio.exp(), advantage, 0.2)
    assert ((log_ratio.exp() - 1).abs() > 0.2).any()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(kl, (log_ratio.exp() - 1 - log_ratio).mean().detach(), rtol=0, atol=1e-6)
    ours = torch.autograd.grad(loss, list(policy.parameters()))
    theirs = torch.autograd.grad(expected, list(policy.parameters()))
    assert any(gradient.abs().max() > 1e-3 for gradient in ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_loss_equals_the_reference_s_order_of_operations():
    """The released code goes through shuffled (decision, step) rows; their discounts one by one."""
    g = torch.Generator().manual_seed(0)
    decisions, steps, gamma, low, high, rate = 30, 6, 0.9, 0.02, 0.1, 3.0
    new = (torch.randn(decisions, steps, 4, 2, generator=g) * 3).requires_grad_()
    old = new.detach() + 0.3 * torch.randn(decisions, steps, 4, 2, generator=g)
    advantage = torch.randn(decisions, generator=g)
    total, clamped = 0.0, lambda density: density.clamp(-5, 2)[:3].mean()
    for row in torch.randperm(decisions * steps, generator=g).tolist():
        n, i = divmod(row, steps)
        ratio = (clamped(new[n, i]) - clamped(old[n, i])).exp()
        credit = advantage[n] * gamma ** (steps - i - 1)
        clip = low + (high - low) * (math.exp(rate * i / (steps - 1)) - 1) / (math.exp(rate) - 1)
        total = total + torch.maximum(-credit * ratio, -credit * ratio.clamp(1 - clip, 1 + clip))
    total = total / (decisions * steps)

    ratio = (step_log_prob(new, 3, -5, 2) - step_log_prob(old, 3, -5, 2)).exp()
    cpu = torch.device("cpu")
    weight, clip = denoising_weights(steps, gamma, cpu), clip_ranges(steps, low, high, rate, cpu)
    loss = dppo_loss(ratio, advantage, weight, clip)
    assert ((ratio - 1).abs() > clip).float().mean() > 0.3
    torch.testing.assert_close(loss, total, rtol=0, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, new, retain_graph=True)[0] for value in (loss, total))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_log_prob_is_clamped_per_dimension_over_executed_actions():
    density = torch.tensor([[[[3.0, -1.0], [-9.0, 1.0], [100.0, 100.0]]]])
    assert step_log_prob(density, 2, -5.0, 2.0).item() == pytest.approx((2 - 1 - 5 + 1) / 4)
    assert step_log_prob(density, 2, -math.inf, math.inf).item() == pytest.approx((3 - 1 - 9 + 1) / 4)


def test_what_was_not_executed_moves_neither_ratio_nor_gradient():
    algo = lab.make(policy_options={"execute": 1})
    obs = lab.observe(algo.policy, 6)
    action = algo.decide(obs, torch.Generator().manual_seed(1))
    rows = {"chain": action.chain, "log_prob": action.log_prob, "advantage": torch.linspace(-1, 2, 6)}
    other = action.chain.clone()
    other[:, -1, 1:] += 1.0  # what the last step drew behind the executed action
    torch.testing.assert_close(
        algo.actor_loss(rows | {"chain": other}, obs)[0], algo.actor_loss(rows, obs)[0]
    )
    other[:, -1, 0] += 1.0
    assert not torch.isclose(algo.actor_loss(rows | {"chain": other}, obs)[0], algo.actor_loss(rows, obs)[0])


def test_exports_a_diffusion_policy_without_the_noise_of_training(tmp_path):
    policy = lab.make_policy(sampler="ddpm")
    algo = lab.make(policy, sampler="ddim", finetune_steps=2)
    algo.update(lab.rollout(algo))
    save_folder(tmp_path / "policy", policy_files(algo.export_policy()))
    loaded, obs = load_policy(tmp_path / "policy"), lab.observe(policy, 4)
    assert (loaded.config.sampler, loaded.config.eta, loaded.frozen_steps) == ("ddim", 0.0, 3)
    assert not loaded.sampler.stochastic
    ours, theirs = (p.act(obs, generator=torch.Generator().manual_seed(3)) for p in (policy, loaded))
    assert torch.equal(ours.chunk, theirs.chunk)
    # the posterior's own noise: none after the last step
    algo = lab.make(lab.make_policy(), sampler="ddpm", min_sampling_std=0.3)
    assert algo.policy.config.sampler == "ddpm"
    assert algo.policy.sampler.std[-1] == 0.0
    assert algo.policy.sampler.std[-2] < 0.3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"sampler": "ddpm"}, id="ddpm"),
        pytest.param({"sampler": "ddim", "finetune_steps": 3}, id="ddim, three of five steps"),
    ],
)
def test_learns_the_better_action_of_a_bandit(options):
    policy = lab.bandit_policy(seed=0)
    assert lab.bandit_distance(policy) > 1.2
    sizes = {"rollout_steps": 1, "batch_size": 128, "epochs": 4, "actor_lr": 1e-3, "target_kl": 0.0}
    algo = lab.make(policy, **sizes | options, clip=0.1, clip_base=0.05)
    metrics = lab.play_bandit(algo, 40)
    assert lab.bandit_distance(policy) < 0.1
    assert 0 < metrics["policy/clip_fraction"] < 0.9
    assert metrics["policy/kl"] > 0


def test_bad_input():
    with pytest.raises(ConfigError, match=r"algo.finetune_steps=6 must lie in 0..5"):
        lab.make(finetune_steps=6)
    with pytest.raises(ConfigError, match=r"algo=dppo fine-tunes a diffusion policy, policy=flow .* Fix:"):
        lab.make(Flow(FlowConfig(horizon=4, steps=4, width=16, depth=1), lab.SPEC))
    with pytest.raises(ConfigError, match=r"algo=dppo .* policy=gaussian .* policy=diffusion"):
        lab.make(Gaussian(GaussianConfig(hidden=[8]), lab.SPEC))
    algo = lab.make(batch_size=13)
    with pytest.raises(ConfigError, match=r"algo.batch_size=13 is larger than a rollout of 12 .* Fix: raise"):
        algo.update(lab.rollout(algo))
    for name, value, message in (
        ("sampler", "ddmp", r"unknown algo.sampler 'ddmp'. Did you mean 'ddpm'"),
        ("eta", 1.5, r"algo.eta=1.5 must lie in \[0, 1\]"),
        ("gamma_denoising", -0.1, r"algo.gamma_denoising=-0.1 must lie in \[0, 1\]"),
        ("min_sampling_std", 0.0, r"algo.min_sampling_std=0.0 must be above 0"),
        ("min_log_prob_std", -1.0, r"algo.min_log_prob_std=-1.0 must be above 0"),
        ("noise_clip", 0.0, r"algo.noise_clip=0.0 must be above 0"),
        ("clip_base", 0.0, r"algo.clip_base=0.0 must be above 0"),
        ("clip", -0.1, r"algo.clip=-0.1 must be above 0"),
        ("clip_rate", 0.0, r"algo.clip_rate=0.0 must be above 0"),
        ("log_prob_max", -6.0, r"algo.log_prob_min=-5.0 must be below algo.log_prob_max=-6.0"),
        ("finetune_steps", -1, r"algo.finetune_steps=-1 must be 0 \(all\) or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            DPPOConfig(**{name: value})
    assert issubclass(DPPO, ChunkPPO)
