# SPDX-License-Identifier: Apache-2.0
"""Naming a policy: run folder, checkpoint, npz actor, hub repository."""

import os
import shutil
import sys
import types
from pathlib import Path

import pytest

from robopost.artefacts.checkpoint import latest
from robopost.artefacts.source import local, open_policy, trained_env
from robopost.cli import main
from robopost.compose import compose
from robopost.errors import CheckpointError, ConfigError, MissingExtraError
from robopost.evaluate.rollout import evaluate

DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    assert main(["train", "recipe=debug_offline", "steps=2", "loop.eval_episodes=1", f"out={out}"]) == 0
    return out


@pytest.fixture
def hub(monkeypatch, run):
    """A hub client that knows one repository."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        if name != "team/reach":
            raise OSError(f"404 Client Error for {name}\nsecond line")
        return str(latest(run))

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_every_form_of_a_run_gives_the_same_policy(run, tmp_path):
    env = compose(["env=arm_reach"]).env
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("policy.json", "policy.safetensors"):
        shutil.copy(latest(run) / name, plain)
    returns = []
    for name in (run, latest(run), plain):
        policy, vec = open_policy(str(name), env, 2)
        assert not policy.training
        returns.append(evaluate(policy, vec, episodes=2, seed=0).returns.tolist())
        vec.close()
    assert returns[0] == returns[1] == returns[2]


def test_where_it_was_trained(run, tmp_path):
    assert trained_env(run).name == "arm_reach"
    assert trained_env(latest(run)) == trained_env(run)
    assert trained_env(tmp_path) is None
    assert trained_env("actor.npz") is None


def test_a_policy_that_does_not_fit(run):
    with pytest.raises(ConfigError, match="observes 'state' of shape"):
        open_policy(str(run), compose(["env=Hopper-v5"]).env, 1)


def test_hub_repository(run, hub):
    env = compose(["env=arm_reach"]).env
    policy, vec = open_policy("team/reach", env, 1)
    vec.close()
    assert policy.config.name == "deterministic"
    assert hub == [("team/reach", ("policy.json", "policy.safetensors", "config.json"))]
    with pytest.raises(
        CheckpointError, match=r"no folder team/none here, .*: 404 Client Error for team/none$"
    ):
        local("team/none")


@pytest.mark.parametrize("name", ["runs/none", "./a/b", "a/b/c", "none", "models/actor.npz"])
def test_paths_never_ask_the_hub(name, hub):
    assert local(name) == Path(name)
    assert hub == []


def test_hub_without_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'robopost\[hub\]'"):
        local("team/reach")


@pytest.mark.skipif(not (DATA / "policies_mujoco").exists(), reason=f"no reference policies at {DATA}")
def test_actor_knows_its_environment(tmp_path, capsys):
    actor = DATA / "policies_mujoco" / "halfcheetah_sac.npz"
    assert trained_env(actor) == "HalfCheetah-v5"
    words = ["eval", f"policy={actor}", "episodes=2", "env.max_steps=100", f"out={tmp_path}"]
    assert main(words) == 0
    assert "in HalfCheetah-v5: 2 episodes" in capsys.readouterr().out
