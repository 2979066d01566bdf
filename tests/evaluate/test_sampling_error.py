# SPDX-License-Identifier: Apache-2.0
"""Sampling error: counts and least squares by hand, and both against the general refit."""

import math

import numpy as np
import pytest
import torch

from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.evaluate.sampling_error import has_closed_form, refitted_log_prob, sampling_error
from robopost.policies.categorical import Categorical, CategoricalConfig
from robopost.policies.deterministic import Deterministic, DeterministicConfig
from robopost.policies.gaussian import Gaussian, GaussianConfig

BOX = Spec({"state": ((3,), "float32")}, 2, (-1.0,) * 2, (1.0,) * 2, 100)


def gaussian(**options):
    torch.manual_seed(0)
    return Gaussian(GaussianConfig(**({"hidden": [6], "squash": False, "state_std": False} | options)), BOX)


def drawn(policy, rows=400, seed=1):
    g = torch.Generator().manual_seed(seed)
    obs = {"state": torch.randn(rows, policy.spec.obs["state"][0][0], generator=g)}
    return obs, policy.act(obs, generator=g).chain


def test_counts_by_hand():
    """State 0: actions 0, 0, 1 under (1/2, 1/2); state 1: action 1 under (1/4, 3/4)."""
    spec = Spec({"state": ((2,), "float32")}, 1, (0.0,), (1.0,), 0, 2)
    policy = Categorical(CategoricalConfig(hidden=[]), spec)
    with torch.no_grad():
        policy.net[0].weight.copy_(torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]))
        policy.net[0].bias.zero_()
    obs = {"state": torch.eye(2)[[0, 0, 0, 1]]}
    chain = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1)
    by_hand = 0.75 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)) + 0.25 * math.log(4 / 3)
    assert sampling_error(policy, obs, chain).item() == pytest.approx(by_hand, rel=1e-5)


def test_counts_equal_the_refit_of_a_tabular_policy():
    spec = Spec({"state": ((3,), "float32")}, 1, (0.0,), (3.0,), 0, 4)
    torch.manual_seed(0)
    policy = Categorical(CategoricalConfig(hidden=[]), spec)
    g = torch.Generator().manual_seed(0)
    obs = {"state": torch.eye(3)[torch.randint(3, (200,), generator=g)]}
    chain = policy.act(obs, generator=g).chain
    target = policy.log_prob(obs, chain).double().mean()
    refit = refitted_log_prob(policy, obs, chain) - target
    assert sampling_error(policy, obs, chain).item() == pytest.approx(refit.item(), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"squash": True}, {"hidden": []}, {"activation": "tanh", "log_std_init": -1.0}]
)
def test_least_squares_equal_the_refit(options):
    policy = gaussian(**options)
    assert has_closed_form(policy)
    obs, chain = drawn(policy)
    target = policy.chain_log_prob(chain, *policy.distribution(obs)).double().mean()
    refit = refitted_log_prob(policy, obs, chain) - target
    assert sampling_error(policy, obs, chain).item() == pytest.approx(refit.item(), abs=2e-6)
    assert refit > 0


def test_least_squares_by_numpy():
    policy = gaussian(hidden=[])
    obs, chain = drawn(policy)
    x = chain[:, 0, 0].numpy().astype(float)
    design = np.concatenate([obs["state"].numpy(), np.ones((400, 1))], 1)
    weights, *_ = np.linalg.lstsq(design, x, rcond=None)
    spread = np.square(x - design @ weights).mean(0)
    mean = policy.distribution(obs)[0][:, 0].detach().numpy()
    best = -0.5 * np.log(spread).sum() - 1  # - log sqrt(2 pi) on both sides
    target = -0.5 * np.square(x - mean).sum(1).mean()
    assert sampling_error(policy, obs, chain).item() == pytest.approx(best - target, rel=1e-4)


def test_on_policy_error_is_half_the_parameters_per_sample():
    """Wilks: twice the gain in log-likelihood is chi-square with one degree of freedom per fitted parameter."""
    policy = gaussian(hidden=[])
    found = [sampling_error(policy, *drawn(policy, 500, seed)).item() for seed in range(40)]
    assert np.mean(found) == pytest.approx((2 * 4 + 2) / 1000, rel=0.25)


def test_a_shift_of_the_actions_is_found_in_full():
    policy = gaussian()
    obs, chain = drawn(policy, 4000)
    shifted = sampling_error(policy, obs, chain + 0.5).item()
    assert shifted == pytest.approx(2 * 0.5**2 / 2, rel=0.1)


@pytest.mark.parametrize("options", [{"state_std": True}, {"mean_tanh": True}])
def test_other_heads_are_refitted(options):
    policy = gaussian(**options)
    assert not has_closed_form(policy)
    obs, chain = drawn(policy)
    error = sampling_error(policy, obs, chain)
    assert 0 < error < 0.2
    assert not error.requires_grad
    assert sampling_error(policy, obs, chain + 0.5) > 3 * error


def test_policies_without_a_likelihood_are_refused():
    policy = Deterministic(DeterministicConfig(hidden=[4]), BOX)
    with pytest.raises(
        ConfigError, match=r"policy=deterministic has no sampling error.*Fix: policy=gaussian"
    ):
        sampling_error(policy, {"state": torch.zeros(1, 3)}, torch.zeros(1, 1, 1, 2))
