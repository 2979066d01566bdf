# SPDX-License-Identifier: Apache-2.0
"""OGBench files, written by hand in the three layouts that are around."""

import numpy as np
import pytest

from robopost.config import DataConfig
from robopost.data.dataset import Dataset
from robopost.data.formats import find_format, open_source
from robopost.data.formats.ogbench import OGBench
from robopost.data.verify import verify
from robopost.errors import DataError

STATES = np.array([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [3, 1]], np.float32)  # [step, trajectory]
ACTIONS = np.array([0.1, 0.2, 9.0, 0.4, 0.5, 0.6, 9.0], np.float32)[:, None]  # 9: leads nowhere
LAST = np.array([0, 0, 1, 0, 0, 0, 1], np.float32)


def published(path, **changed):
    """Two trajectories of 2 and 3 steps as they are published: T + 1 rows each."""
    arrays = {"observations": STATES, "actions": ACTIONS, "terminals": LAST, "qpos": STATES[:, :1] * 10}
    np.savez(path, **{key: value for key, value in (arrays | changed).items() if value is not None})
    return path


def compact(path):
    """As `load_dataset(compact_dataset=True)` returns it."""
    return published(path, valids=1 - LAST, terminals=np.minimum(LAST + np.append(LAST[1:], 1), 1))


def regular(path):
    """As `load_dataset()` returns it: one row per step."""
    keep = LAST == 0
    after = np.append(False, keep[:-1])
    return published(
        path,
        observations=STATES[keep],
        next_observations=STATES[after],
        actions=ACTIONS[keep],
        terminals=np.append(LAST[1:], 1)[keep],
        qpos=None,
    )


@pytest.mark.parametrize("layout", [published, compact, regular])
def test_all_layouts_give_the_same_episodes(tmp_path, layout):
    path = layout(tmp_path / "cube.npz")
    assert find_format(path).name == "ogbench"
    source = open_source(path)
    first, second = source.episodes
    np.testing.assert_array_equal(first.obs["state"], STATES[:3])
    np.testing.assert_array_equal(second.obs["state"], STATES[3:])
    np.testing.assert_array_equal(first.action, ACTIONS[:2])
    np.testing.assert_array_equal(second.action, ACTIONS[3:6])
    assert not second.reward.any()
    assert "zeros" in source.metadata["rewards"]
    assert [(item.terminated, item.truncated) for item in (first, second)] == [(False, True)] * 2
    assert (source.count, source.spec.action_low) == (2, (-1.0,))


def test_masks_end_an_episode_where_the_task_is_over(tmp_path):
    masks, rewards = np.ones(7), np.full(7, -1.0)
    masks[4] = rewards[4] = 0
    first, second, third = OGBench.read(published(tmp_path / "a.npz", masks=masks, rewards=rewards)).episodes
    assert [item.terminated for item in (first, second, third)] == [False, True, False]
    np.testing.assert_array_equal(second.obs["state"], STATES[3:6])
    np.testing.assert_array_equal(second.reward, [-1, 0])
    np.testing.assert_array_equal(third.obs["state"], STATES[5:])


def test_extras_and_bounds(tmp_path):
    source = open_source(published(tmp_path / "a.npz"), "ogbench", {"infos": "qpos", "action_limit": 0})
    assert source.extras == {"qpos": ((1,), "float32")}
    assert not source.spec.bounded
    np.testing.assert_array_equal(next(iter(source.episodes)).extras["qpos"], [[0], [10]])
    with pytest.raises(DataError, match=r"unknown array 'qvel'.*qpos"):
        OGBench.read(published(tmp_path / "a.npz"), infos="qvel")


def test_images(tmp_path):
    pixels = np.arange(7 * 8 * 8 * 3).reshape(7, 8, 8, 3).astype(np.uint8)
    source = OGBench.read(published(tmp_path / "visual.npz", observations=pixels))
    assert source.spec.obs == {"image": ((8, 8, 3), "uint8")}
    np.testing.assert_array_equal(next(iter(source.episodes)).obs["image"], pixels[:3])


def test_training_reads_it(tmp_path):
    dataset = Dataset.load(DataConfig(path=str(published(tmp_path / "a.npz"))), device="cpu")
    assert len(dataset) == 5
    assert not [item for item in verify(tmp_path / "a.npz") if item.severity == "error"]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"terminals": np.zeros(7)}, "the last row is a step without the state that follows"),
        ({"observations": STATES[:6]}, "observations has 6 rows and actions 7"),
        ({"terminals": None}, "lacks terminals"),
    ],
)
def test_bad_files(tmp_path, changed, text):
    with pytest.raises(DataError, match=text):
        open_source(published(tmp_path / "a.npz", **changed), "ogbench")


def test_a_file_cut_short(tmp_path):
    path = published(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="does not open as npz"):
        open_source(path, "ogbench")
