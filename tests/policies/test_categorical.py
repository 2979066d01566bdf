# SPDX-License-Identifier: Apache-2.0
"""The softmax policy: probabilities as torch's own, samples as often as they should be, a way through a checkpoint."""

import pytest
import torch
from torch.distributions import Categorical as Reference
from torch.distributions import kl_divergence

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.categorical import Categorical, CategoricalConfig
from robopost.policies.gaussian import Gaussian, GaussianConfig

SPEC = Spec({"state": ((3,), "float32")}, 1, (0.0,), (4.0,), 100, 5)


def categorical(seed=0, **options):
    torch.manual_seed(seed)
    policy = Categorical(CategoricalConfig(**({"hidden": [8], "init": "default"} | options)), SPEC)
    with torch.no_grad():
        policy.net[-1].weight.mul_(5)
    return policy


def test_probabilities_entropy_and_divergence_equal_torch_distributions():
    policy, other = categorical(0), categorical(1)
    obs = {"state": torch.randn(7, 3)}
    ours, theirs = (Reference(logits=p.net(obs["state"])) for p in (policy, other))
    index = torch.arange(7) % 5
    chain = index.float().view(7, 1, 1, 1)
    torch.testing.assert_close(policy.log_prob(obs, chain), ours.log_prob(index))
    torch.testing.assert_close(policy.entropy(obs), ours.entropy())
    found = policy.divergence(policy.distribution(obs), other.distribution(obs))
    torch.testing.assert_close(found, kl_divergence(ours, theirs))


def test_gaussian_divergence_equals_torch_distributions():
    from torch.distributions import Normal

    spec = Spec({"state": ((3,), "float32")}, 2, (-1.0,) * 2, (1.0,) * 2, 100)
    torch.manual_seed(0)
    first, second = (
        Gaussian(GaussianConfig(hidden=[8]), spec).distribution({"state": torch.randn(6, 3)}) for _ in "ab"
    )
    pair = [Normal(mean, log_std.exp()) for mean, log_std in (first, second)]
    torch.testing.assert_close(Gaussian.divergence(first, second), kl_divergence(*pair).sum((1, 2)))


def test_samples_come_as_often_as_their_probability_and_the_mode_is_the_likeliest():
    policy = categorical()
    obs = {"state": torch.randn(1, 3).expand(20_000, 3)}
    action = policy.act(obs, generator=torch.Generator().manual_seed(0))
    assert action.chunk.shape == (20_000, 1, 1)
    assert action.chain.shape == (20_000, 1, 1, 1)
    torch.testing.assert_close(action.chunk[:, 0, 0], action.chain[:, 0, 0, 0])
    torch.testing.assert_close(action.log_prob, policy.log_prob(obs, action.chain))
    share = torch.bincount(action.chain.flatten().long(), minlength=5) / 20_000
    probs = policy.distribution(obs)[0][0].exp()
    assert (share - probs).abs().max() < 0.015
    again = policy.act(obs, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.chain, action.chain)
    assert (policy.act(obs, deterministic=True).chunk == probs.argmax()).all()


def test_checkpoint_keeps_the_number_of_choices(tmp_path):
    policy = categorical()
    save_folder(tmp_path / "policy", policy_files(policy))
    loaded = load_policy(tmp_path / "policy")
    assert loaded.spec == SPEC
    obs = {"state": torch.randn(4, 3)}
    assert torch.equal(loaded.distribution(obs)[0], policy.distribution(obs)[0])


def test_policies_and_actions_that_do_not_fit_are_refused():
    box = Spec({"state": ((3,), "float32")}, 2, (-1.0,) * 2, (1.0,) * 2, 100)
    with pytest.raises(
        ConfigError, match=r"policy=categorical can't act.*2 continuous actions. Fix: policy=gaussian"
    ):
        Categorical(CategoricalConfig(), box)
    with pytest.raises(
        ConfigError, match=r"policy=gaussian can't act.*5 discrete actions. Fix: policy=categorical"
    ):
        Gaussian(GaussianConfig(), SPEC)
    with pytest.raises(ConfigError, match=r"policy.horizon=4 must be 1"):
        Categorical(CategoricalConfig(horizon=4), SPEC)
