# SPDX-License-Identifier: Apache-2.0
"""Writing LeRobot sets: what is refused without the lerobot package, and what is sent to it."""

import subprocess
import sys

import numpy as np
import pytest

from robopost.data.batch import Spec
from robopost.data.convert import export_store
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore
from robopost.errors import DataError, MissingExtraError


@pytest.fixture
def store(tmp_path):
    obs = {"state": ((2,), "float32"), "image_top": ((64, 64, 3), "uint8")}
    with EpisodeStore.create(
        tmp_path / "store", spec=Spec(obs, 1, (-1.0,), (1.0,)), fps=10, source="test"
    ) as made:
        values = {"state": np.zeros((3, 2), np.float32), "image_top": np.zeros((3, 64, 64, 3), np.uint8)}
        made.append(Episode(values, np.zeros((2, 1)), np.zeros(2), False, True))
    with EpisodeStore.open(tmp_path / "store") as opened:
        yield opened


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, MissingExtraError, r"pip install 'robopost\[lerobot\]'.*ROBOPOST_LEROBOT_PYTHON"),
        ({"python": "/no/python"}, MissingExtraError, "does not start"),
        ({"python": sys.executable}, MissingExtraError, "has no lerobot"),
        ({"codec": "av2"}, DataError, "codec='av2' must be one of"),
        ({"pyton": "x"}, DataError, "Did you mean 'python'"),
    ],
)
def test_export_without_lerobot(store, tmp_path, monkeypatch, options, error, text):
    monkeypatch.delenv("ROBOPOST_LEROBOT_PYTHON", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(error, match=text) as caught:
        export_store(store, tmp_path / "out", "lerobot", options)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_export_refuses_what_encoders_cannot_hold(tmp_path):
    obs = {"image": ((30, 31, 3), "uint8")}
    with (
        EpisodeStore.create(
            tmp_path / "s", spec=Spec(obs, 1, (-1.0,), (1.0,)), fps=10, source="test"
        ) as made,
        pytest.raises(DataError, match=r"image is 30x31: encoders need.*-o video=false"),
    ):
        export_store(made, tmp_path / "out", "lerobot", {"python": sys.executable})


def test_exporter_reads_what_we_send(tmp_path):
    """The script's protocol, without lerobot: two processes, arrays come out as they went in."""
    from robopost.data.formats import lerobot_export

    arrays = {"action": np.arange(6, dtype=np.float32).reshape(3, 2), "done": np.array([False, False, True])}
    code = (
        "import sys, json, importlib.util as u\n"
        f"spec = u.spec_from_file_location('e', {lerobot_export.__file__!r})\n"
        "e = u.module_from_spec(spec); spec.loader.exec_module(e)\n"
        "head = json.loads(sys.stdin.buffer.readline())\n"
        "for task, arrays in e.receive(sys.stdin.buffer, head['episodes']):\n"
        "    print(task, {k: (v.dtype.str, v.tolist()) for k, v in arrays.items()})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lerobot_export.send_header(process.stdin, {"episodes": 2})
    lerobot_export.send_episode(process.stdin, "öffne", arrays)
    out, errors = process.communicate()
    assert out.decode().strip() == "öffne " + str({k: (v.dtype.str, v.tolist()) for k, v in arrays.items()})
    assert "the sender stopped after 1 of 2 episodes" in errors.decode()
