# SPDX-License-Identifier: Apache-2.0
"""diffusion_policy's replay buffers: made by hand, and the real Push-T human set."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from robopost.data.convert import export_store, import_source
from robopost.data.formats import find_format, open_source
from robopost.data.formats.diffusion_policy import DiffusionPolicy
from robopost.data.verify import verify
from robopost.errors import DataError

DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
PUSHT = DATA / "pusht_human" / "pusht_cchi_v7_replay.zarr.zip"
needs_pusht = pytest.mark.skipif(
    not PUSHT.exists(), reason=f"real data not found: {PUSHT} (ROBOPOST_TEST_DATA)"
)


def buffer(path, ends=(2, 5), arrays=None):
    steps = ends[-1]
    arrays = arrays or {
        "agent_pos": np.arange(steps * 2, dtype=np.float64).reshape(steps, 2),
        "gripper": np.arange(steps, dtype=np.float32),
        "action": np.arange(steps * 3, dtype=np.float32).reshape(steps, 3),
        "reward": np.arange(steps, dtype=np.float32),
        "img": np.arange(steps * 8 * 9 * 3, dtype=np.float32).reshape(steps, 8, 9, 3) % 256,
        "wrist_image": np.full((steps, 8, 8, 3), 0.5, np.float32),
    }
    store = ZipStore(path, mode="w") if path.suffix == ".zip" else path
    group = zarr.open_group(store, mode="w", zarr_format=2)
    for name, value in arrays.items():
        group.create_array(f"data/{name}", data=value)
    group.create_array("meta/episode_ends", data=np.array(ends, np.int64))
    if path.suffix == ".zip":
        store.close()
    return path


@pytest.mark.parametrize("name", ["b.zarr", "b.zarr.zip"])
def test_read(tmp_path, name):
    path = buffer(tmp_path / name)
    assert find_format(path).name == "diffusion_policy"
    source = DiffusionPolicy.read(path, fps=5)
    assert source.spec.obs == {"agent_pos": ((2,), "float32"), "gripper": ((1,), "float32")}
    assert (source.fps, source.count, source.spec.action_dim, source.spec.bounded) == (5, 2, 3, False)
    first, second = source.episodes
    np.testing.assert_array_equal(second.obs["agent_pos"], [[4, 5], [6, 7], [8, 9]])
    np.testing.assert_array_equal(first.obs["gripper"], [[0], [1]])
    np.testing.assert_array_equal(second.reward, [2, 3, 4])
    assert (first.terminated, first.truncated, first.has_final_obs) == (False, True, False)
    assert source.metadata["rewards"] == "recorded"


def test_images_of_both_float_ranges_become_uint8(tmp_path):
    path = buffer(tmp_path / "b.zarr")
    (episode, _) = DiffusionPolicy.read(path, keys="image,image_wrist").episodes
    assert episode.obs["image"].dtype == np.uint8
    wanted = (np.arange(2 * 8 * 9 * 3) % 256).reshape(2, 8, 9, 3)
    np.testing.assert_array_equal(episode.obs["image"], wanted)
    assert (episode.obs["image_wrist"] == 128).all()  # 0.5 of 255, rounded to even


@pytest.mark.parametrize("name", ["out.zarr", "out.zarr.zip"])
def test_export_is_zarr_v2_with_the_same_numbers(tmp_path, name):
    path = buffer(tmp_path / "b.zarr")
    keys = "agent_pos,gripper,image"
    with import_source(DiffusionPolicy.read(path, keys=keys, fps=5), tmp_path / "store") as store:
        export_store(store, tmp_path / name, "diffusion_policy")
    out = tmp_path / name
    group = zarr.open_group(ZipStore(out, mode="r") if out.suffix == ".zip" else out, mode="r", zarr_format=2)
    like = zarr.open_group(path, mode="r")
    assert group["meta/episode_ends"][:].tolist() == [2, 5]
    for key in ("agent_pos", "action", "reward", "img"):
        np.testing.assert_array_equal(group[f"data/{key}"][:], like[f"data/{key}"][:])
    np.testing.assert_array_equal(group["data/gripper"][:, 0], like["data/gripper"][:])
    again = list(DiffusionPolicy.read(out, keys=keys).episodes)
    np.testing.assert_array_equal(again[1].obs["agent_pos"], [[4, 5], [6, 7], [8, 9]])


def test_pusht_layout_is_recognised(tmp_path):
    state = np.arange(25, dtype=np.float32).reshape(5, 5)
    arrays = {
        "state": state,
        "action": np.full((5, 2), 300, np.float32),
        "keypoint": np.arange(90, dtype=np.float32).reshape(5, 9, 2),
        "n_contacts": np.ones((5, 1), np.float32),
    }
    source = DiffusionPolicy.read(buffer(tmp_path / "b.zarr", arrays=arrays))
    assert source.spec.obs == {"keypoint": ((20,), "float32"), "state": ((5,), "float32")}
    assert (source.spec.action_low, source.spec.action_high, source.fps) == ((0.0, 0.0), (512.0, 512.0), 10.0)
    _, second = source.episodes
    # nine points row by row, then the agent's x and y, which are the first two numbers of the state
    np.testing.assert_array_equal(second.obs["keypoint"][0], [*range(36, 54), 10, 11])
    assert source.metadata == {"task": "pusht", "rewards": "none in the set, zeros"}
    assert second.extras["n_contacts"].shape == (3, 1)


def torn_chunk(path):
    (path / "data" / "action" / "0.0").write_bytes(b"not a chunk")


def no_ends(path):
    (path / "meta" / "episode_ends" / ".zarray").write_text("{")


@pytest.mark.parametrize(
    ("make", "change", "options", "text"),
    [
        ({}, None, {"keys": "agent_poss"}, "Did you mean 'agent_pos'"),
        ({"ends": (3, 2, 5)}, None, {}, "must rise"),
        ({}, torn_chunk, {}, "episode 0: data/action can't be read"),
        ({}, no_ends, {}, "b.zarr"),
        (
            {"arrays": {"state": np.zeros((5, 1)), "action": np.zeros((4, 1))}},
            None,
            {},
            "data/action has 4 rows",
        ),
        ({"arrays": {"state": np.zeros((5, 1))}}, None, {}, "no data/action"),
    ],
)
def test_bad_buffers(tmp_path, make, change, options, text):
    path = buffer(tmp_path / "b.zarr", **make)
    if change:
        change(path)
    with pytest.raises(DataError, match=text) as caught:
        list(open_source(path, "auto", options).episodes)
    assert "\n" not in str(caught.value)


def test_a_zip_cut_short_is_named(tmp_path):
    path = buffer(tmp_path / "b.zarr.zip")
    path.write_bytes(path.read_bytes()[:-200])
    assert not zipfile.is_zipfile(path)
    with pytest.raises(DataError, match="does not open as zarr v2"):
        open_source(path, "diffusion_policy")


@needs_pusht
def test_real_push_t(tmp_path):
    source = DiffusionPolicy.read(PUSHT)
    with import_source(source, tmp_path / "pusht.zarr") as store:
        assert (len(store), store.num_steps, store.fps) == (206, 25_650, 10.0)
        raw = zarr.open_group(ZipStore(PUSHT, mode="r"), mode="r", zarr_format=2)
        ends = raw["meta/episode_ends"][:]
        np.testing.assert_array_equal(store.episode_ends, ends)
        for index in (0, 17, 205):
            rows = slice(ends[index - 1] if index else 0, ends[index])
            episode = store.episode(index)
            np.testing.assert_array_equal(episode.obs["state"], raw["data/state"][rows])
            np.testing.assert_array_equal(episode.action, raw["data/action"][rows])
            points = raw["data/keypoint"][rows].reshape(-1, 18)
            np.testing.assert_array_equal(episode.obs["keypoint"][:, :18], points)
            np.testing.assert_array_equal(episode.obs["keypoint"][:, 18:], raw["data/state"][rows][:, :2])
            assert not episode.reward.any()
        low, high = store.stats()["action"]["min"], store.stats()["action"]["max"]
        assert min(low) >= 0
        assert max(high) <= 512
    assert verify(PUSHT) == []


@needs_pusht
def test_real_push_t_images():
    raw = zarr.open_group(ZipStore(PUSHT, mode="r"), mode="r", zarr_format=2)
    episode = next(iter(DiffusionPolicy.read(PUSHT, keys="image,state").episodes))
    assert episode.obs["image"].shape == (161, 96, 96, 3)
    np.testing.assert_array_equal(episode.obs["image"][40], raw["data/img"][40])
