# SPDX-License-Identifier: Apache-2.0
"""Two recorded LeRobot sets: a real Unitree G1 (v2.1) and a simulated GR-1 (v2.0)."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from robopost.data.convert import import_source
from robopost.data.formats.lerobot import LeRobot
from robopost.data.verify import verify
from robopost.errors import DataError

DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
G1 = DATA / "g1_inspire_real_lerobot_v21"
GR00T = DATA / "gr00t_sim_gr1_picknplace_lerobot_v20"


@pytest.mark.skipif(not G1.exists(), reason=f"real data not found: {G1} (ROBOPOST_TEST_DATA)")
class TestRealG1:
    def test_tables(self, tmp_path):
        with import_source(LeRobot.read(G1, cameras="none"), tmp_path / "g1") as store:
            assert (len(store), store.num_steps, store.fps) == (100, 35_965, 30.0)
            assert store.spec.obs == {"state": ((26,), "float32")}
            assert store.spec.action_dim == 26
            for index in (0, 41, 99):
                raw = pq.read_table(G1 / f"data/chunk-000/episode_{index:06d}.parquet")
                episode = store.episode(index)
                for ours, name in ((episode.obs["state"], "observation.state"), (episode.action, "action")):
                    np.testing.assert_array_equal(ours, np.array(raw.column(name).to_pylist(), np.float32))
                assert episode.instruction == "Pick up the yellow bottle on the table."
                assert (episode.terminated, episode.truncated, episode.success) == (False, True, None)
            assert store.metadata["robot"] == "Unitree_G1_Inspire"

    def test_videos(self):
        small = LeRobot.read(G1, video_dir="videos_128x96", episodes="29,30")
        assert small.spec.obs["image_cam_high"] == ((96, 128, 3), "uint8")
        found = list(small.episodes)
        assert [e.obs["image_cam_high"].shape[0] for e in found] == [len(e) for e in found]
        # the original AV1 recording, scaled here, shows the same as the small H.264 copy
        (original,) = LeRobot.read(G1, resize="96x128", episodes="29").episodes
        error = original.obs["image_cam_high"][::20].astype(int) - found[0].obs["image_cam_high"][::20]
        assert np.abs(error).mean() < 6
        shifted = (
            original.obs["image_cam_high"][:-30:20].astype(int)
            - found[0].obs["image_cam_high"][30::20][: len(error)]
        )
        assert np.abs(error).mean() < np.abs(shifted).mean()

    def test_missing_videos_are_named(self):
        found = [p for p in verify(G1, options={"video_dir": "videos_128x96"}) if p.severity == "error"]
        missing = [p.where for p in found if "missing video" in p.what]
        assert missing == [f"episode {i}, key 'image_cam_high'" for i in (0, 3, 6, 9, 47, 58, 61)]
        assert len(found) == len(missing)
        with pytest.raises(DataError, match=r"7 of 100 episodes \(0, 3, 6, 9, 47, 58, 61\)"):
            LeRobot.read(G1, video_dir="videos_128x96")
        assert LeRobot.read(G1, video_dir="videos_128x96", missing_video="skip").count == 93


@pytest.mark.skipif(not GR00T.exists(), reason=f"real data not found: {GR00T} (ROBOPOST_TEST_DATA)")
class TestRealGr00t:
    def test_read(self, tmp_path):
        with import_source(LeRobot.read(GR00T, cameras="ego_view", resize="64x64"), tmp_path / "s") as store:
            assert (len(store), store.num_steps, store.fps) == (5, 2096, 20.0)
            assert store.spec.obs == {"state": ((44,), "float32"), "image_ego_view": ((64, 64, 3), "uint8")}
            assert store.metadata["modality"]["state"]["right_arm"] == {"start": 22, "end": 29}
            # the frame's task, not the "valid" that meta/episodes lists beside it
            texts = [info["instruction"] for info in store.episode_info]
            assert texts[0] == "pick the pear from the counter and place it in the plate"
            assert "valid" not in texts
            raw = pq.read_table(GR00T / "data/chunk-000/episode_000003.parquet")
            episode = store.episode(3)
            state = np.array(raw.column("observation.state").to_pylist(), np.float32)
            np.testing.assert_array_equal(episode.obs["state"], state)
            assert episode.reward.sum() == 1.0
            assert episode.terminated

    def test_verify_names_the_camera_that_was_never_recorded(self):
        (error,) = [p for p in verify(GR00T) if p.severity == "error"]
        assert error.where == "key 'image_egoview'"
        assert "none of the 5 episodes" in error.what
