# SPDX-License-Identifier: Apache-2.0
"""Minari datasets exchanged with the minari package, both ways."""

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from robopost.data.batch import Spec
from robopost.data.convert import export_store
from robopost.data.episode import Episode
from robopost.data.formats import find_format, open_source
from robopost.data.store import EpisodeStore

LENGTHS = (5, 3)


def episodes(image):
    rng = np.random.default_rng(3)
    for index, steps in enumerate(LENGTHS):
        obs = {"state": rng.normal(size=(steps + 1, 3)).astype(np.float32)}
        if image:
            obs["image"] = rng.integers(0, 256, (steps + 1, 40, 48, 3), dtype=np.uint8)
        action = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
        reward = rng.normal(size=steps).astype(np.float32)
        yield Episode(obs, action, reward, index == 0, index != 0, success=index == 0)


@pytest.mark.parametrize("image", [False, True])
def test_minari_loads_what_we_write(tmp_path, monkeypatch, image):
    obs = {"state": ((3,), "float32"), **({"image": ((40, 48, 3), "uint8")} if image else {})}
    spec = Spec(obs, 2, (-1.0, -1.0), (1.0, float("inf")))
    with EpisodeStore.create(tmp_path / "store", spec=spec, fps=10, source="test") as store:
        for episode in episodes(image):
            store.append(episode)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "home"))
    with EpisodeStore.open(tmp_path / "store") as store:
        export_store(store, tmp_path / "home/toy/push-v2", "minari", {"dataset_id": "toy/push-v2"})
    dataset = minari.load_dataset("toy/push-v2")
    assert (dataset.total_episodes, dataset.total_steps) == (2, 8)
    assert dataset.action_space == gym.spaces.Box(
        np.array([-1, -1], np.float32), np.array([1, np.inf], np.float32)
    )
    for theirs, ours in zip(dataset.iterate_episodes(), episodes(image), strict=True):
        seen = theirs.observations if image else {"state": theirs.observations}
        assert set(seen) == set(ours.obs)
        for key, value in seen.items():
            np.testing.assert_array_equal(value, ours.obs[key])
        np.testing.assert_array_equal(theirs.actions, ours.action)
        np.testing.assert_array_equal(theirs.rewards, ours.reward)
        assert (theirs.terminations[-1], theirs.truncations[-1]) == (ours.terminated, ours.truncated)
        assert not theirs.terminations[:-1].any()
        assert bool(theirs.infos["success"][-1]) == ours.success


def test_we_read_what_minari_writes(tmp_path):
    space = gym.spaces.Dict(
        pixels=gym.spaces.Box(0, 255, (40, 48, 3), np.uint8),
        pose=gym.spaces.Box(-1, 1, (2,), np.float64),
        mission=gym.spaces.Text(20),
    )
    storage = MinariStorage.new(tmp_path / "data", space, gym.spaces.Box(-2, 2, (1,), np.float32))
    smooth = np.linspace(0, 200, 48, dtype=np.uint8)[None, :, None] + np.zeros((40, 48, 3), np.uint8)
    wanted = []
    for index, steps in enumerate(LENGTHS):
        pose = np.random.default_rng(index).uniform(-1, 1, (steps + 1, 2))
        obs = {
            "pixels": [smooth + t for t in range(steps + 1)],
            "pose": list(pose),
            "mission": ["go to the door"] * (steps + 1),
        }
        actions = [np.array([t / 10], np.float32) for t in range(steps)]
        last = [t == steps - 1 for t in range(steps)]
        none = [False] * steps
        flags = (last, none) if index == 0 else (none, last)
        buffer = EpisodeBuffer(
            index, 70 + index, None, obs, actions, [float(t) for t in range(steps)], *flags, None
        )
        storage.update_episodes([buffer])
        wanted.append((pose, actions))
    assert find_format(tmp_path / "data").name == "minari"
    source = open_source(tmp_path / "data")
    assert source.spec.obs == {"image_pixels": ((40, 48, 3), "uint8"), "pose": ((2,), "float32")}
    assert (source.spec.action_low, source.spec.action_high) == ((-2.0,), (2.0,))
    found = list(source.episodes)
    for index, (episode, (pose, actions)) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_array_equal(episode.obs["pose"], pose.astype(np.float32))
        np.testing.assert_array_equal(episode.action, np.stack(actions))
        expected = np.stack([smooth + t for t in range(len(pose))])
        assert np.abs(episode.obs["image_pixels"].astype(int) - expected).mean() < 2  # Minari's own JPEG
        assert (episode.terminated, episode.truncated) == (index == 0, index != 0)
        assert episode.metadata["seed"] == 70 + index
        assert episode.instruction == "go to the door"
