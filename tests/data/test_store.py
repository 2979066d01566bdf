# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import zarr

from robopost.data.batch import Spec
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore, is_store
from robopost.errors import DataError


def same(a: Episode, b: Episode) -> bool:
    arrays = lambda e: {**e.obs, "action": e.action, "reward": e.reward, **e.extras}  # noqa: E731
    flags = lambda e: (e.terminated, e.truncated, e.success, e.instruction, e.metadata, e.has_final_obs)  # noqa: E731
    return flags(a) == flags(b) and all(
        np.array_equal(value, arrays(b)[key]) and value.dtype == arrays(b)[key].dtype
        for key, value in arrays(a).items()
    )


@pytest.fixture
def create(tmp_path, spec):
    def make(name="a.zarr", **more):
        return EpisodeStore.create(tmp_path / name, spec=spec, fps=20, source="test", **more)

    return make


def test_round_trip(create, make_episode, tmp_path, spec):
    episodes = [
        make_episode(0, 5, terminated=True, success=True, instruction="push ü", metadata={"seed": 7}),
        make_episode(1, 3, final=False),
        make_episode(2, 1, success=False),
    ]
    with create(metadata={"robot": "arm"}) as store:
        for episode in episodes:
            store.append(episode)
        assert store.pending == 3
        assert len(store) == 0
    with EpisodeStore.open(tmp_path / "a.zarr") as store:
        assert (len(store), store.num_steps, store.fps, store.source) == (3, 9, 20.0, "test")
        assert store.spec == spec
        assert store.metadata == {"robot": "arm"}
        assert store.keys == ["obs.state", "action", "reward"]
        assert store.episode_ends.tolist() == [5, 8, 9]
        assert all(same(a, b) for a, b in zip(episodes, store, strict=True))
        assert same(store.episode(-1), episodes[2])
        with pytest.raises(DataError, match="episode 3 does not exist"):
            store.episode(3)
        with pytest.raises(DataError, match="open for reading"):
            store.append(episodes[0])


def test_infinite_bounds_and_images(tmp_path, make_episode):
    spec = Spec(
        {"state": ((3,), "float32"), "image": ((8, 8, 3), "uint8")}, 2, (-np.inf, -1.0), (np.inf, 1.0)
    )
    episode = make_episode(images=True, extras={"timestamp": np.arange(4) / 20})
    extras = {"timestamp": ((), "float64")}
    with EpisodeStore.create(tmp_path / "s", spec=spec, fps=20, source="x", extras=extras) as store:
        store.append(episode)
    assert "Infinity" not in (tmp_path / "s/zarr.json").read_text()
    with EpisodeStore.open(tmp_path / "s") as store:
        assert store.spec == spec
        assert same(store.episode(0), episode)
        pixels = episode.obs["image"][:4].reshape(-1, 3)
        np.testing.assert_allclose(store.stats()["image"]["mean"], pixels.mean(0))
        np.testing.assert_allclose(store.stats()["image"]["std"], pixels.std(0))


def test_layout_is_plain_sharded_zarr(create, make_episode, tmp_path):
    with create() as store:
        store.append(make_episode(3, 4))
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")
    assert group["data/obs.state"][2].tolist() == [302, 2, 3]
    assert group["meta/final_obs.state"][0].tolist() == [304, 4, 3]
    assert group["meta/episode_ends"][:].tolist() == [4]
    assert group["data/action"].shards is not None
    assert json.loads(bytes(group["meta/episodes"][:]))["length"] == 4


@pytest.mark.parametrize("steps", [1, 40])
def test_append_in_sessions_equals_append_at_once(create, make_episode, tmp_path, steps):
    episodes = [make_episode(i, steps + i) for i in range(4)]
    with create("once.zarr") as store:
        for episode in episodes:
            store.append(episode)
    create("twice.zarr").close()
    for episode in episodes:
        with EpisodeStore.open(tmp_path / "twice.zarr", "a") as store:
            store.append(episode)
    once, twice = (EpisodeStore.open(tmp_path / name) for name in ("once.zarr", "twice.zarr"))
    assert all(same(a, b) for a, b in zip(once, twice, strict=True))
    assert once.dataset_id == twice.dataset_id
    for key, item in once.stats().items():
        for name in ("mean", "std", "min", "max", "count"):
            assert np.array_equal(item[name], twice.stats()[key][name])


def test_identity_follows_content(create, make_episode):
    stores = [create(f"{i}.zarr") for i in range(4)]
    empty = stores[0].dataset_id
    assert all(s.dataset_id == empty for s in stores)
    changed = make_episode()
    changed.reward[2] += 1e-3
    for store, episode in zip(
        stores, [make_episode(), make_episode(), changed, make_episode(terminated=True)], strict=True
    ):
        store.append(episode)
        store.close()
    ids = [s.dataset_id for s in stores]
    assert ids[0] == ids[1]
    assert len({empty, *ids}) == 4


def test_automatic_flush(create, make_episode, tmp_path):
    store = create(buffer_steps=5)
    store.append(make_episode(0, 4))
    assert len(EpisodeStore.open(tmp_path / "a.zarr")) == 0
    store.append(make_episode(1, 4))
    assert len(EpisodeStore.open(tmp_path / "a.zarr")) == 2
    assert store.pending == 0


def test_statistics(create, make_episode):
    store = create()
    episodes = [make_episode(i, 3 + i, final=i != 1) for i in range(3)]
    for episode in episodes:
        store.append(episode)
        store.flush()
    state = np.concatenate([e.obs["state"][: len(e)] for e in episodes]).astype(np.float64)
    stats = store.stats()["state"]
    assert stats["count"] == 12
    assert stats["source"] == store.dataset_id
    np.testing.assert_allclose(stats["mean"], state.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["std"], state.std(0), rtol=1e-12)
    assert np.array_equal(stats["max"], state.max(0))
    assert store.stats()["reward"]["min"] == 1.0
    store.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.obs.pop("state"), "lacks the observation key 'state'"),
        (lambda e: e.obs.update(other=e.action), "has the observation key 'other'"),
        (lambda e: setattr(e, "action", e.action[:, :1]), r"'action' has shape \(4, 1\), expected \(4, 2\)"),
        (lambda e: setattr(e, "reward", e.reward[:-1]), r"'reward' has shape \(3,\), expected \(4,\)"),
        (lambda e: setattr(e, "has_final_obs", False), r"'state' has shape \(5, 3\), expected \(4, 3\)"),
        (lambda e: e.obs.update(state=e.obs["state"].astype(complex)), "dtype complex"),
        (lambda e: setattr(e, "action", e.action[:0]), "no steps"),
    ],
)
def test_misfits_are_refused_and_nothing_is_kept(create, make_episode, change, message):
    store, episode = create(), make_episode()
    change(episode)
    with pytest.raises(DataError, match=message):
        store.append(episode)
    assert store.pending == 0
    store.close()
    assert len(store) == 0


def test_one_writer(create, make_episode, tmp_path):
    with create() as store:
        with pytest.raises(DataError, match="being written by another process"):
            EpisodeStore.open(tmp_path / "a.zarr", "a")
        with pytest.raises(DataError, match="being written"):
            create(overwrite=True)
        store.append(make_episode())
    EpisodeStore.open(tmp_path / "a.zarr", "a").close()


def test_create_never_destroys(create, make_episode, tmp_path):
    with create() as store:
        store.append(make_episode())
    with pytest.raises(DataError, match="exists"):
        create()
    assert len(EpisodeStore.open(tmp_path / "a.zarr")) == 1
    with create(overwrite=True) as store:
        assert len(store) == 0
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="no robopost store"):
        create("docs", overwrite=True)
    assert (tmp_path / "docs/thesis.txt").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("zarr.json", "{", "header is torn"),
        ("zarr.json", "[]", "header is torn"),
        ("zarr.json", '{"attributes": {"robopost": {"format": 99}}}', "store format 99"),
        ("zarr.json", '{"attributes": {}}', "no robopost store"),
        ("meta/zarr.json", '{"zarr_fo', "commit record is torn"),
        ("meta/zarr.json", '{"zarr_format": 3, "node_type": "group", "attributes": {}}', "no commit record"),
        ("data/action/zarr.json", "{", "data/action is missing or torn"),
    ],
)
def test_torn_metadata_is_one_line(create, make_episode, tmp_path, file, text, message):
    with create() as store:
        store.append(make_episode())
    (tmp_path / "a.zarr" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        EpisodeStore.open(tmp_path / "a.zarr").episode(0)


def test_lost_or_damaged_shard_never_reads_as_zeros(create, make_episode, tmp_path):
    with create() as store:
        store.append(make_episode(steps=30))
    shard = tmp_path / "a.zarr/data/reward/c/0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"data/reward rows 0..30 can't be read"):
        EpisodeStore.open(tmp_path / "a.zarr").episode(0)
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"data/reward rows 0..30 can't be read"):
        EpisodeStore.open(tmp_path / "a.zarr").episode(0)
    shard.unlink()
    with pytest.raises(DataError, match="data/reward"):
        EpisodeStore.open(tmp_path / "a.zarr").episode(0)


CRASH = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from robopost.data import files
from robopost.data.batch import Spec
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore

def episode(i, steps):
    return Episode({"state": np.full((steps + 1, 3), i, np.float32)}, np.full((steps, 2), i, np.float32),
                   np.full(steps, i, np.float32), False, True)

root, base = Path(sys.argv[1]), Path(sys.argv[1]) / "base"
spec = Spec({"state": ((3,), "float32")}, 2, (-1e3,) * 2, (1e3,) * 2)
if os.fork() == 0:  # this process itself never starts zarr's threads, so that every fork may
    with EpisodeStore.create(base, spec=spec, fps=20, source="crash") as store:
        store.append(episode(0, 5))
    os._exit(0)
os.wait()
whole = files.replace_file
for point in range(100):
    for torn in (False, True):  # killed before the rename, with half a file written, or right after it
        target = root / f"{point:02d}_{int(torn)}"
        shutil.copytree(base, target)
        if os.fork() == 0:
            count = 0
            def replace(path, data):
                global count
                if count == point:
                    if torn:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.with_name(path.name + ".0.partial").write_bytes(bytes(data)[: len(data) // 2])
                    else:
                        whole(path, data)
                    os.kill(os.getpid(), 9)
                count += 1
                whole(path, data)
            files.replace_file = replace
            store = EpisodeStore.open(target, "a")
            store.append(episode(1, 4))
            store.flush()
            os._exit(0)
        status = os.wait()[1]
        if status == 0:
            (root / "points").write_text(str(point))
            sys.exit(0)
"""


def test_kill_at_every_write_of_an_append(tmp_path, make_episode):
    """A fault is injected before and after each atomic write of a flush: 0 or 1 episodes more, never half."""
    subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], check=True, timeout=120)
    points = int((tmp_path / "points").read_text())
    assert (
        points >= 12
    )  # three data arrays, final observations, ends and JSON: shape and rows each; the record
    kept = []
    for point in range(points):
        for torn in (False, True):
            path = tmp_path / f"{point:02d}_{int(torn)}"
            with EpisodeStore.open(path) as store:  # a reader sees a whole store without any repair
                kept.append(len(store))
                for index, episode in enumerate(store):
                    assert len(episode) == (5, 4)[index]
                    assert (episode.obs["state"] == index).all()
                    assert (episode.action == index).all()
            with EpisodeStore.open(path, "a") as store:
                store.append(make_episode(5, 7))
            with EpisodeStore.open(path) as store:
                assert len(store) == kept[-1] + 1
                assert same(store.episode(-1), make_episode(5, 7))
                assert (store.episode(0).reward == 0).all()
                assert store.array("data/action").shape[0] == store.num_steps
            assert not list(path.rglob("*.partial"))
    assert kept == [1] * (2 * points - 2) + [2, 1]  # only the commit record itself adds the episode


def test_kill_9_while_recording(tmp_path):
    """What flush() acknowledged before a real kill -9 is there, and nothing half."""
    script = textwrap.dedent("""
        import sys, numpy as np
        from robopost.data.batch import Spec
        from robopost.data.store import EpisodeStore, Episode
        spec = Spec({"state": ((3,), "float32")}, 2, (-1e3,) * 2, (1e3,) * 2)
        store = EpisodeStore.create(sys.argv[1], spec=spec, fps=20, source="kill", buffer_steps=1)
        for i in range(100000):
            n = 1 + i % 7
            state, action = np.full((n + 1, 3), i), np.full((n, 2), i)
            store.append(Episode({"state": state}, action, np.full(n, i), False, True))
            print(i + 1, flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "k")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    acknowledged = [process.stdout.readline() for _ in range(5)]
    time.sleep(0.137)
    process.send_signal(signal.SIGKILL)
    acknowledged += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL
    done = int([line for line in acknowledged if line.endswith("\n")][-1])
    with EpisodeStore.open(tmp_path / "k", "a") as store:
        assert done <= len(store) <= done + 1
        for index, episode in enumerate(store):
            assert len(episode) == 1 + index % 7
            assert (episode.obs["state"] == index).all()


def test_full_disk_leaves_the_committed_part(create, make_episode, tmp_path):
    store = create()
    store.append(make_episode(0, 5))
    store.flush()
    noise = np.random.default_rng(0).normal(size=(20001, 3)).astype(np.float32)
    big = make_episode(1, 20000)
    big.obs["state"] = noise
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        store.append(big)
        with pytest.raises(DataError, match=r"can't write 1 episodes to .*file size limit.*Fix: free space"):
            store.flush()
        with EpisodeStore.open(tmp_path / "a.zarr") as reader:
            assert len(reader) == 1
            assert same(reader.episode(0), make_episode(0, 5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "a.zarr").rglob("*.partial"))
    store.flush()  # space was freed: the pending episode is still there
    store.close()
    assert same(EpisodeStore.open(tmp_path / "a.zarr").episode(1), big)


def test_unwritable_folder_is_one_line(tmp_path, spec, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(DataError, match=r"can't create .*Permission denied.*Fix: choose a folder"):
        EpisodeStore.create(tmp_path / "no/where", spec=spec, fps=1, source="x")


def test_is_store(create, tmp_path):
    create().close()
    assert is_store(tmp_path / "a.zarr")
    assert not is_store(tmp_path)
    assert not is_store(tmp_path / "absent")
    with pytest.raises(DataError, match="no dataset at"):
        EpisodeStore.open(tmp_path / "absent")
    (tmp_path / "file").write_bytes(os.urandom(10))
    with pytest.raises(DataError, match="is a file"):
        EpisodeStore.open(tmp_path / "file")
