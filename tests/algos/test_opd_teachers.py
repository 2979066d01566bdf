# SPDX-License-Identifier: Apache-2.0
"""Distillation: which teachers and options are refused, and how a teacher sees what the student saw."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from robopost.algos.vla.teachers import translated
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, ConfigError
from robopost.nets.norm import Normaliser

found = importlib.util.spec_from_file_location("opd_lab", Path(__file__).parent / "opd_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)
make, make_flow, make_policy, rollout, save = (
    getattr(lab, name) for name in ("make", "make_flow", "make_policy", "rollout", "save")
)
SPEC = lab.SPEC


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save(make_policy(7, spread=2.0), tmp_path_factory.mktemp("teacher") / "policy")


def test_teacher_is_scored_on_observations_in_its_own_units(tmp_path):
    expert = make_policy(7)
    stats = {
        key: {"mean": [3.0] * n, "std": [2.0] * n, "min": [0.0] * n, "max": [1.0] * n}
        for key, n in (("state", 3), ("action", 2))
    }
    expert.normaliser.fit(stats, obs="meanstd")
    student = make_policy(1)
    algo = make(student, save(expert, tmp_path / "teacher"))
    raw = torch.randn(5, 3) * 4
    seen = algo._teacher.observes(student.normaliser.obs({"state": raw}))
    torch.testing.assert_close(seen["state"], (raw - 3.0) / 2.0)
    same = {"state": raw}
    assert translated(same, Normaliser(SPEC), Normaliser(SPEC))["state"] is raw


def test_mismatched_teachers_are_refused(tmp_path):
    """Check 5: other normalisation keys raise; so does everything else that makes log-probabilities incomparable."""
    student = make_policy(1)
    cases = {
        "policy.horizon=4": make_policy(horizon=4),
        "policy.bins=32": make_policy(bins=32),
        "both must be": make_flow(),
    }
    other = make_policy()
    other.normaliser.action_scale[1] = 1.5
    cases["action 1: 2 from environment bounds"] = None
    for index, (words, policy) in enumerate(cases.items()):
        if policy is None:
            policy, words = (
                other,
                r"normalise actions differently \(action 1: 1.5 from environment bounds, 2 from",
            )
        with pytest.raises(ConfigError, match=words):
            make(student, save(policy, tmp_path / str(index)))
    with pytest.raises(ConfigError, match=r"algo\.teacher is empty"):
        make(student)
    with pytest.raises(CheckpointError):
        make(student, str(tmp_path / "nowhere"))
    narrow = Spec({"other": ((3,), "float32")}, 2, (-2.0, -1.0), (2.0, 3.0), 40)
    with pytest.raises(ConfigError, match="observes 'other'"):
        make(student, save(make_policy(spec=narrow), tmp_path / "narrow"))


def test_other_tokenizer_is_refused(tmp_path, monkeypatch):
    expert = save(make_policy(7), tmp_path / "teacher")
    student = make_policy(1)
    student.tokenizer_hash = "aaaa"
    make(student, expert)  # the teacher has none
    import robopost.algos.vla.teachers as module

    real = module.load_pretrained

    def load(*args, **options):
        policy = real(*args, **options)
        policy.tokenizer_hash = "bbbb"
        return policy

    monkeypatch.setattr(module, "load_pretrained", load)
    with pytest.raises(ConfigError, match="another tokenizer"):
        make(student, expert)


def test_teacher_at_zero_is_refused_before_training(teacher):
    algo = make(make_policy(1), teacher, check_teacher=7)
    asked = []

    def play(success):
        def run(policy, episodes):
            asked.append((policy, episodes))
            return success

        return run

    algo.before_rollouts(play(0.3))
    algo.before_rollouts(play(None))
    assert asked[0] == (algo._teacher.policy, 7)
    with pytest.raises(ConfigError, match="succeeds in 0 of 7 greedy episodes"):
        algo.before_rollouts(play(0.0))
    unchecked = make(make_policy(1), teacher, check_teacher=0)
    unchecked.before_rollouts(play(0.0))
    assert len(asked) == 3


def test_student_at_zero_is_warned_of_once(teacher, caplog):
    student = make_policy(1)
    algo = make(student, teacher)
    with caplog.at_level(logging.WARNING):
        algo.update(rollout(student, success=[0.0] * 4))
        assert "a student at 0 % rarely reaches states" in caplog.text
        caplog.clear()
        algo.update(rollout(student, success=[0.0] * 4))
        assert not caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kl_estimator": "sampled"}, "unknown algo.kl_estimator 'sampled'.*Did you mean 'sample'"),
        ({"divergence": "kl"}, "unknown algo.divergence"),
        ({"routing": "scpe"}, "Did you mean 'scope'"),
        ({"control_variate": True}, "algo.control_variate=true"),
        ({"kl_estimator": "sample", "top_k": 5}, "algo.top_k=5"),
        ({"kl_estimator": "sample", "divergence": "forward"}, "option of the reverse KL"),
        ({"return_to_go": True, "divergence": "jsd"}, "reward of the reverse KL"),
        ({"reward_scale": 1.25}, "algo.reward_scale=1.25 with algo.reference=none"),
        ({"reference": "student_init"}, "Fix: set both"),
        ({"lambda_outcome": 1.0}, "algo.group=1"),
        ({"routing": "scope"}, "algo.group=1: algo.routing=scope compares"),
        ({"lambda_opd": 0.0}, "nothing to learn from"),
        ({"jsd_beta": 1.5}, r"algo.jsd_beta=1.5 must lie in \[0, 1\]"),
        ({"temperature": -1.0}, "algo.temperature=-1.0"),
        ({"flow_noise": 0.0}, "algo.flow_noise=0.0"),
        ({"teacher_dtype": "int8"}, "unknown algo.teacher_dtype"),
    ],
)
def test_options_that_make_no_sense_are_refused(teacher, options, words):
    with pytest.raises(ConfigError, match=words):
        make(make_policy(1), teacher, **options)
