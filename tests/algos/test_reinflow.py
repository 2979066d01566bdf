# SPDX-License-Identifier: Apache-2.0
"""ReinFlow: no noise is the flow, densities by scipy, bounds and schedule, what gradients reach, learning."""

import importlib.util
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from scipy.stats import norm

import robopost.algos.generative.reinflow as module
from robopost.algos.generative.reinflow import NoiseNet, ReinFlowConfig, chain_sum, entropy_rate, noise_bound
from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.nets import fused
from robopost.policies.flow import FlowConfig, TimeGrid
from robopost.policies.gaussian import normal_log_density

spec = importlib.util.spec_from_file_location("reinflow_lab", Path(__file__).parent / "reinflow_lab.py")
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
SHORTCUT = {"variant": "shortcut"}


def sampled(algo, rows=64, seed=3):
    """(raw observations, normalised ones, what `decide` chose)."""
    obs = lab.observe(algo.policy, rows, seed)
    return obs, algo.policy.normaliser.obs(obs), algo.decide(obs, torch.Generator().manual_seed(seed))


def first_ratio(algo, monkeypatch, batch=None):
    """Ratios of the first minibatch of an update."""
    seen = []
    real = module.clipped_loss
    monkeypatch.setattr(module, "clipped_loss", lambda ratio, *rest: seen.append(ratio) or real(ratio, *rest))
    algo.update(lab.rollout(algo) if batch is None else batch)
    monkeypatch.setattr(module, "clipped_loss", real)
    return seen[0].detach()


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 1), ({}, 2), ({}, 4), ({}, 10), (SHORTCUT, 1), (SHORTCUT, 2), (SHORTCUT, 4), (SHORTCUT, 16)],
)
@pytest.mark.parametrize("prediction", ["sample", "velocity"])
def test_without_noise_it_is_the_euler_sampler_of_the_flow(options, steps, prediction):
    policy = lab.make_policy(steps=steps, prediction=prediction, **options)
    algo = lab.make(policy=policy)
    algo.stds = lambda cond, wanted: torch.zeros(1, len(wanted), 1, 1)
    obs, normalised, action = sampled(algo, 16)
    plain = policy.act(obs, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(action.chunk, plain.chunk, rtol=0, atol=1e-6)
    torch.testing.assert_close(action.chain, plain.chain, rtol=0, atol=1e-6)
    by_hand = lab.euler(policy, normalised, action.chain)
    torch.testing.assert_close(action.chain[:, 1:], by_hand, rtol=0, atol=2e-6)


@pytest.mark.parametrize("execute", [2, 4])
@pytest.mark.parametrize("options", [{}, SHORTCUT, {"steps": 10, "prediction": "velocity"}])
def test_log_probability_of_the_sampler_is_the_stored_chains_and_scipys(options, execute):
    policy = lab.make_policy(execute=execute, **options)
    algo = lab.make(policy=policy, normalise_ratio=False)
    _, obs, action = sampled(algo)
    cond = policy.encoder(obs)
    std = algo.stds(cond, algo.tuned)
    again = algo.reduce(algo.density(action.chain, cond, std), action.chain)
    torch.testing.assert_close(action.log_prob, again, rtol=0, atol=1e-4)
    mean = lab.euler(policy, obs, action.chain)
    density = torch.from_numpy(norm.logpdf(*(x.detach().double() for x in (action.chain[:, 1:], mean, std))))
    density[:, -1, execute:] = 0
    exact = density.sum((1, 2, 3))
    torch.testing.assert_close(action.log_prob.double(), exact, rtol=1e-5, atol=1e-4)
    # The same, per step and dimension, x_0 included.
    count = (policy.num_steps * 4 + execute) * 2
    start = torch.from_numpy(norm.logpdf(action.chain[:, 0].double())).sum((1, 2))
    mean_log_prob = lab.make(policy=policy, log_prob_bound=0.0).reduce(
        algo.density(action.chain, cond, std), action.chain
    )
    torch.testing.assert_close(mean_log_prob.double(), (exact + start) / count, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "policy_options", "options"),
    [
        (lab.STATE, {}, {}),
        (lab.STATE, {"execute": 4}, {"noise_min": 0.05, "noise_max": 0.05}),
        (lab.STATE, {"backbone": "unet", "width": 8, "depth": 2}, {}),
        (lab.STATE, {"backbone": "transformer", "width": 8}, {"finetune_steps": 1}),
        (lab.STATE, SHORTCUT, {"finetune_steps": 2}),
        (lab.IMAGES, {"image_shift": 4}, {"finetune_steps": 2}),
    ],
    ids=["mlp", "constant noise", "unet", "transformer", "shortcut", "images"],
)
def test_ratio_is_one_at_the_first_minibatch(spec, policy_options, options, monkeypatch):
    algo = lab.make(spec, policy_options=policy_options, **options)
    ratio = first_ratio(algo, monkeypatch)
    assert (ratio - 1).abs().max() <= 1e-6
    joint = lab.make(spec, policy_options=policy_options, normalise_ratio=False, **options)
    assert (first_ratio(joint, monkeypatch) - 1).abs().max() <= 1e-4


def test_there_is_one_grid(monkeypatch):
    """Sampler, density and noise network ask the policy's grid for their times; nothing else can be configured."""
    asked = []

    class Slow(TimeGrid):
        def starts(self, first, count, device):
            asked.append(count)
            return 0.8 * super().starts(first, count, device)

        def draw(self, batch, generator, device):
            asked.append("training")
            return 0.8 * super().draw(batch, generator, device)

    algo = lab.make()
    algo.policy.grid = Slow(4)
    obs = lab.observe(algo.policy, 4)
    for work in (
        lambda: algo.policy.act(obs),
        lambda: algo.decide(obs, torch.Generator()),
        lambda: lab.rollout(algo),
    ):
        asked.clear()
        work()
        assert asked.count(1) == 4  # one step at a time
    batch = lab.rollout(algo)
    asked.clear()
    assert (first_ratio(algo, monkeypatch, batch) - 1).abs().max() <= 1e-6
    assert asked == [4, 4, 4, 4]  # per minibatch: the means of all steps, and their noise
    algo.policy.bc_loss(
        batch.map(lambda x: x.flatten(0, 1)).obs, torch.zeros(12, 4, 2), torch.ones(12, 4).bool(), None
    )
    assert asked[-1] == "training"
    names = [item.name for config in (ReinFlowConfig, FlowConfig) for item in fields(config)]
    assert not [name for name in names if "grid" in name or "schedule" in name]
    # What two grids would do, on the released code's pair: the test above would notice.
    broken = lab.make(normalise_ratio=False)
    batch = lab.rollout(broken)
    broken.policy.grid = Slow(4)
    assert (first_ratio(broken, monkeypatch, batch) - 1).abs().max() > 0.05


def test_noise_stays_within_its_bounds():
    net = NoiseNet(7, [16], (4, 2), 0.05, 0.2)
    with torch.no_grad():
        for p in net.net.parameters():
            p.mul_(4)
    g = torch.Generator().manual_seed(0)
    time, cond = torch.randn(4, 3, generator=g), 3 * torch.randn(25_000, 4, generator=g)
    std = net(time, cond)
    assert std.shape == (25_000, 4, 4, 2)
    assert std.min() >= 0.05 * (1 - 1e-6)
    assert std.max() <= 0.2 * (1 + 1e-6)
    assert std.min() < 0.051  # and reaches both
    assert std.max() > 0.199
    z = net.net(torch.cat([time[1], cond[5]]))[2 * 2 + 1].tanh()
    log_variance = math.log(0.05**2) + (math.log(0.2**2) - math.log(0.05**2)) * (z + 1) / 2
    assert std[5, 1, 2, 1].item() == pytest.approx((0.5 * log_variance).exp().item(), rel=1e-5)


def test_upper_bound_of_the_noise_follows_its_schedule():
    assert [noise_bound(x, 0.1, 0.24) for x in (0, 0.2, 0.35)] == [0.24] * 3
    end = 0.3 * 0.1 + 0.7 * 0.24
    assert noise_bound(0.675, 0.1, 0.24) == pytest.approx((0.24 + end) / 2)
    assert noise_bound(1.0, 0.1, 0.24) == pytest.approx(end)
    assert noise_bound(1.7, 0.1, 0.24) == pytest.approx(end)
    algo = lab.make(noise_decay_updates=4)
    batch = lab.rollout(algo)
    bounds = [algo.update(batch)["policy/noise_bound"].item() for _ in range(6)]
    assert bounds == pytest.approx([noise_bound(i / 4, 0.1, 0.24) for i in range(6)])
    assert bounds[-1] == pytest.approx(end)
    with torch.no_grad():
        for p in algo.noise.net.parameters():
            p.fill_(10.0)
    assert algo.decide(lab.observe(algo.policy, 2), torch.Generator()).chain is not None
    assert algo.stds(torch.ones(2, 6), range(4)).max().item() == pytest.approx(end)


def test_what_it_exports_is_a_flow_without_noise(tmp_path):
    algo = lab.make(finetune_steps=2)
    algo.update(lab.rollout(algo))
    policy, g = algo.export_policy(), torch.Generator()
    obs = lab.observe(policy, 3)
    torch.randn(3, 4, 2, generator=g.manual_seed(5))
    spent = g.get_state()
    first = policy.act(obs, generator=g.manual_seed(5))
    assert torch.equal(g.get_state(), spent)  # x_0 and nothing else was drawn
    assert torch.equal(first.chunk, policy.act(obs, generator=g.manual_seed(5)).chunk)
    before = g.get_state()
    assert torch.equal(*(policy.act(obs, generator=g, deterministic=True).chunk for _ in range(2)))
    assert torch.equal(g.get_state(), before)
    save_folder(tmp_path / "policy", policy_files(policy))
    loaded = load_policy(tmp_path / "policy")
    assert loaded.registry_name == "flow"
    assert torch.equal(loaded.act(obs, generator=g.manual_seed(5)).chunk, first.chunk)


def test_steps_that_are_not_fine_tuned_get_no_gradient():
    algo = lab.make(lab.IMAGES, finetune_steps=2)
    policy = algo.policy
    rows, obs = lab.rows_of(algo)
    assert not any(p.requires_grad for p in policy.frozen.parameters())
    loss = algo.actor_loss(rows, obs)[0]
    wanted = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()))
    # The chain as it was is data: what lies before the fine-tuned steps is in no gradient.
    other = rows | {"chain": rows["chain"].clone()}
    other["chain"][:, 1] = 7.0
    again = torch.autograd.grad(algo.actor_loss(other, obs)[0], list(wanted.values()))
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)
    # By hand, from the two last steps.
    mean = lab.euler(policy, obs, rows["chain"], first=2)
    std = algo.stds(policy.encoder(obs), range(2, 4))
    density = normal_log_density(rows["chain"][:, 3:], mean, std.log())
    log_prob = module.geometric_log_prob(density, rows["chain"][:, 0], 2, 1.0)
    ratio, bonus = (log_prob - rows["log_prob"]).exp(), 0.03 * entropy_rate(std, 2).mean()
    by_hand = module.clipped_loss(ratio, rows["advantage"], 0.01) - bonus
    for a, b in zip(found, torch.autograd.grad(by_hand, list(wanted.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert algo.stds(policy.encoder(obs), range(4))[:, :2].unique().tolist() == pytest.approx([0.1])
    x = torch.randn(12, 4, 2, generator=torch.Generator().manual_seed(0))
    before = policy.chain(obs, x)
    algo.update(lab.rollout(algo))
    after = policy.chain(obs, x)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, True, False, False]


def test_the_noise_network_reaches_neither_time_embedding_nor_encoder():
    algo = lab.make(lab.IMAGES)
    rows, obs = lab.rows_of(algo)
    std = algo.stds(algo.policy.encoder(obs), algo.tuned)
    assert lab.gradients(entropy_rate(std, 2).mean(), algo.noise).keys() == {
        n for n, _ in algo.noise.named_parameters()
    }
    with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
        torch.autograd.grad(std.sum(), list(algo.policy.parameters()))
    of_loss = lab.gradients(algo.actor_loss(rows, obs)[0], algo.policy)
    assert any(name.startswith("net.time") for name in of_loss)
    algo.config.entropy_coef = 100.0
    again = lab.gradients(algo.actor_loss(rows, obs)[0], algo.policy)
    for name, value in of_loss.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("execute", "count"), [(4, 5 * 4 * 2), (2, (4 * 4 + 2) * 2)])
def test_joint_ratio_is_the_normalised_one_to_the_number_of_its_terms(execute, count):
    algo = lab.make(policy_options={"execute": execute}, log_prob_bound=0.0)
    rows, obs = lab.rows_of(algo)

    def both():
        cond = algo.policy.encoder(obs)
        density = algo.density(rows["chain"], cond, algo.stds(cond, algo.tuned)).detach()
        pair = []
        for algo.config.normalise_ratio in (True, False):
            pair.append(algo.reduce(density, rows["chain"]).double())
        return pair

    mean, joint = both()
    with torch.no_grad():
        for p in (*algo.policy.net.parameters(), *algo.noise.net.parameters()):
            p.add_(0.01)
    mean_after, joint_after = both()
    assert (joint_after - joint).abs().mean() > 0.05
    torch.testing.assert_close((mean_after - mean) * count, joint_after - joint, rtol=1e-3, atol=1e-4)


def test_entropy_rate_by_hand():
    std = torch.full((3, 2, 4, 2), 0.5)
    gauss = lambda s: 0.5 * math.log(2 * math.pi * math.e * s**2)  # noqa: E731
    assert entropy_rate(std, 4).tolist() == pytest.approx([(gauss(1) + 2 * gauss(0.5)) / 3] * 3)
    kept = (8 * gauss(1) + (8 + 4) * gauss(0.5)) / 20
    assert entropy_rate(std, 2).tolist() == pytest.approx([kept] * 3)
    assert ReinFlowConfig().log_prob_bound == 1.0


def test_clamped_densities_have_no_gradient_and_are_counted():
    """The average per dimension at std .01 is far above 1."""
    options = {"noise_min": 0.01, "noise_max": 0.01, "entropy_coef": 0.0}
    for bound, share in ((1.0, 1.0), (0.0, None)):
        algo = lab.make(log_prob_bound=bound, **options)
        rows, obs = lab.rows_of(algo)
        loss, _, metrics = algo.actor_loss(rows, obs)
        assert metrics.get("policy/clamped") == share
        assert bool(lab.gradients(loss, algo.policy)) is (bound == 0)


def test_only_what_reaches_nothing_is_left_out_of_the_density():
    """Scores of dimensions that are not executed: those of the last step are noise, the others are not."""
    policy = lab.make_policy(execute=2, history=1, steps=2)
    with torch.no_grad():
        for p in policy.net.parameters():
            p.mul_(2)
    algo = lab.make(policy=policy, noise_min=0.3, noise_max=0.3)
    _, obs, action = sampled(algo, 10_000)
    std = algo.stds(policy.encoder(obs), algo.tuned)
    changed = action.chain.clone()
    changed[:, -1, 2:] += 5.0
    cond = policy.encoder(obs)
    log_prob = [algo.reduce(algo.density(chain, cond, std), chain) for chain in (action.chain, changed)]
    assert torch.equal(*log_prob)

    class Density(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = policy

        def forward(self):
            return algo.density(action.chain, cond, std)

    weights = {f"policy.{name}": p.detach() for name, p in policy.named_parameters()}
    direction = {name: torch.zeros_like(p) for name, p in weights.items()}
    direction["policy.net.net.out.1.bias"] += 1.0
    call = lambda values: torch.func.functional_call(Density(), values, ())  # noqa: E731
    with fused.twice_differentiable():  # as written: the fused kernels have no forward derivative
        score = torch.func.jvp(call, (weights,), (direction,))[1]
    reward = action.chain[:, -1, :2].sum((1, 2))
    reward = (reward - reward.mean()) / reward.std()

    def of(part):
        """Policy gradient along `direction` in units of its standard error, and the variance of its terms."""
        terms = part.reshape(len(reward), -1).sum(1) * reward
        return (terms.mean() / (terms.std() / 100)).abs().item(), terms.var().item()

    unexecuted = [(h, a) for h in (2, 3) for a in (0, 1)]
    assert max(of(score[:, -1, h, a])[0] for h, a in unexecuted) < 3
    assert max(of(score[:, :-1, h, a])[0] for h, a in unexecuted) > 5
    kept = score.clone()
    kept[:, -1, 2:] = 0
    assert chain_sum(score, 2).equal(chain_sum(kept, 4))
    assert of(kept)[1] < of(score)[1]
