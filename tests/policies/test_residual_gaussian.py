# SPDX-License-Identifier: Apache-2.0
"""Residual with noise: densities, what PPO makes of it, training in the on-policy loop and resuming it."""

import math

import pytest
import torch

from robopost.algos.online.ppo import PPO, PPOConfig
from robopost.artefacts.checkpoint import (
    latest,
    load_json,
    load_policy,
    load_tensors,
    policy_files,
    save_folder,
)
from robopost.compose import compose
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.loops import train
from robopost.policies.base import build_policy
from robopost.policies.chunked import StepPolicy
from robopost.policies.flow import Flow, FlowConfig
from robopost.policies.residual import BASE_ACTION, ResidualConfig, ResidualPolicy
from robopost.policies.residual_gaussian import ResidualGaussian, ResidualGaussianConfig
from robopost.vector import make_vec

SPEC = Spec({"state": ((3,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0), 50)
ENV = ["env=InvertedPendulum-v5", "env.num_envs=2"]


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    save_folder(
        tmp_path / "base",
        policy_files(Flow(FlowConfig(horizon=4, steps=2, width=16, depth=1), SPEC)),
    )
    return str(tmp_path / "base")


@pytest.fixture
def noisy(base):
    return ResidualGaussian(
        ResidualGaussianConfig(base=base, scale=0.3, hidden=[16], log_std_init=-1.5), SPEC
    )


def test_deterministic_actions_are_those_of_a_residual_policy(noisy, base):
    obs = {"state": torch.randn(100, 3)}
    expected = StepPolicy(noisy.base, 100).act(obs, deterministic=True)
    assert torch.equal(noisy.act(obs, deterministic=True).chunk[:, 0], expected)  # zero start, to the bit
    torch.nn.init.normal_(noisy.net[-1].weight)
    plain = ResidualPolicy(ResidualConfig(base=base, scale=0.3, hidden=[16]), SPEC)
    plain.net.load_state_dict(noisy.net.state_dict())
    noisy.reset()
    assert torch.equal(noisy.act(obs, deterministic=True).chunk, plain.act(obs).chunk)


def test_log_prob_is_that_of_what_was_added(noisy):
    torch.nn.init.normal_(noisy.net[-1].weight)
    obs = {"state": torch.randn(200, 3), BASE_ACTION: torch.rand(200, 2) * 2 - 1}
    g = torch.Generator().manual_seed(0)
    chunk, log_prob, chain = noisy.sample(obs, generator=g)
    assert chain.shape == (200, 1, 1, 2)
    added = chain[:, 0, 0]
    encoded = noisy.encode(obs)
    expected = torch.distributions.Normal(noisy.correction(encoded), math.exp(-1.5)).log_prob(added).sum(-1)
    assert torch.allclose(log_prob, expected, atol=1e-5)
    assert torch.allclose(noisy.log_prob(obs, chain), expected, atol=1e-5)
    # The action is clipped, the density is that of the sample before.
    assert torch.equal(chunk[:, 0], (obs[BASE_ACTION] + added).clamp(-1, 1))
    assert (obs[BASE_ACTION] + added).abs().max() > 1
    entropy = noisy.entropy(obs)
    assert entropy.shape == (200,)
    assert entropy[0].item() == pytest.approx(2 * (0.5 * math.log(2 * math.pi * math.e) - 1.5), abs=1e-5)
    assert (noisy.log_prob(obs, chain).mean() + entropy[0]).abs() < 0.2


def test_executed_noise_has_its_std(noisy):
    obs = {"state": torch.zeros(4000, 3), BASE_ACTION: torch.zeros(4000, 2)}
    acted = noisy.act(obs, generator=torch.Generator().manual_seed(0)).chunk[:, 0]
    assert torch.allclose(
        (acted / noisy.normaliser.action_scale).std(0), torch.full((2,), math.exp(-1.5)), rtol=0.05
    )


def test_ppo_raises_the_density_of_the_better_half(noisy):
    """One rollout in which additions upwards are rewarded: the mean correction goes up, the frozen base stays."""
    config = PPOConfig(rollout_steps=64, batch_size=64, epochs=4, hidden=[16], gamma=0.0, lr=1e-2)
    algo = PPO(
        config, noisy, noisy.spec, device=torch.device("cpu"), generator=torch.Generator().manual_seed(0)
    )
    frozen = [p.clone() for p in noisy.base.parameters()]
    obs = {"state": torch.randn(128, 3), BASE_ACTION: torch.zeros(128, 2)}
    action = noisy.act(obs, generator=torch.Generator().manual_seed(1))
    no = torch.zeros(128, dtype=torch.bool)
    rows = Batch(
        obs=obs,
        action=action.chunk[:, 0],
        reward=action.chain[:, 0, 0, 0],
        next_obs=obs,
        terminated=no,
        truncated=no,
        discount=torch.zeros(128),
        chain=action.chain,
        log_prob=action.log_prob,
    )
    metrics = algo.update(noisy.normaliser.batch(rows.map(lambda tensor: tensor.unflatten(0, (64, 2)))))
    assert metrics["policy/entropy"].item() == pytest.approx(
        2 * (0.5 * math.log(2 * math.pi * math.e) - 1.5), abs=1e-4
    )
    change = noisy.correction(noisy.encode(noisy.normaliser.obs(obs))).mean(0)
    assert change[0] > 0.02
    assert change[0] > 3 * change[1].abs()
    assert all(torch.equal(p, q) for p, q in zip(noisy.base.parameters(), frozen, strict=True))


def test_std_must_lie_within_its_bounds():
    with pytest.raises(ConfigError, match=r"policy.log_std_init=1.0 must lie in policy.log_std_min=-5.0"):
        ResidualGaussianConfig(log_std_init=1.0)


@pytest.fixture(scope="module")
def pole(tmp_path_factory):
    """An untrained flow policy for the training environment."""
    folder = tmp_path_factory.mktemp("pole") / "base"
    torch.manual_seed(0)
    vec = make_vec(compose(["algo=ppo", *ENV]).env, 1)
    config = FlowConfig(horizon=4, steps=2, width=16, depth=1, normalise_action="bounds")
    save_folder(folder, policy_files(build_policy(config, vec.spec)))
    vec.close()
    return folder


def words(base, out, steps):
    ppo = ["algo=ppo", "algo.rollout_steps=10", "algo.batch_size=20", "algo.hidden=[16]"]
    policy = ["policy=residual_gaussian", f"policy.base={base}", "policy.hidden=[16]"]
    loop = [f"loop.steps={steps}", "loop.log_every=40", "loop.checkpoint_every=60", "loop.eval_episodes=2"]
    return [*ppo, *policy, *ENV, *loop, "loop.eval_every=20", "track.console=false", f"out={out}"]


def test_on_policy_training_resumes_bitwise_and_its_policy_stands_alone(pole, tmp_path):
    train(compose(words(pole, tmp_path / "straight", 120)))
    train(compose(words(pole, tmp_path / "resumed", 60)))
    train(compose([*words(pole, tmp_path / "resumed", 120)[:-1], f"resume={tmp_path / 'resumed'}"]))
    first, second = latest(tmp_path / "straight"), latest(tmp_path / "resumed")
    for name in ("model.safetensors", "policy.safetensors"):
        left, right = load_tensors(first / name), load_tensors(second / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert load_json(first / "state.json") == load_json(second / "state.json")
    policy = load_policy(tmp_path / "straight")
    assert policy.act({"state": torch.zeros(3, 4)}, deterministic=True).chunk.shape == (3, 1, 1)


def test_a_residual_without_noise_is_refused_on_policy(pole, tmp_path):
    out = [w.replace("residual_gaussian", "residual") for w in words(pole, tmp_path / "run", 40)]
    with pytest.raises(ConfigError, match=r"policy=residual has none. Fix: policy=gaussian"):
        train(compose(out))
    assert not (tmp_path / "run").exists()
