# SPDX-License-Identifier: Apache-2.0
"""Data that offline algorithms can't learn from is one line; data that is merely awkward trains."""

import json

import h5py
import numpy as np
import pytest

from robopost.cli import main
from robopost.registry import ALGOS

SMALL = ["env=null", "policy.hidden=[8]", "loop.steps=4", "loop.log_every=2", "track.console=false"]
SMALL += ["algo.batch_size=8", "device=cpu"]
# Those that learn a policy of their own from rewards: cloning has none, distillation a teacher.
NAMES = sorted(
    e.name for e in ALGOS if e.target.regime == "offline" and e.name not in ("bc", "vla_opd_cached")
)


def flat(path, rows=40, *, scale=1.0, seed=0, **changed):
    """A D4RL file of episodes of ten steps; `changed` replaces arrays, None leaves one out."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(rows + 1, 3)).astype(np.float32)
    last = np.arange(1, rows + 1) % 10 == 0
    arrays = {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        "actions": (rng.uniform(-1, 1, (rows, 2)) * scale).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": last & (np.arange(rows) % 20 < 10),
        "timeouts": last & (np.arange(rows) % 20 >= 10),
    }
    with h5py.File(path, "w") as file:
        for name, value in (arrays | changed).items():
            if value is not None:
                file[name] = value
    return path


def words(algo, data, out, *more):
    hidden = ["algo.hidden=[8]"] + (["algo.vae_hidden=[8]"] if algo == "a2pr" else [])
    return [f"algo={algo}", *hidden, *SMALL, f"data.path={data}", f"out={out}", *more]


def refused(capsys, *args):
    """The one line that `robopost train` ends with."""
    capsys.readouterr()
    code = main(["train", *args])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


def planted(name, value):
    def change(path):
        with h5py.File(path, "r+") as file:
            file[name][13] = value
        return path

    return change


@pytest.mark.parametrize("algo", ["td3_bc", "prdc", "cal_ql"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (planted("observations", np.nan), "NaN or inf in 'state'"),
        (planted("actions", np.inf), "NaN or inf in 'action'"),
        (planted("rewards", np.nan), "NaN or inf in 'reward'"),
        (lambda path: flat(path, terminals=None), "lacks 'terminals'"),
    ],
    ids=["nan in observations", "inf in actions", "nan in rewards", "no terminals"],
)
def test_broken_data(algo, change, message, tmp_path, capsys):
    path = change(flat(tmp_path / "d.hdf5"))
    line = refused(capsys, *words(algo, path, tmp_path / "run", "data.format=d4rl"))
    assert message in line
    assert "Fix: " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algo", NAMES)
def test_actions_out_of_a_tanh_policy_s_reach(algo, tmp_path, capsys):
    path = flat(tmp_path / "d.hdf5", scale=2.0)
    line = refused(capsys, *words(algo, path, tmp_path / "run", "policy.normalise_action=identity"))
    assert "policy.normalise_action" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algo", NAMES)
def test_constant_dimensions_train(algo, tmp_path):
    obs = np.random.default_rng(1).normal(size=(41, 3)).astype(np.float32)
    obs[:, 1] = 5.0
    path = flat(tmp_path / "d.hdf5", observations=obs[:-1], next_observations=obs[1:])
    assert main(["train", *words(algo, path, tmp_path / "run")]) == 0
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert all(np.isfinite(v) for v in json.loads(line).values() if isinstance(v, float))


def test_fewer_steps_than_neighbours(tmp_path, capsys):
    data = flat(tmp_path / "d.hdf5")
    line = refused(capsys, *words("prdc", data, tmp_path / "run", "algo.k=40"))
    assert "algo.k=40 needs at least 41 dataset steps" in line
    assert line.endswith("has 40")
    assert not (tmp_path / "run").exists()
    assert main(["train", *words("prdc", data, tmp_path / "run", "algo.k=39")]) == 0


def test_index_of_another_dataset(tmp_path, capsys):
    one, two = flat(tmp_path / "one.hdf5"), flat(tmp_path / "two.hdf5", seed=1)
    index = f"algo.index={tmp_path / 'index'}"
    assert main(["train", *words("prdc", one, tmp_path / "first", index)]) == 0
    line = refused(capsys, *words("prdc", two, tmp_path / "run", index))
    assert "belongs to another dataset" in line
    assert not (tmp_path / "run").exists()
    for other in ("algo.beta=7.5", "algo.k=2"):
        line = refused(capsys, *words("prdc", one, tmp_path / "run", index, other))
        assert f"this run needs {other.split('=')[1]}" in line
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    assert main(["train", *words("prdc", one, tmp_path / "again", index)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == before
    line = refused(capsys, *words("prdc", one, tmp_path / "run", f"algo.index={tmp_path}"))
    assert "is there already and no neighbour index" in line
    assert one.exists()


def test_one_episode_without_its_last_observation(tmp_path, capsys):
    path = flat(tmp_path / "d.hdf5", rows=1, next_observations=None, terminals=np.zeros(1, bool))
    line = refused(capsys, *words("prdc", path, tmp_path / "run"))
    assert "no transition" in line
