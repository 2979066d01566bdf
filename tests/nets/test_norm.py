# SPDX-License-Identifier: Apache-2.0
import hashlib

import numpy as np
import pytest
import torch

from robopost.data.batch import Spec
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.errors import ConfigError
from robopost.nets.norm import ACTION_MODES, Normaliser

SPEC = Spec({"state": ((2,), "float32")}, 3, (-5.0,) * 3, (5.0,) * 3)
ACTION = {
    "mean": [0.5, -1.0, 0.0],
    "std": [2.0, 0.5, 1.0],
    "min": [-3.0, -2.0, 0.0],
    "max": [4.0, 1.0, 1.0],
    "q01": [-1.0, -2.0, 0.1],
    "q99": [3.0, 2.0, 0.9],
    "count": 7,
}


def fitted(action="quantile", **changes):
    normaliser = Normaliser(SPEC)
    normaliser.fit({"action": ACTION | changes}, obs="identity", action=action)
    return normaliser


def test_quantiles_map_to_the_ends_and_masked_dims_stay():
    plain, masked = fitted(), fitted(mask=[True, True, False])
    ends = torch.tensor([[-1.0, -2.0, 0.1], [3.0, 2.0, 0.9], [1.0, 0.0, 0.5]])
    torch.testing.assert_close(plain.action(ends), torch.tensor([[-1.0] * 3, [1.0] * 3, [0.0] * 3]))
    got = masked.action(ends)
    torch.testing.assert_close(got[:, :2], plain.action(ends)[:, :2])
    assert torch.equal(got[:, 2], ends[:, 2])
    # The published form: a = .5 (x + 1) (q99 - q01) + q01 where the mask is true.
    x = torch.tensor([[0.3, -0.7, 0.25]])
    low, high = torch.tensor(ACTION["q01"]), torch.tensor(ACTION["q99"])
    want = torch.where(torch.tensor([True, True, False]), 0.5 * (x + 1) * (high - low) + low, x)
    torch.testing.assert_close(masked.unnormalise_action(x), want)


@pytest.mark.parametrize("mode", ACTION_MODES)
def test_every_mode_goes_there_and_back(mode):
    normaliser = fitted(mode)
    action = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(normaliser.unnormalise_action(normaliser.action(action)), action)


def test_missing_quantiles_are_said():
    short = {key: value for key, value in ACTION.items() if not key.startswith("q")}
    with pytest.raises(ConfigError, match="'q01'"):
        Normaliser(SPEC).fit({"action": short}, obs="identity", action="quantile")


def test_a_dataset_brings_quantiles_when_asked():
    actions = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    episode = Episode(
        obs={"state": np.zeros((501, 2), np.float32)},
        action=actions,
        reward=np.zeros(500, np.float32),
        terminated=False,
        truncated=True,
    )
    dataset = Dataset.from_episodes([episode], SPEC)
    assert dataset.stats_for("bounds") is dataset.stats
    stats = dataset.stats_for("quantile")["action"]
    np.testing.assert_allclose(stats["q01"], np.quantile(actions, 0.01, axis=0), rtol=1e-5)
    normaliser = Normaliser(SPEC)
    normaliser.fit(dataset.stats_for("quantile"), obs="identity", action="quantile")
    inside = (normaliser.action(torch.from_numpy(actions)).abs() <= 1).float().mean()
    assert 0.975 <= inside <= 0.985


def test_fingerprints_tell_maps_apart_and_nothing_else():
    first, same = fitted(), fitted()
    assert first.fingerprint() == same.fingerprint()
    assert len(first.fingerprint()) == len(hashlib.sha256().hexdigest())
    same.provenance = {"source": "elsewhere"}
    same.to(torch.float64)
    assert first.fingerprint() == same.fingerprint()
    assert first.fingerprint() != fitted("minmax").fingerprint()
    assert first.fingerprint() != fitted(mask=[True, True, False]).fingerprint()
    same.obs_shift_state[0] += 1e-3
    assert first.fingerprint() != same.fingerprint()
    zero, negative = fitted("bounds"), fitted("bounds")
    negative.action_shift.mul_(-1.0)  # -0 is 0
    assert zero.fingerprint() == negative.fingerprint()
