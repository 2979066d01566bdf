# SPDX-License-Identifier: Apache-2.0
"""Minari and D4RL files, written by hand with h5py, so that the layout itself is pinned."""

import json

import h5py
import imageio.v3 as imageio
import numpy as np
import pytest

from robopost.data.batch import Spec
from robopost.data.convert import export_store
from robopost.data.episode import Episode
from robopost.data.formats import find_format, open_source
from robopost.data.formats.d4rl import D4RL
from robopost.data.formats.minari import Minari
from robopost.data.store import EpisodeStore
from robopost.errors import DataError

INF = float("inf")


def box(shape, dtype="float32", low=-INF, high=INF):
    return {
        "type": "Box",
        "dtype": dtype,
        "shape": list(shape),
        "low": np.full(shape, low).tolist(),
        "high": np.full(shape, high).tolist(),
    }


def goal_dataset(root):
    """Two episodes of a goal environment, as Minari stores them: T + 1 rows of observations and infos."""
    data = root / "data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for index, steps in ((0, 3), (1, 2)):
            group = file.create_group(f"episode_{index}")
            group.attrs.update({"id": index, "seed": 40 + index, "total_steps": steps})
            obs = np.arange((steps + 1) * 2, dtype=np.float64).reshape(steps + 1, 2) + 100 * index
            group["observations/observation"] = obs
            group["observations/desired_goal"] = -obs[:, :1]
            group["actions"] = np.full((steps, 2), 0.5 + index)
            group["rewards"] = np.arange(steps, dtype=np.float64)
            group["terminations"] = np.arange(steps) == (steps - 1 if index == 0 else -1)
            group["truncations"] = np.arange(steps) == (steps - 1 if index == 1 else -1)
            group["infos/success"] = np.arange(steps + 1) == (steps if index == 0 else -1)
            group["infos/qpos"] = np.arange(steps + 1, dtype=np.float64)
    space = {
        "type": "Dict",
        "subspaces": {"observation": box((2,), "float64"), "desired_goal": box((1,), "float64")},
    }
    meta = {
        "dataset_id": "toy/goal-v0",
        "observation_space": json.dumps(space),
        "action_space": json.dumps(box((2,), low=-2.0, high=3.0)),
    }
    (data / "metadata.json").write_text(json.dumps(meta))
    return root


def test_goal_dataset(tmp_path):
    path = goal_dataset(tmp_path / "toy")
    assert find_format(path).name == "minari"
    source = Minari.read(path, infos="qpos")
    assert source.spec.obs == {"desired_goal": ((1,), "float32"), "observation": ((2,), "float32")}
    assert source.spec.action_low == (-2.0, -2.0)
    assert source.spec.action_high == (3.0, 3.0)
    assert source.source == "minari toy/goal-v0"
    first, second = source.episodes
    assert first.has_final_obs
    np.testing.assert_array_equal(first.obs["observation"], [[0, 1], [2, 3], [4, 5], [6, 7]])
    np.testing.assert_array_equal(second.obs["desired_goal"], [[-100], [-102], [-104]])
    np.testing.assert_array_equal(first.reward, [0, 1, 2])
    np.testing.assert_array_equal(second.action, [[1.5, 1.5], [1.5, 1.5]])
    assert (first.terminated, first.truncated, first.success) == (True, False, True)
    assert (second.terminated, second.truncated, second.success) == (False, True, False)
    assert second.metadata == {"id": 1, "seed": 41}
    # infos row 0 belongs to the reset: the value after action t is row t + 1
    np.testing.assert_array_equal(first.extras["qpos"], [[1], [2], [3]])


def test_goal_keys_join_into_state_in_the_given_order(tmp_path):
    source = open_source(goal_dataset(tmp_path / "toy"), "auto", {"state": "observation,desired_goal"})
    assert source.spec.obs == {"state": ((3,), "float32")}
    np.testing.assert_array_equal(next(iter(source.episodes)).obs["state"][1], [2, 3, -2])


def test_jpeg_images_and_text(tmp_path):
    data = tmp_path / "img"
    data.mkdir()
    frames = np.stack([np.full((40, 48, 3), level, np.uint8) for level in (0, 90, 200)])
    encoded = [np.frombuffer(imageio.imwrite("<bytes>", f, extension=".jpeg"), np.uint8) for f in frames]
    with h5py.File(data / "main_data.hdf5", "w") as file:
        group = file.create_group("episode_0")
        cell = group.create_dataset("observations/pixels", (3,), dtype=h5py.vlen_dtype(np.uint8))
        for row, item in enumerate(encoded):
            cell[row] = item
        group.create_dataset("observations/mission", data=["go left"] * 3, dtype=h5py.string_dtype())
        group["actions"] = np.array([2, 0])  # a discrete action
        group["rewards"] = np.zeros(2)
        group["terminations"] = np.zeros(2, bool)
        group["truncations"] = np.zeros(2, bool)  # Minari lets a recording just stop
    spaces = {"pixels": box((40, 48, 3), "uint8", 0, 255), "mission": {"type": "Text", "max_length": 20}}
    meta = {"observation_space": json.dumps({"type": "Dict", "subspaces": spaces})}
    (data / "metadata.json").write_text(json.dumps(meta))
    source = Minari.read(data)
    assert source.spec.obs == {"image_pixels": ((40, 48, 3), "uint8")}
    (episode,) = source.episodes
    assert np.abs(episode.obs["image_pixels"].astype(int) - frames).max() <= 3
    assert episode.instruction == "go left"
    assert (episode.terminated, episode.truncated) == (False, True)
    np.testing.assert_array_equal(episode.action, [[2], [0]])


def make_store(path, episodes, obs, **kwargs):
    spec = Spec(obs, 2, (-1.0, -1.0), (1.0, 1.0))
    with EpisodeStore.create(path, spec=spec, fps=10, source="test", **kwargs) as store:
        for episode in episodes:
            store.append(episode)
    return EpisodeStore.open(path)


def episode(steps, seed, final=True, terminated=False, **kwargs):
    rng = np.random.default_rng(seed)
    rows = steps + final
    return Episode(
        obs={
            "state": rng.normal(size=(rows, 3)).astype(np.float32),
            "image": rng.integers(0, 256, (rows, 10, 12, 3), dtype=np.uint8),
        },
        action=rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        reward=rng.normal(size=steps).astype(np.float32),
        terminated=terminated,
        truncated=not terminated,
        has_final_obs=final,
        **kwargs,
    )


BOTH = {"state": ((3,), "float32"), "image": ((10, 12, 3), "uint8")}


def test_export_and_import_keep_everything(tmp_path):
    episodes = [
        episode(4, 0, terminated=True, success=True, instruction="push"),
        episode(3, 1, success=False),
    ]
    with make_store(tmp_path / "store", episodes, BOTH) as store:
        export_store(store, tmp_path / "out", "minari", {"dataset_id": "toy/x-v3", "author": "me"})
    meta = json.loads((tmp_path / "out" / "data" / "metadata.json").read_text())
    assert (meta["total_episodes"], meta["total_steps"], meta["dataset_id"]) == (2, 7, "toy/x-v3")
    back = list(Minari.read(tmp_path / "out").episodes)
    for ours, wanted in zip(back, episodes, strict=True):
        for key in BOTH:
            np.testing.assert_array_equal(ours.obs[key], wanted.obs[key])
        np.testing.assert_array_equal(ours.action, wanted.action)
        np.testing.assert_array_equal(ours.reward, wanted.reward)
        assert (ours.terminated, ours.truncated) == (wanted.terminated, wanted.truncated)
        assert (ours.success, ours.instruction) == (wanted.success, wanted.instruction)


def test_export_without_final_observation(tmp_path):
    """Cut: the last step goes. Terminated: the last observation is repeated, nothing bootstraps from it."""
    episodes = [episode(4, 0, final=False), episode(3, 1, final=False, terminated=True)]
    with make_store(tmp_path / "store", episodes, BOTH) as store:
        export_store(store, tmp_path / "out", "minari")
    cut, ended = Minari.read(tmp_path / "out").episodes
    assert (len(cut), len(ended)) == (3, 3)
    np.testing.assert_array_equal(cut.obs["state"], episodes[0].obs["state"])
    np.testing.assert_array_equal(cut.action, episodes[0].action[:3])
    assert cut.truncated
    np.testing.assert_array_equal(ended.obs["state"][-1], episodes[1].obs["state"][-1])
    assert ended.terminated


def test_an_episode_that_minari_cannot_hold_leaves_nothing(tmp_path):
    with (
        make_store(tmp_path / "store", [episode(1, 0, final=False)], BOTH) as store,
        pytest.raises(DataError, match="episode 0 has one step"),
    ):
        export_store(store, tmp_path / "out", "minari")
    assert not (tmp_path / "out").exists()


def flat(path, **fields):
    with h5py.File(path, "w") as file:
        for name, value in fields.items():
            file[name.replace("__", "/")] = value
    return path


def d4rl_fields(**changed):
    obs = np.arange(12, dtype=np.float32).reshape(6, 2)
    fields = {
        "observations": obs,
        "actions": np.linspace(-1, 1, 6, dtype=np.float32)[:, None],
        "rewards": np.arange(6, dtype=np.float32),
        "terminals": np.array([0, 1, 0, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 1, 0, 0], bool),
        "next_observations": obs + 50,
        "infos__qpos": np.arange(6, dtype=np.float32)[:, None] * 10,
    }
    return {key: value for key, value in (fields | changed).items() if value is not None}


def test_d4rl_cuts_at_terminals_and_timeouts(tmp_path):
    path = flat(tmp_path / "d.hdf5", **d4rl_fields())
    assert find_format(path).name == "d4rl"
    source = D4RL.read(path, infos="qpos", action_limit=1)
    assert (source.count, source.spec.action_low) == (3, (-1.0,))
    ended, cut, rest = source.episodes
    assert [len(e) for e in (ended, cut, rest)] == [2, 2, 2]
    assert [(e.terminated, e.truncated) for e in (ended, cut, rest)] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    # the final observation is the last next_observation, never the first row of the next episode
    np.testing.assert_array_equal(cut.obs["state"], [[4, 5], [6, 7], [56, 57]])
    np.testing.assert_array_equal(rest.extras["qpos"], [[40], [50]])
    np.testing.assert_array_equal(cut.reward, [2, 3])


def test_d4rl_without_next_observations_has_no_final_observation(tmp_path):
    source = D4RL.read(flat(tmp_path / "d.hdf5", **d4rl_fields(next_observations=None)))
    lengths = [(len(e), len(e.obs["state"]), e.has_final_obs) for e in source.episodes]
    assert lengths == [(2, 2, False)] * 3


def test_d4rl_without_timeouts_finds_jumps(tmp_path):
    obs = np.array([[0.0], [1], [2], [10], [11], [12]], np.float32)
    after = np.array([[1.0], [2], [3], [11], [12], [13]], np.float32)
    fields = d4rl_fields(
        observations=obs, next_observations=after, timeouts=None, terminals=np.zeros(6, bool)
    )
    source = D4RL.read(flat(tmp_path / "d.hdf5", **fields))
    assert [len(e) for e in source.episodes] == [3, 3]
    assert "jumps" in source.metadata["episode_ends_from"]


def test_d4rl_with_terminals_only_says_so(tmp_path):
    fields = d4rl_fields(next_observations=None, timeouts=None)
    source = D4RL.read(flat(tmp_path / "d.hdf5", **fields))
    assert [len(e) for e in source.episodes] == [2, 4]
    assert "may be joined" in source.metadata["episode_ends_from"]


def cut_short(tmp_path):
    path = flat(tmp_path / "d.hdf5", **d4rl_fields())
    path.write_bytes(path.read_bytes()[:600])
    return path


def short_rewards(tmp_path):
    return flat(tmp_path / "d.hdf5", **d4rl_fields(rewards=np.zeros(5)))


def torn_metadata(tmp_path):
    path = goal_dataset(tmp_path / "toy")
    (path / "data" / "metadata.json").write_text('{"observation_space": ')
    return path


def lost_rewards(tmp_path):
    path = goal_dataset(tmp_path / "toy")
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1/rewards"]
    return path


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (cut_short, {}, "does not open as HDF5.*cut short"),
        (short_rewards, {}, "rewards has 5 rows and actions 6"),
        (torn_metadata, {}, r"metadata.json is torn"),
        (lost_rewards, {}, "episode_1.*rewards"),
        (lambda p: goal_dataset(p / "toy"), {"infos": "qposs"}, "Did you mean 'qpos'"),
        (lambda p: goal_dataset(p / "toy"), {"state": "observations"}, "Did you mean 'observation'"),
        (lambda p: goal_dataset(p / "toy"), {"stat": "x"}, "unknown option 'stat'. Did you mean 'state'"),
        (lambda p: goal_dataset(p / "toy"), {"action_limit": -1}, "action_limit=-1"),
    ],
)
def test_bad_files_and_options(tmp_path, make, options, text):
    with pytest.raises(DataError, match=text) as caught:
        list(open_source(make(tmp_path), "auto", options).episodes)
    assert "\n" not in str(caught.value)
