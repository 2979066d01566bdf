# SPDX-License-Identifier: Apache-2.0
"""Check 6 in small: a point reaches its goal, from states; the benchmark `opd_toy` does it from images."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from robopost.algos.vla.grpo import GRPOConfig
from robopost.algos.vla.opd import VLAOPDConfig
from robopost.errors import ConfigError
from robopost.policies.pretrained import PretrainedConfig
from robopost.policies.tokens import TokenMLPConfig

spec = importlib.util.spec_from_file_location("opd_lab", Path(__file__).parent / "opd_lab.py")
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
toy = lab.toy()
KEYS = ["state"]
SIZES = TokenMLPConfig(horizon=4, hidden=[64, 64])


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Folders of a teacher (about 100 %) and a student (about 25 %), and the student's success."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("policies")
    teacher = toy.clone(SIZES, toy.demonstrations(400, 4, KEYS, 1, noise=0.5), 450, 0, lr=3e-3)
    student = toy.clone(SIZES, toy.demonstrations(20, 4, KEYS, 2), 200, 1, lr=2e-3)
    assert toy.success(teacher, KEYS) > 0.9
    start = toy.success(student, KEYS, 200)
    assert 0.05 < start < 0.35
    return toy.save(teacher, folder / "teacher"), toy.save(student, folder / "student"), start


def success_while_learning(algo, student, out, iterations=60):
    """Share of successful training episodes in each sixth of the run: 32 episodes per iteration, 2 minibatches."""
    steps = iterations * 32
    run = toy.learn(
        algo, PretrainedConfig(path=student), KEYS, out, steps=steps, log_every=steps // 6, eval_episodes=1
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/success" in line]


def test_exact_beats_sampled_beats_outcomes_at_equal_episodes(policies, tmp_path):
    teacher, student, start = policies
    common = {"lr": 5e-4, "batch_size": 100}
    variants = {
        "exact": VLAOPDConfig(teacher=teacher, check_teacher=10, **common),
        "sample": VLAOPDConfig(teacher=teacher, kl_estimator="sample", check_teacher=0, **common),
        "grpo": GRPOConfig(group=8, **common),
    }
    lines = {
        name: success_while_learning(config, student, tmp_path / name) for name, config in variants.items()
    }
    end = {name: found[-1]["train/success"] for name, found in lines.items()}
    assert end["exact"] >= 0.30
    assert end["exact"] >= 2 * start
    assert end["exact"] > end["sample"] + 0.05
    assert end["exact"] > end["grpo"] + 0.2
    distance = [line["policy/kl_teacher"] for line in lines["exact"]]
    assert distance[-1] < 0.5 * distance[0]


def test_a_teacher_that_never_succeeds_stops_the_run_before_it_begins(policies, tmp_path):
    _, student, _ = policies
    torch.manual_seed(0)
    useless = toy.clone(SIZES, toy.demonstrations(1, 4, KEYS, 5), 1, 5)
    algo = VLAOPDConfig(teacher=toy.save(useless, tmp_path / "useless"), check_teacher=10)
    with pytest.raises(ConfigError, match="succeeds in 0 of 10 greedy episodes here"):
        toy.learn(algo, PretrainedConfig(path=student), KEYS, tmp_path / "run", steps=32)
    assert not (tmp_path / "run").exists()
