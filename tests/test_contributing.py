# SPDX-License-Identifier: Apache-2.0
"""The example of CONTRIBUTING.md is run as printed: train, resume-ready checkpoint, its own tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from robopost.data.batch import Spec
from robopost.data.store import Episode, EpisodeStore

ROOT = Path(__file__).resolve().parents[1]
RUN = "import rtg_bc, sys; from robopost.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contributing")
    for body in re.findall(
        r"```(?:python|yaml)\n(# file: .*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    ):
        name = body.splitlines()[0].removeprefix("# file: ").strip()
        target = folder / ("configs/algo" if name.endswith(".yaml") else ".") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(body)
    spec = Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,), 10)
    rng = np.random.default_rng(0)
    with EpisodeStore.create(folder / "toy.zarr", spec=spec, fps=10.0, source="toy") as store:
        for _ in range(4):
            state = rng.normal(size=(11, 2)).astype(np.float32)
            action = rng.uniform(-1, 1, (10, 1)).astype(np.float32)
            store.append(
                Episode({"state": state}, action, rng.normal(size=10).astype(np.float32), False, True)
            )
    return folder


def python(place, *words):
    env = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=place, env=env, capture_output=True, text=True, timeout=120
    )


def test_three_files_are_enough_to_train(place):
    words = [
        "--config-dir",
        "configs",
        "algo=rtg_bc",
        "policy=deterministic",
        "data.path=toy.zarr",
        "env=null",
    ]
    done = python(place, "-c", RUN, "train", *words, "loop.steps=20", "loop.log_every=10", "out=run")
    assert done.returncode == 0, done.stderr
    assert (place / "run" / "checkpoints" / "LATEST").exists()
    assert '"temperature": 0.5' in (place / "run" / "config.json").read_text()


def test_bad_value_is_one_line(place):
    words = [
        "--config-dir",
        "configs",
        "algo=rtg_bc",
        "algo.temperature=0",
        "policy=deterministic",
        "env=null",
    ]
    done = python(place, "-c", RUN, "train", *words, "data.path=toy.zarr")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines() == ["error: algo.temperature=0.0 must be above 0"]


def test_its_own_tests_pass(place):
    done = python(place, "-m", "pytest", "-q", "test_rtg_bc.py")
    assert done.returncode == 0, done.stdout
