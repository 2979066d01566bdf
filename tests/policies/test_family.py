# SPDX-License-Identifier: Apache-2.0
"""The family of policies: encoding of the coefficient, its range, and acting at the mode of the balance model."""

import math

import pytest
import torch

from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.family import Family, FamilyConfig, encode, frequencies, rescale

SPEC = Spec({"state": ((5,), "float32")}, 2, (-1.0,) * 2, (1.0,) * 2, 100)
IQL_POLICY = {"squash": False, "mean_tanh": True, "state_std": False}
CQL_POLICY = {"squash": True, "mean_tanh": False, "state_std": True, "balance_state_std": True}


def make_family(spec, **options):
    torch.manual_seed(0)
    small = {"hidden": [16, 16], "balance_hidden": [16, 16]}
    return Family(FamilyConfig(**(small | IQL_POLICY | options)), spec)


def test_encoding_interleaves_sines_and_cosines():
    assert encode(torch.zeros(1), frequencies()).tolist() == [[0, 1, 0, 1, 0, 1]]
    code = encode(torch.tensor([2.0, 14.0]), frequencies())
    assert code.shape == (2, 6)
    expected = []
    for i in range(3):
        angle = 2.0 / 10_000 ** (2 * i / 6)
        expected += [math.sin(angle), math.cos(angle)]
    assert code[0].tolist() == pytest.approx(expected, abs=1e-6)
    other = encode(torch.tensor([2.0]), frequencies(4, 100.0))
    assert other[0].tolist() == pytest.approx(
        [math.sin(2), math.cos(2), math.sin(0.2), math.cos(0.2)], abs=1e-6
    )


def test_the_policy_honours_dimension_and_base_of_the_encoding():
    policy = make_family(SPEC, encoding_dim=4, encoding_base=100.0)
    assert policy.net[0].in_features == 5 + 4
    features, seen = torch.randn(3, 5), []
    policy.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    policy.member(features, torch.full((3,), 2.0))
    assert torch.equal(
        seen[0], torch.cat([features, encode(torch.full((3,), 2.0), frequencies(4, 100.0))], 1)
    )


def test_tanh_covers_the_range_and_no_more():
    ends = rescale(torch.tensor([-1.0, 0.0, 1.0]), 0.5, 1.5)
    assert ends.tolist() == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("options", [IQL_POLICY, CQL_POLICY])
def test_acting_takes_the_mode_of_the_balance_model(options):
    policy = make_family(SPEC, **options)
    with torch.no_grad():
        policy.balance.net[4].weight.mul_(300)
    obs = {"state": torch.randn(6, 5)}
    mean, _ = policy.balance(obs["state"])
    c = 1 + (mean.tanh() + 1) * 2
    assert c.std() > 0.05
    assert torch.allclose(policy.coefficient(obs), c)
    expected, log_std = policy.member(obs["state"], c)
    action = expected.tanh() if policy.config.squash else expected
    assert torch.allclose(policy.act(obs, deterministic=True).chunk, action.clamp(-1, 1))
    samples = [policy.sample(obs, generator=torch.Generator().manual_seed(i))[2][:, 0] for i in range(400)]
    assert torch.allclose(torch.stack(samples).std(0), log_std.exp(), rtol=0.2)


def test_frozen_evaluation_agrees_and_gives_gradients_to_the_coefficient_alone():
    policy = make_family(SPEC)
    features, c = torch.randn(8, 5), torch.rand(8, requires_grad=True)
    free, frozen = policy.member(features, c), policy.member(features, c, frozen=True)
    assert torch.equal(free[0], frozen[0])
    one = torch.autograd.grad(free[0].sum(), c)[0]
    other = torch.autograd.grad(frozen[0].sum(), [c, *policy.net.parameters()], allow_unused=True)
    assert torch.allclose(one, other[0], atol=1e-6)
    assert all(gradient is None for gradient in other[1:])


def test_ranges_and_encodings_out_of_bounds_are_refused():
    with pytest.raises(ConfigError, match=r"coefficient_low=3.0 .* 0 <= low <= high"):
        FamilyConfig(coefficient_low=3.0, coefficient_high=2.0)
    with pytest.raises(ConfigError, match="a negative coefficient would minimise Q"):
        FamilyConfig(coefficient_low=-0.5, coefficient_high=1.5)
    with pytest.raises(ConfigError, match=r"encoding_dim=5 must be even"):
        FamilyConfig(encoding_dim=5)
