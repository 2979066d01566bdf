# SPDX-License-Identifier: Apache-2.0
"""Coefficient sweeps: cells, choice, resuming, search over modules, greedy soup, the plot."""

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robopost.artefacts.checkpoint import load_policy
from robopost.cli import main
from robopost.errors import ConfigError, RobopostError
from robopost.evaluate.rollout import EvalResult
from robopost.merging import sweep as module
from robopost.merging.config import MergeConfig, parse_words
from robopost.merging.sweep import run_sweep, task_env

spec = importlib.util.spec_from_file_location("builders", Path(__file__).parent / "builders.py")
builders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builders)
TASKS = {
    "old": "env=arm_push env.max_steps=10",
    "new": "env=arm_push env.max_steps=20",
    "variation": "env=arm_push env.max_steps=30",
}
EPISODES = 40


class Evaluator:
    """Stands in for rollouts: success follows from how far along each module of a policy has gone."""

    def __init__(self, base, tuned):
        self.parents = [load_policy(path).state_dict() for path in (base, tuned)]
        self.calls = []
        self.fail_after = None

    def along(self, policy, prefix):
        """Coefficient of the module below `prefix`."""
        name = next(key for key in self.parents[0] if key.startswith(prefix) and key.endswith("weight"))
        a, b = (parent[name] for parent in self.parents)
        direction = b - a
        return float(((policy.state_dict()[name] - a) * direction).sum() / direction.square().sum())

    def __call__(self, policy, env, *, episodes, seed, **rest):
        vision, language, action = (
            self.along(policy, p) for p in ("encoder.images", "encoder.instruction", "net")
        )
        self.calls.append((env.max_steps, seed))
        if self.fail_after is not None and len(self.calls) > self.fail_after:
            raise KeyboardInterrupt
        rate = {
            10: 1 - 0.5 * language,  # old
            20: (vision + language + action) / 3,  # new
            30: 0.4 + 0.5 * vision - (language - 0.5) ** 2,  # variation: eyes fine-tuned, language half way
            40: 0.5,
        }[env.max_steps]
        wins = np.arange(episodes) < round(rate * episodes)
        return EvalResult(
            returns=wins.astype(float),
            successes=wins,
            lengths=np.full(episodes, 10),
            max_rewards=np.ones(episodes),
            seconds=1.0,
            seed=seed,
        )


@pytest.fixture
def world(tmp_path, monkeypatch):
    base, tuned = (builders.make_policy(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned")))
    evaluator = Evaluator(base, tuned)
    monkeypatch.setattr(module, "evaluate", evaluator)
    options = {"base": base, "finetuned": [tuned], "out": str(tmp_path / "sweep"), "episodes": EPISODES}
    return evaluator, options | TASKS


def values(out, split="validation"):
    stored = json.loads((Path(out) / "sweep.json").read_text())
    return {(c["point"], c["task"]): c["value"] for c in stored["cells"] if c["split"] == split}


def test_sweep_measures_every_cell_and_plots(world):
    evaluator, options = world
    run_sweep(MergeConfig(**options, alpha=[0.0, 0.5, 1.0]))
    found = values(options["out"])
    assert found == {
        ("alpha 0", "old"): 1.0,
        ("alpha 0", "new"): 0.0,
        ("alpha 0", "variation"): 0.15,
        ("alpha 0.5", "old"): 0.75,
        ("alpha 0.5", "new"): 0.5,
        ("alpha 0.5", "variation"): 0.65,
        ("alpha 1", "old"): 0.5,
        ("alpha 1", "new"): 1.0,
        ("alpha 1", "variation"): 0.65,
    }
    assert len(evaluator.calls) == 9
    assert not (Path(options["out"]) / "chosen").exists()
    assert not (Path(options["out"]) / ".merged").exists()
    text = (Path(options["out"]) / "sweep.svg").read_text()
    ElementTree.fromstring(text)
    for label in ("old skill", "new skill", "variations of the new skill", "alpha 0.5: 65.0 %"):
        assert label in text
    assert text.count('class="band"') == 3
    assert text.count("<circle") == 9


def test_choice_is_validated_and_tested_on_other_episodes(world):
    evaluator, options = world
    options["test"] = "env=arm_push env.max_steps=40"
    sweep = run_sweep(MergeConfig(**options, alpha=[0.0, 0.5, 1.0], choose="variation"))
    assert sweep.chosen == "alpha 1"  # ties with 0.5 on variation, better on the sum of all tasks
    validation = [seed for steps, seed in evaluator.calls if seed == 0]
    assert len(validation) == 9
    assert all(
        steps != 40 for steps, seed in evaluator.calls if seed == 0
    )  # test scenes are never validated on
    assert len([seed for _, seed in evaluator.calls if seed == 1_000_000]) == 3 * 4
    tested = values(options["out"], "test")
    assert {point for point, _ in tested} == {"base", "finetuned 1", "alpha 1"}
    out = Path(options["out"])
    card = (out / "chosen" / "README.md").read_text()
    assert "`alpha 1` was chosen on `variation` from validation episodes (seeds 0 .. 39)" in card
    assert "(seeds 1000000 .. 1000039), which the choice never saw" in card
    assert "| base | 100.0 % [" in card
    merged, tuned = (
        load_file(f / "policy.safetensors") for f in (out / "chosen", Path(options["finetuned"][0]))
    )
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned)


def test_retain_limits_what_may_be_lost(world):
    _, options = world
    settings = options | {"alpha": [0.25, 0.5, 1.0], "choose": "new"}
    assert run_sweep(MergeConfig(**settings, retain=0.7)).chosen == "alpha 0.5"
    with pytest.raises(ConfigError, match=r"no coefficient reaches 0.95 on old"):
        run_sweep(MergeConfig(**settings, retain=0.95, overwrite=True))


def test_an_interrupted_sweep_goes_on(world):
    evaluator, options = world
    config = MergeConfig(**options, alpha=[0.0, 0.5, 1.0], choose="variation")
    evaluator.fail_after = 5
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config)
    assert len(values(options["out"])) == 5
    assert not (Path(options["out"]) / ".merged").exists()
    evaluator.fail_after = None
    evaluator.calls.clear()
    run_sweep(config)
    assert len(evaluator.calls) == 4 + 3 * 3
    evaluator.calls.clear()
    run_sweep(config)
    assert evaluator.calls == []


def test_another_sweep_is_not_mixed_in(world):
    _, options = world
    run_sweep(MergeConfig(**options, alpha=[0.0, 1.0]))
    with pytest.raises(ConfigError, match=r"is of another sweep \(episodes differ\)"):
        run_sweep(MergeConfig(**options | {"episodes": 10}, alpha=[0.0, 1.0]))
    builders.make_policy(Path(options["base"]), 7)
    with pytest.raises(ConfigError, match=r"is of another sweep \(parents differ\)"):
        run_sweep(MergeConfig(**options, alpha=[0.0, 1.0]))


def test_more_coefficients_are_added(world):
    evaluator, options = world
    run_sweep(MergeConfig(**options, alpha=[0.0, 1.0]))
    evaluator.calls.clear()
    run_sweep(MergeConfig(**options, alpha=[0.0, 0.5, 1.0]))
    assert len(evaluator.calls) == 3


def test_sweep_of_one_module_with_the_others_fixed(world):
    _, options = world
    config = MergeConfig(
        **options, alpha=[0.0, 0.5, 1.0], modules={"vision": 1, "action": 1}, choose="variation"
    )
    assert run_sweep(config).chosen == "alpha 0.5"
    found = values(options["out"])
    assert [found[f"alpha {a:g}", "variation"] for a in (0, 0.5, 1)] == [0.65, 0.9, 0.65]


def test_search_goes_module_by_module_language_first(world):
    _, options = world
    sweep = run_sweep(MergeConfig(**options, search="modules", choose="variation"))
    assert sweep.chosen == "language:0.5,vision:1,action:1"
    points = {point for point, _ in values(options["out"])}
    assert len(points) == 5 + 4 + 4  # instead of 125
    card = (Path(options["out"]) / "chosen" / "README.md").read_text()
    for line in ("| language (6 tensors) | 0.5 |", "| action ("):
        assert line in card
    assert "coefficient of language" in (Path(options["out"]) / "sweep.svg").read_text()


def test_greedy_soup(world, tmp_path):
    _, options = world
    third = builders.make_policy(tmp_path / "third", 5)
    options["finetuned"] = [*options["finetuned"], third]
    sweep = run_sweep(MergeConfig(**options, method="greedy_soup"))
    found = values(options["out"])
    assert {point for point, _ in found} == {"soup of 1", "soup of 2", "soup of 1 + 2"}
    best = max("12", key=lambda i: found[f"soup of {i}", "variation"])
    better = found["soup of 1 + 2", "variation"] >= found[f"soup of {best}", "variation"]
    assert sweep.chosen == ("soup of 1 + 2" if better else f"soup of {best}")


def test_without_tasks_every_coefficient_is_written(tmp_path):
    pair = [builders.write_hf(tmp_path / name, builders.vla(seed)) for seed, name in enumerate("ab")]
    config = MergeConfig(base=pair[0], finetuned=pair[1:], alpha=[0.0, 0.5], out=str(tmp_path / "out"))
    run_sweep(config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alpha_0", "alpha_0.5"]
    half = builders.read_hf(tmp_path / "out" / "alpha_0.5")
    a, b = builders.vla(0), builders.vla(1)
    assert all(torch.equal(half[name], torch.lerp(a[name], b[name], 0.5)) for name in a)
    with pytest.raises(ConfigError, match="is no robopost policy, so the sweep can't evaluate it"):
        run_sweep(
            parse_words([f"base={pair[0]}", f"finetuned={pair[1]}", "alpha=0,1", "old=env=arm_push", "out=x"])
        )


def test_tasks_are_environments_alone():
    assert task_env("old", "env=arm_push env.max_steps=7").max_steps == 7
    for text, message in (
        ("env=arm_push policy=x", "'policy=x' is not of the environment"),
        ("env.max_steps=3", "env"),
        ("env=arm_pusch", "Did you mean 'arm_push'"),
    ):
        with pytest.raises(RobopostError, match=message):
            task_env("old", text)


def test_command_line_with_real_rollouts(tmp_path, capsys, monkeypatch):
    from robopost.compose import compose
    from robopost.vector import make_vec

    vec = make_vec(compose(["policy=none", "env=arm_push"], "eval").env, 1)
    monkeypatch.setattr(builders, "SPEC", vec.spec)
    vec.close()
    base, tuned = (builders.make_policy(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned")))
    out = tmp_path / "sweep"
    words = [f"base={base}", f"finetuned={tuned}", "alpha=0,1", "episodes=2", f"out={out}"]
    assert main(["merge", *words, "variation=env=arm_push env.max_steps=5", "choose=variation"]) == 0
    text = capsys.readouterr().out
    assert "validation episodes, 2 per cell" in text
    assert "chosen: alpha 0" in text
    load_policy(out / "chosen")
