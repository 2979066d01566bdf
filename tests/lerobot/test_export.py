# SPDX-License-Identifier: Apache-2.0
"""Stores exported as LeRobotDataset v3.0, read back by the lerobot package and by our own reader."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from robopost.data.batch import Spec
from robopost.data.episode import Episode
from robopost.data.formats.lerobot import LeRobot
from robopost.data.store import EpisodeStore

FPS = 20
LENGTHS = (9, 14, 5)
TASKS = ("push the red cube", "push the blue cube", "push the red cube")
SIZE = (64, 96)


def picture(episode, step, camera):
    """A smooth image (video codecs keep it) whose brightness says which frame it is."""
    height, width = SIZE
    ramp = np.linspace(0, 60, width)[None, :, None] + np.zeros((height, width, 3))
    ramp += 12 * step + 8 * episode + 20 * camera
    ramp[..., camera] += 20
    return ramp.clip(0, 255).astype(np.uint8)


def episodes():
    rng = np.random.default_rng(7)
    for index, (steps, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
        yield Episode(
            obs={
                "state": rng.normal(size=(steps + 1, 4)).astype(np.float32),
                "environment_state": rng.normal(size=(steps + 1, 3)).astype(np.float32),
                "image_top": np.stack([picture(index, t, 0) for t in range(steps + 1)]),
                "image_wrist": np.stack([picture(index, t, 1) for t in range(steps + 1)]),
            },
            action=rng.uniform(-1, 1, size=(steps, 2)).astype(np.float32),
            reward=rng.normal(size=steps).astype(np.float32),
            terminated=index == 0,
            truncated=index != 0,
            success=index == 0,
            instruction=task,
            extras={"force": rng.normal(size=(steps, 1)).astype(np.float32)},
        )


@pytest.fixture
def store(tmp_path):
    images = {f"image_{name}": ((*SIZE, 3), "uint8") for name in ("top", "wrist")}
    obs = {"state": ((4,), "float32"), "environment_state": ((3,), "float32"), **images}
    spec = Spec(obs, 2, (-1.0, -1.0), (1.0, 1.0))
    extras = {"force": ((1,), "float32")}
    with EpisodeStore.create(
        tmp_path / "store.zarr", spec=spec, fps=FPS, source="test", extras=extras
    ) as made:
        for episode in episodes():
            made.append(episode)
    with EpisodeStore.open(tmp_path / "store.zarr") as opened:
        yield opened


def compare_with_lerobot(root: Path, image_tolerance: float):
    dataset = LeRobotDataset("local/out", root=root, video_backend="pyav")
    assert dataset.meta.info["codebase_version"] == "v3.0"
    assert dataset.fps == FPS
    assert dataset.num_episodes == len(LENGTHS)
    assert dataset.num_frames == sum(LENGTHS)
    row = 0
    for index, episode in enumerate(episodes()):
        for step in range(len(episode)):
            frame = dataset[row]
            assert frame["episode_index"].item() == index
            assert frame["frame_index"].item() == step
            assert frame["timestamp"].item() == pytest.approx(step / FPS, abs=1e-6)
            assert frame["task"] == episode.instruction
            np.testing.assert_array_equal(frame["observation.state"], episode.obs["state"][step])
            np.testing.assert_array_equal(
                frame["observation.environment_state"], episode.obs["environment_state"][step]
            )
            np.testing.assert_array_equal(frame["action"], episode.action[step])
            assert frame["next.reward"].item() == episode.reward[step]
            last = step == len(episode) - 1
            assert frame["next.done"].item() == (last and episode.terminated)
            assert frame["next.success"].item() == (last and episode.success)
            assert frame["force"].item() == episode.extras["force"][step, 0]
            for camera in ("top", "wrist"):
                shown = frame[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255
                wanted = episode.obs[f"image_{camera}"][step].astype(float)
                assert np.abs(shown - wanted).mean() <= image_tolerance, (row, camera)
            row += 1


def compare_with_ours(root: Path, image_tolerance: float):
    source = LeRobot.read(root)
    assert (source.fps, source.count) == (FPS, len(LENGTHS))
    assert (source.spec.action_low, source.spec.action_high) == ((-1.0, -1.0), (1.0, 1.0))
    assert sorted(path.name for path in root.iterdir() if path.name != "images") == ["data", "meta"] + (
        ["videos"] if any(root.rglob("*.mp4")) else []
    )
    found = list(source.episodes)
    assert len(found) == len(LENGTHS)
    for ours, wanted in zip(found, episodes(), strict=True):
        steps = len(wanted)
        assert len(ours) == steps
        assert not ours.has_final_obs
        assert (ours.terminated, ours.truncated) == (wanted.terminated, wanted.truncated)
        assert (ours.success, ours.instruction) == (wanted.success, wanted.instruction)
        for key in ("state", "environment_state"):
            np.testing.assert_array_equal(ours.obs[key], wanted.obs[key][:steps])
        np.testing.assert_array_equal(ours.action, wanted.action)
        np.testing.assert_array_equal(ours.reward, wanted.reward)
        np.testing.assert_array_equal(ours.extras["force"], wanted.extras["force"])
        np.testing.assert_allclose(ours.extras["timestamp"], np.arange(steps) / FPS, atol=1e-6)
        for key in ("image_top", "image_wrist"):
            error = np.abs(ours.obs[key].astype(float) - wanted.obs[key][:steps]).mean(axis=(1, 2, 3))
            assert error.max() <= image_tolerance, key
    assert [str(problem) for problem in LeRobot.verify(root)] == []


@pytest.mark.parametrize("codec", ["libsvtav1", "h264"])
def test_video_export_reads_back_in_lerobot_and_here(store, tmp_path, codec):
    # A frame off by one differs by 12 grey levels: the tolerance is below half of that.
    LeRobot.write(store, tmp_path / "out", codec=codec)
    compare_with_lerobot(tmp_path / "out", image_tolerance=4.0)
    compare_with_ours(tmp_path / "out", image_tolerance=4.0)


def test_image_export_is_lossless(store, tmp_path):
    LeRobot.write(store, tmp_path / "out", video=False)
    assert not list((tmp_path / "out").rglob("*.mp4"))
    compare_with_lerobot(tmp_path / "out", image_tolerance=1e-4)
    compare_with_ours(tmp_path / "out", image_tolerance=0.0)


def test_export_through_a_named_interpreter_is_the_same(store, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBOPOST_LEROBOT_PYTHON", sys.executable)
    LeRobot.write(store, tmp_path / "out", video=False)
    compare_with_lerobot(tmp_path / "out", image_tolerance=1e-4)


def test_lerobot_reads_a_window_of_actions(store, tmp_path):
    LeRobot.write(store, tmp_path / "out", video=False)
    dataset = LeRobotDataset("local/out", root=tmp_path / "out", delta_timestamps={"action": [0.0, 1 / FPS]})
    first = next(episodes())
    np.testing.assert_array_equal(dataset[0]["action"], first.action[:2])
    assert dataset[len(first) - 1]["action_is_pad"].tolist() == [False, True]


def test_statistics_of_lerobot_match_the_store(store, tmp_path):
    LeRobot.write(store, tmp_path / "out", video=False)
    stats = LeRobotDataset("local/out", root=tmp_path / "out").meta.stats
    for key, ours in (("observation.state", "state"), ("action", "action")):
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(stats[key][name], store.stats()[ours][name], rtol=1e-4, atol=1e-5)


def test_a_second_import_through_the_store_keeps_everything(store, tmp_path):
    from robopost.data.convert import import_source

    LeRobot.write(store, tmp_path / "out", video=False)
    with import_source(LeRobot.read(tmp_path / "out"), tmp_path / "back.zarr") as back:
        assert back.num_steps == store.num_steps
        assert [info["instruction"] for info in back.episode_info] == list(TASKS)
        np.testing.assert_array_equal(
            back.episode(1).obs["image_top"], store.episode(1).obs["image_top"][:-1]
        )


DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
G1 = DATA / "g1_inspire_real_lerobot_v21"


@pytest.mark.skipif(not G1.exists(), reason=f"real data not found: {G1} (ROBOPOST_TEST_DATA)")
def test_a_real_v21_recording_becomes_v3(tmp_path):
    from robopost.data.convert import import_source

    source = LeRobot.read(G1, video_dir="videos_128x96", episodes="29,30")
    with import_source(source, tmp_path / "g1.zarr") as store:
        LeRobot.write(store, tmp_path / "g1", codec="h264")
        dataset = LeRobotDataset("local/g1", root=tmp_path / "g1", video_backend="pyav")
        assert (dataset.num_episodes, dataset.num_frames) == (2, store.num_steps)
        assert dataset.meta.robot_type == "Unitree_G1_Inspire"
        assert len(dataset.features["observation.state"]["names"][0]) == 26
        for index, episode in enumerate(store):
            start = int(store.episode_ends[index - 1]) if index else 0
            for step in (0, len(episode) // 2, len(episode) - 1):
                frame = dataset[start + step]
                np.testing.assert_array_equal(frame["observation.state"], episode.obs["state"][step])
                np.testing.assert_array_equal(frame["action"], episode.action[step])
                assert frame["task"] == "Pick up the yellow bottle on the table."
                shown = frame["observation.images.cam_high"].numpy().transpose(1, 2, 0) * 255
                assert np.abs(shown - episode.obs["image_cam_high"][step]).mean() < 6
        for ours, wanted in zip(LeRobot.read(tmp_path / "g1").episodes, store, strict=True):
            np.testing.assert_array_equal(ours.obs["state"], wanted.obs["state"])
            error = np.abs(ours.obs["image_cam_high"].astype(int) - wanted.obs["image_cam_high"])
            assert error.mean(axis=(1, 2, 3)).max() < 6
