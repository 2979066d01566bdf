# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import resource
import time

import numpy as np
import pytest

from robopost.data import cache
from robopost.data.cache import beside, columns_of, open_columns
from robopost.data.store import EpisodeStore
from robopost.errors import DataError


@pytest.fixture
def episodes(make_episode):
    return [make_episode(i, 2 + i, final=i != 1, terminated=i == 0) for i in range(4)]


@pytest.fixture
def path(tmp_path, spec, episodes):
    with EpisodeStore.create(tmp_path / "d.zarr", spec=spec, fps=20, source="test") as store:
        for episode in episodes:
            store.append(episode)
    return tmp_path / "d.zarr"


def same(a, b):
    pairs = [(a.obs["state"], b.obs["state"])]
    names = ("action", "reward", "lengths", "terminated", "truncated", "has_final")
    pairs += [(getattr(a, name), getattr(b, name)) for name in names]
    return all(np.array_equal(x, y) for x, y in pairs)


def test_equals_the_episodes(path, episodes, spec):
    with EpisodeStore.open(path) as store:
        assert same(open_columns(store), columns_of(episodes, spec))
        assert sorted(os.listdir(beside(path))) == [store.dataset_id]


def test_built_once(path, monkeypatch):
    with EpisodeStore.open(path) as store:
        open_columns(store)
        monkeypatch.setattr(cache, "_build", lambda *a: pytest.fail("built again"))
        open_columns(store)


def test_new_content_gets_a_new_cache_and_the_old_goes(path, make_episode, episodes, spec):
    with EpisodeStore.open(path) as store:
        old = open_columns(store)
        old_id = store.dataset_id
    with EpisodeStore.open(path, "a") as store:
        store.append(make_episode(9, 6))
    with EpisodeStore.open(path) as store:
        new = open_columns(store)
        assert same(new, columns_of([*episodes, make_episode(9, 6)], spec))
        assert sorted(os.listdir(beside(path))) == [store.dataset_id] != [old_id]
    assert same(old, columns_of(episodes, spec))  # maps in use outlive their files


@pytest.mark.parametrize("damage", ["truncate", "remove", "index"])
def test_torn_cache_is_built_again(path, episodes, spec, damage):
    with EpisodeStore.open(path) as store:
        open_columns(store)
        folder = beside(path) / store.dataset_id
        if damage == "truncate":
            os.truncate(folder / "action.bin", 8)
        elif damage == "remove":
            (folder / "obs.state.bin").unlink()
        else:
            (folder / "index.json").write_text("{")
        assert same(open_columns(store), columns_of(episodes, spec))


def test_read_only_place_uses_the_cache_folder(path, episodes, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBOPOST_CACHE", str(tmp_path / "elsewhere"))
    whole = cache._writable
    monkeypatch.setattr(cache, "_writable", lambda place: "elsewhere" in str(place) and whole(place))
    with EpisodeStore.open(path) as store:
        assert same(open_columns(store), columns_of(episodes, spec))
        assert not beside(path).exists()
        assert len(list((tmp_path / "elsewhere").rglob("index.json"))) == 1
        monkeypatch.setattr(cache, "_build", lambda *a: pytest.fail("built again"))
        open_columns(store)
        monkeypatch.setattr(cache, "_open", lambda *a: None)
        monkeypatch.setattr(cache, "_writable", lambda place: False)
        with pytest.raises(DataError, match=r"no cache folder can be written.*ROBOPOST_CACHE"):
            open_columns(store)


def test_changed_content_is_refused(path):
    with EpisodeStore.open(path, "a") as store:
        array = store.array("data/reward")
        array[3] = 99.0
        with pytest.raises(DataError, match=r"episode 1 is not what was recorded.*robopost data verify"):
            open_columns(store)
    assert os.listdir(beside(path)) == []


def test_full_disk(path, tmp_path, make_episode):
    with EpisodeStore.open(path, "a") as store:
        store.append(make_episode(7, 30_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            EpisodeStore.open(path) as store,
            pytest.raises(DataError, match=r"can't build the cache.*file size limit"),
        ):
            open_columns(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(beside(path)) == []


def test_a_hundred_times_faster_than_zarr(tmp_path, spec, make_episode):
    with EpisodeStore.create(tmp_path / "s.zarr", spec=spec, fps=20, source="speed") as store:
        for index in range(20):
            store.append(make_episode(index, 500))
    with EpisodeStore.open(tmp_path / "s.zarr") as store:
        columns = open_columns(store)
        array = store.array("data/obs.state")
        starts = np.random.default_rng(0).integers(0, 9000, 200)
        begin = time.perf_counter()
        for start in starts[:20]:
            np.asarray(array[start : start + 16])
        zarr_time = (time.perf_counter() - begin) / 20
        best = 1.0
        for _ in range(3):
            begin = time.perf_counter()
            for start in starts:
                np.asarray(columns.obs["state"][start : start + 16])
            best = min(best, (time.perf_counter() - begin) / 200)
    assert zarr_time / best > 100
