# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from robopost.cli import main
from robopost.config import DataConfig
from robopost.data import convert
from robopost.data.convert import import_source, open_any
from robopost.data.dataset import Dataset
from robopost.data.formats import EpisodeSource
from robopost.data.store import EpisodeStore, is_store
from robopost.errors import DataError


@pytest.fixture
def store(tmp_path, spec, make_episode):
    with EpisodeStore.create(tmp_path / "a.zarr", spec=spec, fps=20, source="made up") as store:
        for index in range(3):
            store.append(make_episode(index, 4 + index, success=index > 0, instruction="go", final=False))
    return tmp_path / "a.zarr"


@pytest.fixture
def foreign(store, tmp_path):
    """The same data in a foreign format."""
    with EpisodeStore.open(store) as opened:
        convert.export_store(opened, tmp_path / "foreign.zarr.zip", "diffusion_policy")
    return tmp_path / "foreign.zarr.zip"


def run(*words):
    return main(["data", *map(str, words)])


def test_foreign_path_is_imported_once(foreign, monkeypatch):
    first = Dataset.load(DataConfig(path=str(foreign)), device="cpu")
    assert first.num_steps == 15
    assert is_store(foreign.with_name("foreign.zarr.zip.robopost.zarr"))
    monkeypatch.setattr(convert, "import_source", lambda *a, **k: pytest.fail("imported again"))
    assert Dataset.load(DataConfig(path=str(foreign)), device="cpu").dataset_id == first.dataset_id


def test_changed_file_is_imported_again(foreign, monkeypatch):
    open_any(foreign).close()
    calls = []
    whole = convert.import_source
    monkeypatch.setattr(convert, "import_source", lambda *a, **k: calls.append(1) or whole(*a, **k))
    os.utime(foreign, ns=(time.time_ns(), time.time_ns() + 1))
    with open_any(foreign) as store:
        assert len(store) == 3
    assert calls == [1]


def test_unwritable_place_imports_into_the_cache_folder(foreign, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBOPOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convert.os, "access", lambda path, mode: False)
    with open_any(foreign) as store:
        assert tmp_path / "cache" in store.path.parents
    assert not foreign.with_name("foreign.zarr.zip.robopost.zarr").exists()


def test_import_is_all_or_nothing(tmp_path, spec, make_episode):
    def breaks():
        yield make_episode(0)
        bad = make_episode(1)
        bad.action = bad.action[:2]
        yield bad

    source = EpisodeSource(spec, 20, "toy", breaks(), 2)
    with pytest.raises(
        DataError, match=r"toy, episode 1: 'reward' has shape|toy, episode 1: observation key"
    ):
        import_source(source, tmp_path / "out.zarr")
    with pytest.raises(DataError, match="toy holds no episodes"):
        import_source(EpisodeSource(spec, 20, "toy", []), tmp_path / "out.zarr")
    assert os.listdir(tmp_path) == []


def test_import_keeps_what_is_there(foreign, store, tmp_path):
    (tmp_path / "notes").write_text("mine")
    assert run("import", foreign, "--out", tmp_path / "notes", "--overwrite") == 2
    assert (tmp_path / "notes").read_text() == "mine"
    assert run("import", foreign, "--out", store) == 2
    with EpisodeStore.open(store) as kept:
        assert kept.source == "made up"
    assert run("import", foreign, "--out", store, "--overwrite") == 0
    with EpisodeStore.open(store) as new:
        assert new.source != "made up"


def test_round_trip_through_a_foreign_format(store, foreign, tmp_path):
    assert run("import", foreign, "--out", tmp_path / "back.zarr", "--option", "keys=state") == 0
    with EpisodeStore.open(store) as a, EpisodeStore.open(tmp_path / "back.zarr") as b:
        for one, other in zip(a, b, strict=True):
            assert np.array_equal(one.obs["state"], other.obs["state"])
            assert np.array_equal(one.action, other.action)
            assert np.array_equal(one.reward, other.reward)


def test_info(store, foreign, capsys):
    assert run("info", store, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["episodes"], facts["steps"], facts["fps"]) == (3, 15, 20)
    assert facts["success"] == pytest.approx(2 / 3)
    assert facts["return"]["min"] == 1 + 2 + 3 + 4
    assert facts["instructions"] == {"go": 3}
    assert facts["keys"]["state"]["max"][2] == 2
    assert run("info", store) == 0
    shown = capsys.readouterr().out
    assert "3 episodes, 15 steps, 20 Hz" in shown
    assert "success 66.7%" in shown
    assert run("info", foreign, "--json") == 0
    assert json.loads(capsys.readouterr().out)["keys"]["state"]["mean"] == facts["keys"]["state"]["mean"]


def test_verify(store, capsys):
    assert run("verify", store) == 0
    assert "0 errors, 0 warnings: fit for training" in capsys.readouterr().out.replace("\n", "")
    (store / "data/reward/c/0").unlink()
    assert run("verify", store, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == 1
    assert found["problems"][0]["where"] == "episode 0, row 0, key 'data/reward'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "absent"], "no data at absent"),
        (["verify", "absent"], "no data at absent"),
        (["import", "absent"], "no data at absent"),
        (["import", "STORE"], "is a robopost store already"),
        (["import", "FOREIGN", "--format", "minary"], "Did you mean 'minari'?"),
        (["import", "FOREIGN", "--option", "fsp=10"], "unknown option 'fsp'. Did you mean 'fps'?"),
        (["import", "FOREIGN", "--option", "fps"], "is not KEY=VALUE"),
        (["export", "STORE", "--out", "x"], "needs --format"),
        (["export", "STORE", "--out", "x", "--format", "d4lr"], "Did you mean 'd4rl'?"),
        (["export", "STORE", "--out", "STORE", "--format", "diffusion_policy"], "exists. Fix: another --out"),
        (["inform", "STORE"], "invalid choice: 'inform'"),
        ([], "required: COMMAND"),
    ],
)
def test_errors_are_one_line(store, foreign, capsys, words, message):
    code = run(*[{"STORE": store, "FOREIGN": foreign}.get(word, word) for word in words])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_help(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "diffusion_policy" in shown
    assert "robopost data verify" in shown
    assert run("import", "--help") == 0
