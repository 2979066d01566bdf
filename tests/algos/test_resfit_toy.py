# SPDX-License-Identifier: Apache-2.0
"""Acceptance check 6, shortened: ResFiT mends a base that hardly ever succeeds. In full: benchmarks/resfit_toy.py."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
found = importlib.util.spec_from_file_location(
    "point_reach", ROOT / "benchmarks" / "sides" / "point_reach.py"
)
toy = importlib.util.module_from_spec(found)
found.loader.exec_module(toy)


def test_demonstrations_are_solved_and_labelled_like_a_run_of_the_base():
    demos = toy.demonstrations(20, seed=0)
    assert int(demos.terminated.sum()) == 20
    assert float(demos.reward.sum()) == 20.0
    policy = toy.ResidualPolicy(toy.ResidualConfig(hidden=[8]), toy.SPEC, toy.Biased(0))
    labels = policy.label_demos(demos).obs["base_action"]
    # At an episode's first frame the plan is the controller's own action with bias and noise.
    first = torch.unique(demos.first_rows())
    state = demos.obs["state"][first]
    change = labels[first] - toy.controller(state[:, :2], state[:, 2:])
    free = (labels[first].abs() < 1).all(1)
    np.testing.assert_allclose(change[free].mean(0), toy.BIAS, atol=0.1)


def test_residual_learns_what_the_base_gets_wrong():
    curve = toy.learn(0, 900, every=300, num_critics=4, hidden=[64, 64], batch_size=64)
    assert curve["base"] < 0.15
    assert abs(curve[0] - curve["base"]) < 0.1  # zero start: the same but for the base's noise
    assert max(curve[600], curve[900]) > curve["base"] + 0.2
