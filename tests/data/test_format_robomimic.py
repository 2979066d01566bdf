# SPDX-License-Identifier: Apache-2.0
"""robomimic files, written by hand with h5py as robomimic's own converters lay them out."""

import json

import h5py
import numpy as np
import pytest

from robopost.data.batch import Spec
from robopost.data.convert import export_store, import_source
from robopost.data.episode import Episode
from robopost.data.formats import find_format, open_source
from robopost.data.formats.robomimic import Robomimic
from robopost.data.store import EpisodeStore
from robopost.errors import DataError

ENV_ARGS = {"env_name": "Lift", "type": 1, "env_kwargs": {"reward_shaping": False}}
STEPS = {"demo_0": 3, "demo_2": 2, "demo_10": 4}


def robomimic_file(path):
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(ENV_ARGS)
        data.attrs["total"] = sum(STEPS.values())
        for number, (name, steps) in enumerate(STEPS.items()):
            demo = data.create_group(name)
            demo.attrs["num_samples"] = steps
            eef = np.arange(steps + 1, dtype=np.float64)[:, None] * [[1, 0, 0]] + [[0, 100 * number, 0.5]]
            image = np.broadcast_to(
                np.arange(steps + 1, dtype=np.uint8)[:, None, None, None] * 9, (steps + 1, 12, 16, 3)
            )
            for group, rows in (("obs", slice(None, -1)), ("next_obs", slice(1, None))):
                demo[f"{group}/robot0_eef_pos"] = eef[rows]
                demo[f"{group}/object"] = -eef[rows, :2]
                demo[f"{group}/agentview_image"] = image[rows]
            demo["actions"] = np.full((steps, 2), number / 4)
            demo["rewards"] = (np.arange(steps) == steps - 1) * float(number != 1)
            demo["dones"] = (np.arange(steps) == steps - 1) * int(number != 1)
            demo["states"] = np.arange(steps * 5, dtype=np.float64).reshape(steps, 5) + 1e-9
            if number == 2:
                demo.attrs["ep_meta"] = json.dumps({"lang": "lift the cube"})
        file["mask/train"] = np.array([b"demo_0", b"demo_10"])
        file["mask/valid"] = np.array([b"demo_2"])
    return path


@pytest.fixture
def path(tmp_path):
    return robomimic_file(tmp_path / "low.hdf5")


def test_read(path):
    assert find_format(path).name == "robomimic"
    source = Robomimic.read(path, states=True)
    assert source.spec.obs == {
        "image_agentview": ((12, 16, 3), "uint8"),
        "object": ((2,), "float32"),
        "robot0_eef_pos": ((3,), "float32"),
    }
    assert (source.spec.action_low, source.spec.action_high) == ((-1.0, -1.0), (1.0, 1.0))
    assert (source.fps, source.count, source.metadata["env_args"]) == (20.0, 3, ENV_ARGS)
    first, second, third = source.episodes
    assert [e.metadata["demo"] for e in (first, second, third)] == ["demo_0", "demo_2", "demo_10"]
    # T + 1 observations: obs, and the last row of next_obs
    np.testing.assert_array_equal(
        first.obs["robot0_eef_pos"], [[0, 0, 0.5], [1, 0, 0.5], [2, 0, 0.5], [3, 0, 0.5]]
    )
    np.testing.assert_array_equal(first.obs["image_agentview"][:, 0, 0, 0], [0, 9, 18, 27])
    np.testing.assert_array_equal(third.action, np.full((4, 2), 0.5))
    assert [(e.terminated, e.truncated, e.success) for e in (first, second, third)] == [
        (True, False, True),
        (False, True, False),
        (True, False, True),
    ]
    assert third.extras["states"].dtype == np.float64
    assert third.extras["states"][3, 4] == 19 + 1e-9
    assert (first.instruction, third.instruction) == ("", "lift the cube")
    assert second.metadata["masks"] == ["valid"]


def test_mask_and_joined_state(path):
    source = Robomimic.read(path, mask="train", state="object,robot0_eef_pos", keys="image_agentview")
    assert source.spec.obs == {"state": ((5,), "float32"), "image_agentview": ((12, 16, 3), "uint8")}
    found = list(source.episodes)
    assert [len(e) for e in found] == [3, 4]
    np.testing.assert_array_equal(found[1].obs["state"][1], [-1, -200, 1, 200, 0.5])


def test_low_dimensional_keys_alone(path):
    source = Robomimic.read(path, keys="robot0_eef_pos")
    assert list(next(iter(source.episodes)).obs) == ["robot0_eef_pos"]


def test_round_trip_through_the_store(path, tmp_path):
    with import_source(Robomimic.read(path, states=True), tmp_path / "store") as store:
        export_store(store, tmp_path / "out.hdf5", "robomimic")
    with h5py.File(tmp_path / "out.hdf5") as out, h5py.File(path) as wanted:
        assert json.loads(out["data"].attrs["env_args"]) == ENV_ARGS
        assert out["data"].attrs["total"] == 9
        for ours, name in (("demo_0", "demo_0"), ("demo_1", "demo_2"), ("demo_2", "demo_10")):
            demo, like = out["data"][ours], wanted["data"][name]
            assert demo.attrs["num_samples"] == STEPS[name]
            for member in (
                *(f"{g}/{k}" for g in ("obs", "next_obs") for k in like["obs"]),
                *("actions", "rewards", "dones", "states"),
            ):
                np.testing.assert_allclose(demo[member][:], like[member][:], rtol=1e-7, err_msg=member)
        assert sorted(out["mask/train"][:].tolist()) == [b"demo_0", b"demo_2"]
        assert out["mask/valid"][:].tolist() == [b"demo_1"]


def plain(steps, final):
    rows = np.arange(steps + final, dtype=np.float32)[:, None]
    return Episode({"state": rows}, np.zeros((steps, 1)), np.zeros(steps), False, True, has_final_obs=final)


def test_export_splits_and_leaves_out_next_obs(tmp_path):
    spec = Spec({"state": ((1,), "float32")}, 1, (-1.0,), (1.0,))
    with EpisodeStore.create(tmp_path / "s", spec=spec, fps=10, source="test") as store:
        for index in range(10):
            store.append(plain(2, final=index != 4))
    with EpisodeStore.open(tmp_path / "s") as store:
        export_store(store, tmp_path / "out.hdf5", "robomimic", {"valid": 0.2, "env_name": "Toy-v0"})
    with h5py.File(tmp_path / "out.hdf5") as file:
        assert file["mask/valid"][:].tolist() == [b"demo_8", b"demo_9"]
        assert len(file["mask/train"]) == 8
        assert "next_obs" not in file["data/demo_0"]  # one episode lacks it, so none has it
        assert json.loads(file["data"].attrs["env_args"])["env_name"] == "Toy-v0"
        assert file["data/demo_0/dones"][:].tolist() == [0, 0]
    assert all(e.truncated and not e.has_final_obs for e in Robomimic.read(tmp_path / "out.hdf5").episodes)


def without(member):
    def change(path):
        with h5py.File(path, "a") as file:
            del file[member]

    return change


def nothing(path):
    pass


def cut_short(path):
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (nothing, {"mask": "trian"}, "unknown mask 'trian'. Did you mean 'train'"),
        (nothing, {"keys": "objct"}, "Did you mean 'object'"),
        (nothing, {"state": "objct"}, "Did you mean 'object'"),
        (without("data/demo_2/actions"), {}, "demo_2 lacks 'actions'"),
        (without("data/demo_10/obs/object"), {}, "demo_10/obs lacks 'object'"),
        (without("data/demo_0/obs"), {}, "dataset_states_to_obs"),
        (without("data/demo_2"), {"mask": "valid"}, "names demo_2, which data lacks"),
        (cut_short, {"mask": ""}, "does not open as HDF5"),
    ],
)
def test_bad_files_and_options(path, change, options, text):
    change(path)
    name = "robomimic" if change is cut_short else "auto"
    with pytest.raises(DataError, match=text) as caught:
        list(open_source(path, name, options).episodes)
    assert "\n" not in str(caught.value)


def test_an_export_of_ours_keeps_rate_and_bounds(tmp_path, caplog):
    spec = Spec({"state": ((1,), "float32")}, 1, (0.0,), (512.0,))
    with EpisodeStore.create(tmp_path / "s", spec=spec, fps=10, source="test") as store:
        store.append(plain(2, final=True))
    with EpisodeStore.open(tmp_path / "s") as store:
        export_store(store, tmp_path / "out.hdf5", "robomimic")
        export_store(store, tmp_path / "out.zarr", "diffusion_policy")
        export_store(store, tmp_path / "minari", "minari")
    assert "may leave -1..1" in caplog.text
    for name in ("out.hdf5", "out.zarr", "minari"):
        source = open_source(tmp_path / name)
        assert (source.fps, source.spec.action_low, source.spec.action_high) == (10.0, (0.0,), (512.0,)), name
