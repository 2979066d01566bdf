# SPDX-License-Identifier: Apache-2.0
"""Normalised scores: the formula, which tasks have references, suites kept apart, where scores show up."""

import json

import numpy as np
import pytest

from robopost.cli import main
from robopost.compose import compose
from robopost.errors import ConfigError
from robopost.evaluate.rollout import EvalResult
from robopost.evaluate.scores import FOLDER, find_references, load_references, suites
from robopost.evaluate.statistics import Interval


def env(*words):
    return compose([*words, "out=-"], "collect").env


def test_the_formula():
    hopper = load_references("d4rl_v2")["hopper"]
    assert hopper.score(-20.272305) == 0.0
    assert hopper.score(3234.3) == 100.0
    assert hopper.score(1000.0) == pytest.approx(100 * 1020.272305 / 3254.572305)
    assert load_references("d4rl_v2")["halfcheetah"].score(0.0) == pytest.approx(2.2567, abs=1e-4)
    scored = hopper.interval(Interval(1000.0, -20.272305, 3234.3, 30, 0.9))
    assert (scored.low, scored.high, scored.n, scored.level) == (0.0, 100.0, 30, 0.9)


def test_suites_are_never_mixed():
    """A task of one suite is found by its own environment alone, and no environment belongs to two suites."""
    assert suites() == ["d4rl_v2", "mujoco_v5"]
    ids = [item.env for suite in suites() for item in load_references(suite).values()]
    assert len(ids) == len(set(ids))
    for name, suite in (("Hopper-v5", "mujoco_v5"), ("Hopper-v2", "d4rl_v2"), ("HalfCheetah-v2", "d4rl_v2")):
        found = find_references(env(f"env={name}"))
        assert found is not None
        assert (found.suite, found.env) == (suite, name)
    with pytest.raises(ConfigError, match=r"unknown suite 'd4rl'\. .*Available: d4rl_v2, mujoco_v5"):
        load_references("d4rl")


def test_references_of_our_suite_are_measured():
    data = json.loads((FOLDER / "mujoco_v5.json").read_text())
    assert set(data["tasks"]) == {"hopper", "halfcheetah", "walker2d", "arm_push"}
    for item in data["tasks"].values():
        assert item["random"]["policy"] == "random"
        assert item["random"]["episodes"] == item["expert"]["episodes"] == 100
        assert item["expert"]["mean"] > item["random"]["mean"]
    assert "mujoco" in data["packages"]


@pytest.mark.parametrize(
    ("words", "task"),
    [
        (["env=hopper"], "hopper"),
        (["env=Walker2d-v5", "env.num_envs=4"], "walker2d"),
        (["env=arm_push", "env.threads=1"], "arm_push"),
        (["env=arm_reach"], None),
        (["env=Ant-v5"], None),
        (["env=Hopper-v4"], None),
        # Another task under the same id has no reference returns.
        (["env=hopper", "env.max_steps=500"], None),
        (["env=gymnasium", "env.id=Hopper-v5", "env.kwargs={ctrl_cost_weight: 0}"], None),
        (["env=arm_push", "env.reward=sparse"], None),
        (["env=arm_push", "env.tolerance=0.05"], None),
    ],
)
def test_which_tasks_have_references(words, task):
    found = find_references(env(*words))
    assert (found.task if found else None) == task


def result(references):
    returns = np.array([100.0, 300.0])
    return EvalResult(returns, None, np.array([5, 5]), returns, 0.1, "Hopper-v5", references=references)


def test_results_carry_the_suite():
    references = load_references("mujoco_v5")["hopper"]
    scored = result(references)
    expected = references.score(200.0)
    assert scored.metrics()["eval/normalised_score"] == expected
    stored = scored.to_json()
    named = {key: stored["normalised_score"][key] for key in ("suite", "version", "task", "value")}
    assert named == {"suite": "mujoco_v5", "version": references.version, "task": "hopper", "value": expected}
    again = EvalResult.from_json(json.loads(json.dumps(stored)))
    assert again.metrics() == scored.metrics()
    assert any("mujoco_v5 version" in line for line in scored.summary())
    plain = result(None)
    assert "eval/normalised_score" not in plain.metrics()
    assert plain.to_json()["normalised_score"] is None
    assert EvalResult.from_json(plain.to_json()).references is None


def test_training_and_eval_report_scores(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["recipe=debug_offline", "env=arm_push", "data.collect=2", "loop.steps=2", "loop.eval_episodes=2"]
    assert main(["train", *words, f"out={run}"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval/normalised_score"] for line in lines if "eval/return" in line]
    references = load_references("mujoco_v5")["arm_push"]
    assert scores == [references.score(line["eval/return"]) for line in lines if "eval/return" in line]
    assert scores
    capsys.readouterr()
    assert main(["eval", f"policy={run}", "episodes=2", f"out={tmp_path / 'eval'}"]) == 0
    assert f"score (mujoco_v5 version {references.version})" in capsys.readouterr().out
    stored = json.loads((tmp_path / "eval" / "eval.json").read_text())["normalised_score"]
    assert (stored["suite"], stored["n"]) == ("mujoco_v5", 2)
