# SPDX-License-Identifier: Apache-2.0
"""Runs that can't work say so before they write anything; a run that fails late keeps what it has learnt."""

import json
import shutil

import numpy as np
import pytest

from robopost.artefacts.checkpoint import latest, load_policy, policy_files, save_folder
from robopost.cli import main
from robopost.cli.train import resolve
from robopost.compose import compose
from robopost.data.batch import Spec
from robopost.data.store import Episode, EpisodeStore
from robopost.errors import CheckpointError, ConfigError, DataError, EnvError
from robopost.loops import train
from robopost.policies.flow import Flow, FlowConfig

SMALL = ["loop.steps=4", "loop.eval_episodes=2", "track.console=false", "track.tensorboard=false"]
CLONE = ["algo=td3_bc", "policy=deterministic", "policy.hidden=[8]", "algo.batch_size=8", "algo.hidden=[8]"]
ONLINE = ["algo=sac", "policy=gaussian", "policy.hidden=[8]", "algo.batch_size=8", "algo.hidden=[8]"]
ONLINE += ["algo.warmup_steps=10", "loop.steps=20", "env=InvertedPendulum-v5"]


def record(path, *, dim=4, actions=1, bias=0.0, bound=3.0):
    spec = Spec({"state": ((dim,), "float32")}, actions, (-bound,) * actions, (bound,) * actions, 20)
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, spec=spec, fps=10.0, source="toy") as made:
        for _ in range(3):
            action = rng.uniform(-3, 3, (10, actions)).astype(np.float32)
            state = rng.normal(bias, 1, (11, dim)).astype(np.float32)
            made.append(Episode({"state": state}, action, action[:, 0], terminated=False, truncated=True))
    return f"data.path={path}"


def run(*words, out):
    return train(compose([*SMALL, *words, f"out={out}"]))


@pytest.fixture
def base(tmp_path):
    spec = Spec({"state": ((4,), "float32")}, 1, (-3.0,), (3.0,), 20)
    flow = Flow(FlowConfig(horizon=4, execute=2, steps=2, width=16, depth=1, history=2), spec)
    save_folder(tmp_path / "base", policy_files(flow))
    return f"policy.base={tmp_path / 'base'}"


@pytest.mark.parametrize(
    ("words", "data", "error", "message"),
    [
        pytest.param(
            ["algo=ppo", "policy=gaussian", "algo.rollout_steps=10", "env=InvertedPendulum-v5"],
            None,
            ConfigError,
            "batch_size=64 is larger than a rollout of 10",
            id="rollout smaller than a minibatch",
        ),
        pytest.param(
            [*CLONE, "env=InvertedPendulum-v5"],
            {"dim": 3},
            ConfigError,
            "can't be evaluated here",
            id="data of another task than the environment",
        ),
        pytest.param(
            [*CLONE, "env=InvertedPendulum-v5"],
            {"actions": 2},
            ConfigError,
            "has 2 actions, env=InvertedPendulum-v5 has 1",
            id="data with other actions than the environment",
        ),
        pytest.param(
            [*ONLINE, "algo.demo_fraction=0.5"], {"dim": 5}, DataError, "demonstrations", id="foreign demos"
        ),
        pytest.param(
            [*ONLINE, "algo.demo_fraction=0.5"],
            {"actions": 2},
            DataError,
            "demonstrations 2",
            id="demo actions",
        ),
        pytest.param(ONLINE, {"dim": 5}, ConfigError, "different tasks", id="foreign statistics"),
        pytest.param(["algo=sac", "policy=gaussian"], None, ConfigError, "env is empty", id="no environment"),
        pytest.param(
            [*CLONE, "env=null"],
            {"bound": float("inf")},
            ConfigError,
            r"actions reach 2\.\d+ with policy.normalise_action=bounds.* Fix: policy.normalise_action=minmax",
            id="actions out of reach",
        ),
        pytest.param(
            [*CLONE, "env=null", "track.also=[nothing]"], {}, ConfigError, "nothing", id="unknown tracker"
        ),
    ],
)
def test_what_can_not_work_leaves_no_folder(words, data, error, message, tmp_path):
    words = words if data is None else [*words, record(tmp_path / "data.zarr", **data)]
    with pytest.raises(error, match=message):
        run(*words, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=-1"], "seed=-1 must be 0 or more"),
        (["track.video_episodes=3"], r"track.video_episodes=3 must lie in 0..2 \(loop.eval_episodes\)"),
        (["policy.history=0"], "policy.history=0 must be at least 1"),
        (["policy.horizon=0"], "policy.horizon=0 must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_named(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(*CLONE, record(tmp_path / "data.zarr"), "env=null", *words, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_was_in_the_folder_before_stays(tmp_path):
    (tmp_path / "run").mkdir()
    data = record(tmp_path / "run" / "data.zarr")
    with pytest.raises(ConfigError, match="nothing"):
        run(*CLONE, data, "env=null", "track.also=[nothing]", out=tmp_path / "run")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"data.zarr", "data.zarr.cache"}


def test_failed_evaluation_keeps_what_was_learnt(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise EnvError("observation 'state' holds NaN")

    monkeypatch.setattr("robopost.evaluate.rollout.evaluate", fail)
    with pytest.raises(EnvError, match="NaN"):
        run(*CLONE, record(tmp_path / "data.zarr"), "env=InvertedPendulum-v5", out=tmp_path / "run")
    assert latest(tmp_path / "run").name == "step_000000004"
    load_policy(tmp_path / "run")


def test_refused_resume_leaves_the_run_as_it_was(tmp_path):
    words = [*CLONE, record(tmp_path / "data.zarr"), "env=null"]
    folder = run(*words, out=tmp_path / "run")
    other = ["algo=iql", "policy=gaussian", *words[2:]]
    with pytest.raises(CheckpointError, match="written by algo"):
        train(compose([*SMALL, *other, f"resume={folder}"]))
    assert json.loads((folder / "config.json").read_text())["algo"]["name"] == "td3_bc"


def test_resume_on_changed_data_is_refused(tmp_path):
    path = tmp_path / "data.zarr"
    folder = run(*CLONE, record(path), "env=null", out=tmp_path / "run")
    shutil.rmtree(path)
    record(path, bias=1.0)
    with pytest.raises(CheckpointError, match="has changed since"):
        train(compose([*SMALL, *CLONE, f"data.path={path}", "env=null", f"resume={folder}", "loop.steps=8"]))


def test_corrupt_environment_state_is_named(tmp_path):
    folder = run(*ONLINE, out=tmp_path / "run")
    state = latest(folder) / "env.safetensors"
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"env\.safetensors is corrupt or truncated"):
        train(compose([*SMALL, *ONLINE, f"resume={folder}", "loop.steps=40"]))


def test_seeds_are_neither_overwritten_nor_forgotten(tmp_path):
    words = [*CLONE, record(tmp_path / "data.zarr"), "env=null", "seeds=3"]
    folder = run(*words, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(*words, "algo.alpha=1", out=folder)
    shutil.rmtree(folder / "seed_2")  # as if it had been killed before the last seed began
    train(resolve([f"resume={folder}"]))
    assert [path.name for path in sorted(folder.glob("seed_*"))] == ["seed_0", "seed_1", "seed_2"]
    assert latest(folder / "seed_2").name == "step_000000004"


@pytest.mark.parametrize("bound", [3.0, 2.0, float("inf")])
def test_actions_within_reach_are_learnt(bound, tmp_path):
    """Bounds map to [-1, 1] (actions beyond them are never executed), and so does the range of the data."""
    words = ["policy.normalise_action=minmax"] if bound == float("inf") else []
    data = record(tmp_path / "data.zarr", bound=bound)
    assert latest(run(*CLONE, *words, data, "env=null", out=tmp_path / "run"))


@pytest.mark.parametrize("algo", ["td3_bc", "iql"])
def test_offline_algorithms_see_the_history(algo, tmp_path):
    words = [*CLONE[2:], f"algo={algo}", f"policy={'gaussian' if algo == 'iql' else 'deterministic'}"]
    words += [record(tmp_path / "data.zarr"), "policy.history=2", "env=InvertedPendulum-v5"]
    folder = run(*words, out=tmp_path / "run")
    assert load_policy(folder).history == 2


@pytest.mark.parametrize(
    "words",
    [
        ["algo=td3_bc"],
        ["algo=td3", "algo.warmup_steps=10", "loop.steps=30", "algo.demo_fraction=0.5"],
    ],
    ids=["offline", "online"],
)
def test_residual_on_a_base_with_history_trains_and_is_evaluated(words, base, tmp_path):
    words = ["policy=residual", *CLONE[2:], "env=InvertedPendulum-v5", base, *words]
    folder = run(*words, record(tmp_path / "data.zarr"), out=tmp_path / "run")
    command = [
        "eval",
        f"policy={folder}",
        "env=InvertedPendulum-v5",
        "episodes=2",
        f"out={tmp_path / 'eval'}",
    ]
    assert main(command) == 0
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["episodes"] == 2
