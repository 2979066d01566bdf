# SPDX-License-Identifier: Apache-2.0
"""Broken data, checkpoints, environments and machines: one line each, exit code 2, and what was whole stays whole.

Add a row to `BROKEN`: a name and a function that breaks something in a folder holding `run` (a finished debug_offline
run with its `data.zarr`) and returns (words after `robopost`, pattern of the line).
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from robopost.artefacts.checkpoint import latest
from robopost.cli import main
from robopost.config import EnvConfig
from robopost.registry import ENVS

BC = ["train", "algo=bc", "policy=deterministic", "env=null", "steps=2"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def corrupt_store(place):
    chunks = [
        path for path in (place / "run" / "data.zarr" / "data" / "action" / "c").rglob("*") if path.is_file()
    ]
    truncate(chunks[0])
    shutil.rmtree(
        place / "run" / "data.zarr.cache"
    )  # made when the data was whole, and used as long as it is there
    return [*BC, f"data={place}/run/data.zarr", f"out={place}/new"], r".*data/action.*can't be read.*"


def lost_commit(place):
    (place / "run" / "data.zarr" / "meta" / "zarr.json").unlink()
    return [*BC, f"data={place}/run/data.zarr", f"out={place}/new"], r".*zarr\.json.*"


def text_as_data(place):
    (place / "notes.zarr").write_text("not a dataset")
    return [*BC, f"data={place}/notes.zarr", f"out={place}/new"], r".*notes\.zarr.*"


def torn_model(place):
    truncate(latest(place / "run") / "model.safetensors")
    return [
        "train",
        f"resume={place}/run",
        "loop.steps=80",
    ], r".*model\.safetensors is corrupt or truncated.*"


def torn_state(place):
    truncate(latest(place / "run") / "state.json")
    return ["train", f"resume={place}/run", "loop.steps=80"], r".*state\.json is not valid JSON.*"


def torn_policy(place):
    truncate(latest(place / "run") / "policy.safetensors")
    return ["eval", f"policy={place}/run", "episodes=1"], r".*policy\.safetensors is corrupt or truncated.*"


def policy_of_another_shape(place):
    edit(latest(place / "run") / "policy.json", lambda data: data["config"].update(hidden=[16]))
    return ["eval", f"policy={place}/run", "episodes=1"], r".*(has shape|lacks|extra tensor).*"


def unknown_policy_class(place):
    edit(latest(place / "run") / "policy.json", lambda data: data.update(name="flo"))
    return ["eval", f"policy={place}/run", "episodes=1"], r"unknown policy 'flo'\. Did you mean 'flow'\?.*"


def newer_policy_format(place):
    edit(latest(place / "run") / "policy.json", lambda data: data.update(format=99))
    return ["eval", f"policy={place}/run", "episodes=1"], r".*policy\.json: format 99, this version reads 1"


def checkpoint_of_another_algorithm(place):
    edit(place / "run" / "config.json", lambda data: data.update(algo={"name": "td3_bc", "batch_size": 8}))
    return ["train", f"resume={place}/run", "loop.steps=80"], r".*(checkpoint|algorithm).*"


def checkpoint_of_another_shape(place):
    edit(place / "run" / "config.json", lambda data: data["policy"].update(hidden=[16, 16]))
    return ["train", f"resume={place}/run", "loop.steps=80"], r"checkpoint has .* of shape .*, here it is .*"


def nan_observation(place):
    return [
        "train",
        "algo=sac",
        "env=broken",
        "steps=300",
        f"out={place}/new",
    ], r".*'state' holds NaN.*environment 0"


def nan_observation_while_recording(place):
    words = ["collect", "env=broken", "policy=random", "episodes=2", f"out={place}/new.zarr", "num_envs=1"]
    return words, r".*'state' holds NaN.*environment 0"


def missing_extra(place):
    return [
        "collect",
        "env=isaaclab",
        "policy=random",
        f"out={place}/new.zarr",
    ], r".*pip install 'robopost\[isaaclab\]'"


def missing_tracker(place):
    words = [
        "train",
        "recipe=debug_offline",
        "track=wandb",
        f"data={place}/run/data.zarr",
        f"out={place}/new",
    ]
    return words, r".*pip install 'robopost\[wandb\]'"


BROKEN = {
    function.__name__: function
    for function in (
        corrupt_store,
        lost_commit,
        text_as_data,
        torn_model,
        torn_state,
        torn_policy,
        policy_of_another_shape,
        unknown_policy_class,
        newer_policy_format,
        checkpoint_of_another_algorithm,
        checkpoint_of_another_shape,
        nan_observation,
        nan_observation_while_recording,
        missing_extra,
        missing_tracker,
    )
}
NEEDS_ABSENT = {"missing_extra": "isaaclab", "missing_tracker": "wandb"}


class NaNEnv(VectorEnv):
    """Observes NaN from its fifth step on."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs):
        self.num_envs, self.steps = num_envs, 0
        self.single_observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros((self.num_envs, 2), np.float32), {}

    def step(self, action):
        self.steps += 1
        no = np.zeros(self.num_envs, bool)
        value = np.nan if self.steps >= 5 else 0.0
        return np.full((self.num_envs, 2), value, np.float32), np.zeros(self.num_envs), no, no, {}


@pytest.fixture(scope="module", autouse=True)
def broken_env():
    ENVS.register("broken", config=EnvConfig)(lambda config, num_envs, render=None: NaNEnv(num_envs))
    yield
    del ENVS._entries["broken"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    words = ["recipe=debug_offline", "steps=4", "loop.eval_episodes=1", "loop.checkpoint_every=2"]
    assert main(["train", *words, f"out={folder / 'run'}"]) == 0
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_one_line(name, finished, tmp_path, capsys, monkeypatch):
    if name in NEEDS_ABSENT and importlib.util.find_spec(NEEDS_ABSENT[name]):
        pytest.skip(f"{NEEDS_ABSENT[name]} is installed here")
    place = tmp_path / "place"
    shutil.copytree(finished, place)
    monkeypatch.chdir(tmp_path)
    words, pattern = BROKEN[name](place)
    checkpoints = {
        path: path.read_bytes() for path in (place / "run" / "checkpoints").rglob("*") if path.is_file()
    }
    capsys.readouterr()
    code = main(words)
    err = capsys.readouterr().err
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == errors[0], "the error is the last line"
    assert re.fullmatch(pattern, errors[0].removeprefix("error: ")), errors[0]
    after = {path: path.read_bytes() for path in (place / "run" / "checkpoints").rglob("*") if path.is_file()}
    assert after == checkpoints, "a checkpoint was touched"
    assert not (place / "new" / "checkpoints" / "LATEST").exists()


def test_missing_gl(finished, tmp_path):
    """A machine without the asked OpenGL backend, in a process of its own: MuJoCo chooses it at import."""
    code = "import sys; from robopost.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["eval", f"policy={finished / 'run'}", "episodes=1", "video=1", f"out={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "MUJOCO_GL": "off", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"^error: .*(MUJOCO_GL|osmesa|egl)", done.stderr, re.MULTILINE), done.stderr
    assert not (tmp_path / "out").exists()
