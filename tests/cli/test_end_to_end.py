# SPDX-License-Identifier: Apache-2.0
"""The debug recipes through the command line: train, evaluate, resume, interrupt."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from robopost.artefacts.checkpoint import latest
from robopost.cli import main

RECIPES = ["debug_offline", "debug_offline_to_online", "debug_offpolicy", "debug_onpolicy", "debug_props"]
LIMIT = 20.0  # seconds a debug recipe may take


def config_of(run):
    return json.loads((run / "config.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every debug recipe, trained once."""
    folder = tmp_path_factory.mktemp("runs")
    seconds = {}
    for recipe in RECIPES:
        start = time.perf_counter()
        assert main(["train", f"recipe={recipe}", f"out={folder / recipe}"]) == 0
        seconds[recipe] = time.perf_counter() - start
    return folder, seconds


@pytest.mark.parametrize("recipe", RECIPES)
def test_debug_recipe(runs, recipe):
    folder, seconds = runs
    run = folder / recipe
    assert seconds[recipe] < LIMIT
    assert config_of(run)["env"]["name"] == "arm_reach"
    assert "robopost train recipe=" in json.loads((run / "provenance.json").read_text())["command"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/success" in line for line in lines)
    assert latest(run) is not None


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluate_a_run(runs, recipe, tmp_path, capsys):
    run = runs[0] / recipe
    assert main(["eval", f"policy={run}", "episodes=3", "seed=5", f"out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "3 episodes, seeds 5" in out
    for word in ("success", "return", "length", "95 % interval"):
        assert word in out
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["episodes"] == 3
    assert result["env"] == "arm_reach"
    assert len(result["raw"]["returns"]) == 3
    # A checkpoint and a plain policy folder are the same policy.
    assert main(["eval", f"policy={latest(run)}", "episodes=3", "seed=5", f"out={tmp_path / 'b'}"]) == 0
    again = json.loads((tmp_path / "b" / "eval.json").read_text())
    assert again["raw"] == result["raw"]


def test_default_place_of_an_evaluation_is_the_run(runs, capsys):
    run = runs[0] / "debug_offline"
    assert main(["eval", f"policy={run}", "episodes=1"]) == 0
    assert str(run / "eval") in capsys.readouterr().out.replace("\n", "")


def test_environment_settings_of_the_run_can_be_changed(runs, tmp_path):
    run = runs[0] / "debug_offline"
    assert main(["eval", f"policy={run}", "episodes=2", "env.max_steps=7", f"out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["raw"]["lengths"] == [7, 7]


def test_policy_in_an_environment_it_does_not_fit(runs, capsys):
    run = runs[0] / "debug_offline"
    assert main(["eval", f"policy={run}", "env=Hopper-v5", "episodes=1"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert "observes 'state' of shape" in err[0]


def test_out_is_not_overwritten(runs, capsys):
    run = runs[0] / "debug_offline"
    before = (run / "config.json").read_bytes()
    assert main(["train", "recipe=debug_offline", "seed=9", f"out={run}"]) == 2
    assert f"resume={run}" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_equals_one_go(recipe, tmp_path):
    """Half the steps, then `resume=` to all of them: the same weights as one run."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    steps = {"debug_offline": 40, "debug_offpolicy": 240, "debug_onpolicy": 512, "debug_props": 512}.get(
        recipe, 120
    )
    key = "online_steps" if recipe == "debug_offline_to_online" else "steps"
    words = [
        f"recipe={recipe}",
        "loop.eval_episodes=1",
        f"loop.checkpoint_every={steps // 2}",
        "loop.log_every=20",
    ]
    assert main(["train", *words, f"loop.{key}={steps}", f"out={whole}"]) == 0
    assert main(["train", *words, f"loop.{key}={steps // 2}", f"out={part}"]) == 0
    assert main(["train", f"resume={part}", f"loop.{key}={steps}"]) == 0
    assert config_of(part)["loop"][key] == steps
    a, b = (load_file(latest(run) / "model.safetensors") for run in (whole, part))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_seeds(tmp_path, capsys):
    words = [
        "recipe=debug_offline",
        "steps=2",
        "loop.eval_episodes=1",
        "seeds=2",
        "seed=3",
        f"out={tmp_path / 'run'}",
    ]
    assert main(["train", *words]) == 0
    folders = sorted(path.name for path in (tmp_path / "run").glob("seed_*"))
    assert folders == ["seed_3", "seed_4"]
    assert main(["train", f"resume={tmp_path / 'run'}", "loop.steps=4"]) == 0
    for name in folders:
        assert config_of(tmp_path / "run" / name)["loop"]["steps"] == 4
        assert latest(tmp_path / "run" / name).name.endswith("4")
    assert config_of(tmp_path / "run" / "seed_4")["seed"] == 4


def test_ctrl_c_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    words = ["train", "recipe=debug_offpolicy", "steps=1000000", "loop.checkpoint_every=100", f"out={run}"]
    # A background job inherits an ignored SIGINT, which a terminal's foreground job never has.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from robopost.cli import main; sys.exit(main({words!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and latest(run) is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == f"interrupted; resume with: robopost train resume={run}"
    assert "Traceback" not in err
    step = int(latest(run).name.removeprefix("step_"))
    assert main(["train", f"resume={run}", f"loop.steps={step + 20}", "loop.eval_episodes=1"]) == 0


def test_full_disk_while_training_is_one_line(tmp_path, monkeypatch, capsys):
    import errno

    import robopost.artefacts.checkpoint as checkpoint

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    words = ["recipe=debug_offline", "steps=2", "loop.eval_episodes=1", f"out={tmp_path / 'run'}"]
    assert main(["train", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "the disk is full" in lines[0]
    assert latest(tmp_path / "run") is None
    assert not list((tmp_path / "run").rglob("*.partial*"))
