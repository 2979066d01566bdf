# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest
import zarr

from robopost.data.batch import Spec
from robopost.data.episode import Episode
from robopost.data.formats import EpisodeSource
from robopost.data.store import EpisodeStore
from robopost.data.verify import check_source, verify
from robopost.errors import DataError

SPEC = Spec({"state": ((3,), "float32"), "image": ((8, 8, 3), "uint8")}, 2, (-1.0, -1.0), (1.0, 1.0), 0)
EXTRAS = {"timestamp": ((), "float64")}


def good(index=0, steps=6):
    rng = np.random.default_rng(index)
    return Episode(
        obs={
            "state": rng.normal(size=(steps + 1, 3)).astype(np.float32),
            "image": rng.integers(1, 255, (steps + 1, 8, 8, 3), dtype=np.uint8),
        },
        action=rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        reward=rng.normal(size=steps).astype(np.float32),
        terminated=False,
        truncated=True,
        extras={"timestamp": np.arange(steps) / 20},
    )


def save(path, episodes):
    with EpisodeStore.create(path, spec=SPEC, fps=20, source="test", extras=EXTRAS) as store:
        for episode in episodes:
            store.append(episode)
    return path


@pytest.fixture
def three():
    return [good(0), good(1, 8), good(2)]


def test_nothing_wrong(tmp_path, three):
    assert verify(save(tmp_path / "s", three)) == []
    assert check_source(EpisodeSource(SPEC, 20, "x", three, 3, EXTRAS)) == []


def plant_nan(e):
    e.obs["state"][5, 2] = np.nan


def plant_inf(e):
    e.action[4, 1] = np.inf


def plant_bounds(e):
    e.action[3, 0] = 1.5


def plant_rate(e):
    e.extras["timestamp"] = np.arange(8) / 30


def plant_gap(e):
    e.extras["timestamp"][4:] += 0.2


def plant_back(e):
    e.extras["timestamp"][6] = 0.1


def plant_black(e):
    e.obs["image"][:] = 0


def plant_no_end(e):
    e.truncated = False


DEFECTS = {
    "nan": (plant_nan, "episode 1, row 5, key 'state'", "NaN in 1 row(s), dimension 2", "error"),
    "inf": (plant_inf, "episode 1, row 4, key 'action'", "inf in 1 row(s)", "error"),
    "bounds": (
        plant_bounds,
        "episode 1, row 3, key 'action'",
        "1.5 in dimension 0 lies outside -1..1",
        "error",
    ),
    "rate": (plant_rate, "episode 1, row 1, key 'timestamp'", "wrong rate: runs at 30 Hz", "error"),
    "gap": (
        plant_gap,
        "episode 1, row 4, key 'timestamp'",
        "1 gap(s): a step of 0.25 s where 0.05 s",
        "error",
    ),
    "back": (plant_back, "episode 1, row 6, key 'timestamp'", "time goes back", "error"),
    "black": (plant_black, "episode 1, key 'image'", "every frame is black", "warning"),
    "no end": (plant_no_end, "episode 1", "neither terminated nor truncated", "warning"),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("stored", [True, False])
def test_planted_defect_is_found_at_its_place(tmp_path, three, name, stored):
    plant, where, what, severity = DEFECTS[name]
    plant(three[1])
    if stored:
        problems = verify(save(tmp_path / "s", three))
    else:
        problems = check_source(EpisodeSource(SPEC, 20, "x", three, 3, EXTRAS))
    found = [p for p in problems if p.where == where and what in p.what and p.severity == severity and p.fix]
    assert len(found) == 1, problems
    assert {p.where.split(",")[0] for p in problems} == {"episode 1"}


@pytest.mark.parametrize(
    ("plant", "where", "what"),
    [
        (lambda e: e.obs.pop("image"), "episode 1, key 'image'", "missing"),
        (lambda e: setattr(e, "reward", e.reward[:5]), "episode 1, row 5, key 'reward'", "5 rows where 8"),
        (lambda e: e.obs.update(state=e.obs["state"][:7]), "episode 1, row 7, key 'state'", "7 rows where 9"),
        (lambda e: e.obs.update(state=e.obs["state"][:, :2]), "episode 1, row 0, key 'state'", "shape (2,)"),
        (lambda e: setattr(e, "action", np.zeros((0, 2))), "episode 1", "has no steps"),
    ],
)
def test_misshapen_foreign_episode(three, plant, where, what):
    plant(three[1])
    problems = check_source(EpisodeSource(SPEC, 20, "x", three, 3, EXTRAS))
    assert [(p.where, what in p.what) for p in problems] == [(where, True)]


def test_reader_that_stops(three):
    def stops():
        yield three[0]
        raise DataError("video 1 is cut short. Fix: copy it again")

    (problem,) = check_source(EpisodeSource(SPEC, 20, "x", stops(), 3, EXTRAS))
    assert (problem.where, problem.what, problem.fix) == (
        "episode 1",
        "video 1 is cut short",
        "copy it again",
    )
    (problem,) = check_source(EpisodeSource(SPEC, 20, "x", three[:2], 3, EXTRAS))
    assert "declares 3 episodes and holds 2" in problem.what
    (problem,) = check_source(EpisodeSource(SPEC, 20, "x", [], 0, EXTRAS))
    assert "holds no episodes" in problem.what


def test_constant_dimensions_and_repeats(tmp_path, three):
    for episode in three:
        episode.obs["state"][:, 1] = 4.0
    problems = verify(save(tmp_path / "s", [*three, three[0]]))
    assert [(p.where, p.severity) for p in problems] == [("episode 3", "warning"), ("key 'state'", "warning")]
    assert "same as episode 0" in problems[0].what
    assert "1 constant dimension(s): 1 (first value 4)" in problems[1].what


def test_truncated_array(tmp_path, three):
    path = save(tmp_path / "s", three)
    group = zarr.open_group(str(path), mode="r+")
    group["data/action"].resize((10, 2))
    problems = verify(path)
    assert (problems[0].where, problems[0].what) == (
        "episode 1, row 4, key 'data/action'",
        "truncated: 10 of 20 rows",
    )


def test_missing_and_corrupt_files(tmp_path, three):
    path = save(tmp_path / "s", three)
    (path / "data/reward/c/0").unlink()
    shard = path / "meta/final_obs.state/c/0/0"
    shard.write_bytes(shard.read_bytes()[:20])
    places = [p.where for p in verify(path)]
    assert places == ["episode 0, row 0, key 'data/reward'", "episode 0, key 'meta/final_obs.state'"]
    (path / "data/action/zarr.json").unlink()
    assert "key 'data/action'" in [p.where for p in verify(path)]


def test_wrong_shape_and_type(tmp_path, three):
    path = save(tmp_path / "s", three)
    file = path / "data/action/zarr.json"
    meta = json.loads(file.read_text())
    meta["data_type"] = "int32"
    meta["fill_value"] = 0
    file.write_text(json.dumps(meta))
    (problem,) = verify(path)
    assert problem.where == "key 'data/action'"
    assert "int32, the spec says (2,) float32" in problem.what


def test_changed_values(tmp_path, three):
    path = save(tmp_path / "s", three)
    zarr.open_group(str(path), mode="r+")["data/reward"][7] = 0.123
    (problem,) = verify(path)
    assert problem.where == "episode 1"
    assert "differs from what was recorded" in problem.what


def test_misaligned_ends_and_torn_records(tmp_path, three):
    path = save(tmp_path / "s", three)
    ends = zarr.open_group(str(path), mode="r+")["meta/episode_ends"]
    ends[1] = 3
    (problem,) = verify(path)
    assert (problem.where, problem.what) == ("episode 1, key 'episode_ends'", "episode ends don't rise")
    ends[1], ends[2] = 14, 19
    (problem,) = verify(path)
    assert "20 steps, the arrays 3 and 19" in problem.what
    (path / "meta/zarr.json").write_text("{")
    (problem,) = verify(path)
    assert "commit record is torn" in problem.what
    (path / "zarr.json").write_text("{")
    (problem,) = verify(path)
    assert "header is torn" in problem.what


def test_empty_and_absent(tmp_path):
    (problem,) = verify(save(tmp_path / "s", []))
    assert problem.what == "holds no episodes"
    with pytest.raises(DataError, match="no data at"):
        verify(tmp_path / "absent")
