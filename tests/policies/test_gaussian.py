# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.deterministic import Deterministic, DeterministicConfig
from robopost.policies.gaussian import Gaussian, GaussianConfig

SPEC = Spec({"state": ((4,), "float32")}, 2, (-1.0, -2.0), (1.0, 6.0), 100)


def gaussian(**options):
    torch.manual_seed(0)
    return Gaussian(GaussianConfig(hidden=[16], **options), SPEC)


def state(rows=5, history=1):
    lead = (rows, history) if history > 1 else (rows,)
    return {"state": torch.randn(*lead, 4, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("horizon", [1, 3])
def test_squashed_log_prob_equals_torch_distributions(horizon):
    policy = gaussian(horizon=horizon).double()
    obs = {"state": state()["state"].double()}
    chunk, log_prob, chain = policy.sample(obs, generator=torch.Generator().manual_seed(2))
    mean, log_std = policy.distribution(obs)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    torch.testing.assert_close(chunk, chain[:, 0].tanh())
    torch.testing.assert_close(log_prob, reference.log_prob(chunk).sum((1, 2)))
    torch.testing.assert_close(policy.log_prob(obs, chain), log_prob)
    torch.testing.assert_close(policy.action_log_prob(obs, chunk), log_prob, atol=1e-5, rtol=1e-5)


def test_plain_log_prob_and_entropy_equal_scipy():
    policy = gaussian(squash=False, state_std=False, log_std_init=-0.5)
    policy.log_std.data = torch.tensor([-0.5, 0.3])
    obs = state()
    _, log_prob, chain = policy.sample(obs, generator=torch.Generator().manual_seed(2))
    mean, _ = policy.distribution(obs)
    for row in range(5):
        expected = stats.norm.logpdf(
            chain[row, 0, 0].detach().numpy(), mean[row, 0].detach().numpy(), np.exp([-0.5, 0.3])
        ).sum()
        assert log_prob[row].item() == pytest.approx(expected, abs=1e-5)
    entropy = stats.norm.entropy(scale=np.exp(-0.5)) + stats.norm.entropy(scale=np.exp(0.3))
    torch.testing.assert_close(policy.entropy(obs), torch.full((5,), float(entropy)))


def test_tanh_correction_is_finite_and_exact_where_tanh_saturates():
    policy = gaussian()
    obs = state(1)
    chain = torch.full((1, 1, 1, 2), 30.0)  # tanh(30) is 1 in float32
    mean, log_std = (value.double() for value in policy.distribution(obs))
    base = Normal(mean, log_std.exp()).log_prob(chain[:, 0].double()).sum()
    # log(1 - tanh(x)^2) -> log 4 - 2x
    expected = base - 2 * (math.log(4) - 2 * 30.0)
    assert policy.log_prob(obs, chain).item() == pytest.approx(expected.item(), rel=1e-5)


def test_density_integrates_to_one():
    torch.manual_seed(0)
    spec = Spec({"state": ((4,), "float32")}, 1, (-1.0,), (1.0,))
    policy = Gaussian(GaussianConfig(hidden=[8]), spec).double()
    grid = torch.linspace(-1, 1, 20001, dtype=torch.double)[1:-1]
    obs = {"state": state(1)["state"].double().expand(len(grid), -1)}
    density = policy.action_log_prob(obs, grid[:, None, None]).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-3)


def test_gradients_flow_through_the_sample():
    policy = gaussian()
    chunk, log_prob, _ = policy.sample(state(), generator=torch.Generator().manual_seed(0))
    (chunk.sum() + log_prob.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in policy.parameters())


def test_log_std_stays_in_its_bounds():
    policy = gaussian(log_std_min=-3.0, log_std_max=1.0)
    _, log_std = policy.distribution({"state": torch.randn(1000, 4) * 100})
    assert log_std.min() >= -3.0
    assert log_std.max() <= 1.0
    assert log_std.min() < -2.9
    assert log_std.max() > 0.9


def test_act_returns_executable_actions_and_deterministic_is_the_mean():
    policy = gaussian(squash=False, state_std=False, log_std_init=2.0)
    action = policy.act(state(200), generator=torch.Generator().manual_seed(0))
    assert action.chunk[..., 1].min() == -2.0  # clipped to this dimension's own bounds
    assert action.chunk[..., 1].max() == 6.0
    assert action.chain.abs().max() > 3  # the chain is not clipped
    mean = policy.act(state(), deterministic=True)
    expected = policy.distribution(policy.normaliser.obs(state()))[0] * torch.tensor(
        [1.0, 4.0]
    ) + torch.tensor([0.0, 2.0])
    torch.testing.assert_close(mean.chunk, expected)


def test_bc_loss_is_the_masked_negative_log_likelihood():
    policy = gaussian(horizon=3, squash=False)
    obs, chunk = state(2), torch.randn(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean, log_std = policy.distribution(obs)
    per_step = -Normal(mean, log_std.exp()).log_prob(chunk).mean(-1)
    expected = (per_step[0, 0] + per_step[0, 1] + per_step[1, 0]) / 3
    torch.testing.assert_close(policy.bc_loss(obs, chunk, mask, None), expected)


def test_bc_loss_is_finite_for_actions_on_the_bound():
    policy = gaussian()
    loss = policy.bc_loss(
        state(2), torch.tensor([[[1.0, -1.0]], [[1.0, 1.0]]]), torch.ones(2, 1, dtype=bool), None
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in policy.parameters())


def test_contradictory_options_are_refused():
    with pytest.raises(ConfigError, match=r"log_std_min=3.0 must be below policy.log_std_max=2.0"):
        GaussianConfig(log_std_min=3.0)
    with pytest.raises(ConfigError, match="mean_tanh"):
        GaussianConfig(mean_tanh=True)


def test_deterministic_policy_squashes_and_scores_squared_error():
    torch.manual_seed(0)
    policy = Deterministic(DeterministicConfig(hidden=[8], horizon=2, history=3), SPEC)
    obs = state(4, 3)
    chunk, log_prob, chain = policy.sample(obs)
    assert chunk.shape == (4, 2, 2)
    assert log_prob is None
    assert chain is None
    assert chunk.abs().max() < 1
    target = torch.randn(4, 2, 2)
    mask = torch.tensor([[True, False]] * 4)
    expected = (chunk[:, 0] - target[:, 0]).square().mean()
    torch.testing.assert_close(policy.bc_loss(obs, target, mask, None), expected)
    with pytest.raises(ConfigError, match="no log-probability"):
        policy.log_prob(obs, chunk)


def test_an_observation_it_does_not_read_may_have_another_shape():
    spec = Spec({"state": ((3,), "float32"), "other": ((5,), "float32")}, 2, (-1.0, -1.0), (1.0, 1.0))
    policy = Gaussian(GaussianConfig(obs_keys=["state"]), spec)
    state = torch.randn(4, 3)
    seen = policy.act({"state": state, "other": torch.zeros(4, 5)}, deterministic=True).chunk
    assert torch.equal(
        policy.act({"state": state, "other": torch.zeros(4, 7)}, deterministic=True).chunk, seen
    )
