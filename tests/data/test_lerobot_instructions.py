# SPDX-License-Identifier: Apache-2.0
"""LeRobot datasets whose task becomes the observation `instruction`."""

import json

import numpy as np
import pytest

from robopost.config import DataConfig
from robopost.data.convert import import_source
from robopost.data.dataset import Dataset
from robopost.data.formats.common import declare, instruction_rows
from robopost.data.formats.lerobot import LeRobot
from robopost.data.formats.lerobot_meta import OURS
from robopost.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
TASKS = ("lift the red cube", "Würfel heben")


@pytest.fixture
def dataset(tmp_path):
    """Two episodes of two steps in v2.1, without cameras."""
    root = tmp_path / "set"
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    features = {
        name: {"dtype": "float32", "shape": [2], "names": None} for name in ("observation.state", "action")
    }
    features |= {
        name: {"dtype": "int64", "shape": [1], "names": None} for name in ("episode_index", "frame_index")
    }
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("index", "task_index")}
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "features": features,
        "total_episodes": 2,
        "total_frames": 4,
    }
    info |= {
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = [{"task_index": i, "task": text} for i, text in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"episode_index": i, "tasks": [text], "length": 2} for i, text in enumerate(TASKS)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for index in range(2):
        rows = {
            "observation.state": [[1.0, 2.0]] * 2,
            "action": [[0.0, 0.5]] * 2,
            "episode_index": [index] * 2,
        }
        rows |= {"frame_index": [0, 1], "index": [2 * index, 2 * index + 1], "task_index": [index] * 2}
        pq.write_table(pa.table(rows), root / f"data/chunk-000/episode_{index:06d}.parquet")
    return root


def test_the_task_is_an_observation_where_it_is_asked_for(dataset, tmp_path):
    assert "instruction" not in LeRobot.read(dataset).spec.obs
    source = LeRobot.read(dataset, instruction="yes")
    assert source.spec.obs["instruction"] == ((64,), "uint8")
    with import_source(source, tmp_path / "store") as store:
        for episode, text in zip(store, TASKS, strict=True):
            assert episode.instruction == text
            assert [bytes(row).rstrip(b"\0").decode() for row in episode.obs["instruction"]] == [text] * len(
                episode.obs["state"]
            )
        assert declare(store)["instruction"] is True
    loaded = Dataset.load(DataConfig(path=str(tmp_path / "store")), device="cpu")
    assert loaded.spec.obs["instruction"] == ((64,), "uint8")


def test_exports_of_ours_say_whether_it_was_one(dataset):
    for told in (True, False):
        (dataset / OURS).write_text(json.dumps({"fps": 10, "instruction": told}))
        assert ("instruction" in LeRobot.read(dataset).spec.obs) is told
        assert "instruction" not in LeRobot.read(dataset, instruction="no").spec.obs


def test_bad_values_are_named(dataset):
    with pytest.raises(DataError, match=r"instruction 'maybe'"):
        LeRobot.read(dataset, instruction="maybe")
    assert instruction_rows("ä" * 32, 3, "x").shape == (3, 64)
    assert np.array_equal(instruction_rows("", 1, "x"), np.zeros((1, 64), np.uint8))
    with pytest.raises(DataError, match=r"x: the task '.*' takes 65 bytes, an instruction has 64"):
        instruction_rows("a" * 65, 1, "x")
