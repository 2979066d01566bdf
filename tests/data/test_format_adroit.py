# SPDX-License-Identifier: Apache-2.0
"""Human Adroit demonstrations: a small file made here, and the real door set."""

import os
from pathlib import Path

import numpy as np
import pytest

from robopost.data.formats import find_format, open_source
from robopost.data.formats.adroit import Adroit
from robopost.data.verify import verify
from robopost.errors import DataError

DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
DOOR = DATA / "adroit" / "door_human_demos.npz"


def demos(path, **changed):
    arrays = {
        "observations": np.arange(10.0).reshape(5, 2),
        "actions": np.array([[0.5], [1.4], [-2.0], [0.0], [1.0]]),
        "rewards": np.arange(5.0),
        "episode_ends": np.array([2, 5]),
        "init_qpos": np.array([[1.0, 2.0], [3.0, 4.0]]),
    }
    np.savez(path, **{k: v for k, v in (arrays | changed).items() if v is not None})
    return path


def test_read(tmp_path):
    path = demos(tmp_path / "d.npz")
    assert find_format(path).name == "adroit"
    source = Adroit.read(path)
    first, second = source.episodes
    np.testing.assert_array_equal(second.obs["state"], [[4, 5], [6, 7], [8, 9]])
    np.testing.assert_array_equal(first.action, [[0.5], [1.0]])  # clipped, as the environment clips
    np.testing.assert_array_equal(second.action, [[-1.0], [0.0], [1.0]])
    assert source.metadata["steps_with_clipped_actions"] == 0.4
    assert second.metadata == {"init_qpos": [3.0, 4.0]}
    assert (first.terminated, first.truncated, first.has_final_obs) == (False, True, False)


def test_no_limit_keeps_actions_as_recorded(tmp_path):
    source = Adroit.read(demos(tmp_path / "d.npz"), action_limit=0)
    assert not source.spec.bounded
    assert next(iter(source.episodes)).action[1, 0] == np.float32(1.4)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"episode_ends": np.array([2, 6])}, "episode_ends must rise to 5"),
        ({"episode_ends": np.array([3, 2, 5])}, "episode_ends must rise to 5"),
        ({"rewards": np.zeros(4)}, "rewards has 4 rows and actions 5"),
        ({"observations": None}, "lacks observations"),
    ],
)
def test_bad_files(tmp_path, changed, text):
    with pytest.raises(DataError, match=text):
        open_source(demos(tmp_path / "d.npz", **changed), "adroit")


def test_a_file_cut_short(tmp_path):
    path = demos(tmp_path / "d.npz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="does not open as npz"):
        open_source(path, "adroit")


@pytest.mark.skipif(not DOOR.exists(), reason=f"real data not found: {DOOR} (ROBOPOST_TEST_DATA)")
def test_real_door_demonstrations():
    raw = np.load(DOOR)
    source = open_source(DOOR)
    found = list(source.episodes)
    assert source.spec.obs == {"state": ((39,), "float32")}
    assert (len(found), sum(map(len, found)), source.spec.action_dim) == (25, 6729, 28)
    start = raw["episode_ends"][9]
    np.testing.assert_array_equal(found[10].obs["state"][7], raw["observations"][start + 7])
    np.testing.assert_array_equal(found[10].action[7], np.clip(raw["actions"][start + 7], -1, 1))
    assert found[10].metadata["init_qpos"] == raw["init_qpos"][10].tolist()
    assert sum(e.reward.sum() for e in found) == pytest.approx(raw["rewards"].sum(), rel=1e-5)
    assert verify(DOOR) == []
