# SPDX-License-Identifier: Apache-2.0
"""Distillation from recorded rollouts: exact bins, scores made once, and what the recorded form can't do."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from robopost.algos.vla.objectives import kl
from robopost.algos.vla.opd_cached import CachedOPD, CachedOPDConfig
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.errors import ConfigError, DataError
from robopost.policies.tokens import taken

found = importlib.util.spec_from_file_location("opd_lab", Path(__file__).parent / "opd_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)
SPEC = lab.SPEC


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return lab.save(lab.make_policy(7, spread=2.0), tmp_path_factory.mktemp("teacher") / "policy")


def record(student, lengths=(7, 5, 9), seed=0, off=0.0):
    """Rollouts of `student` (chunks of 3, all executed) among random states, in environment units, and their bins."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    episodes, bins = [], []
    for length in lengths:
        state = rng.normal(size=(length + 1, 3)).astype(np.float32)
        asked = {"state": torch.from_numpy(state[:length:3])}
        action = student.act(asked, generator=g)
        bins.append(action.chain[:, 0].flatten(0, 1)[:length])
        executed = action.chunk.flatten(0, 1)[:length].numpy() + off
        reward = np.zeros(length, np.float32)
        episodes.append(Episode({"state": state}, executed, reward, terminated=False, truncated=True))
    dataset = Dataset.from_episodes(episodes, SPEC)
    return dataset.normalise(student.normaliser), torch.cat(bins)


def make(student, teacher, dataset, **options):
    algo = lab.make(student, teacher, cls=CachedOPD, config_cls=CachedOPDConfig, **options)
    algo.attach(dataset)
    return algo


def batch_of(algo, dataset, steps):
    return dataset.chunks_at(
        torch.tensor(steps), algo.policy.horizon, history=algo.policy.history, extra=algo.needs.extra
    )


def test_recorded_actions_give_the_bins_back_exactly():
    student = lab.make_policy(1, bins=256)
    dataset, bins = record(student, lengths=(60, 61))
    found = student.encode(dataset.action)
    # The last two bins share a centre.
    assert torch.equal(found, bins.clamp(max=254))


def test_loss_is_the_kl_of_cached_scores(teacher):
    student = lab.make_policy(1)
    dataset, _ = record(student)
    algo = make(student, teacher, dataset, teacher_dtype="float32")
    steps = [0, 5, 6, 12, 20, 3]
    batch = batch_of(algo, dataset, steps)
    assert batch.extra["step"].tolist() == steps
    expert = algo._teacher.tokens
    slots = kl(student.log_probs(batch.obs), expert.log_probs(batch.obs))
    wanted = slots[batch.chunk_mask].mean().item()
    real, seen = expert.log_probs, []
    expert.log_probs = lambda *args: seen.append(1) or real(*args)
    metrics = algo.update(batch)
    assert not seen, "the teacher is asked in attach alone"
    assert metrics["loss/opd"].item() == pytest.approx(wanted, rel=1e-5)
    assert batch.chunk_mask.sum() == 3 + 2 + 1 + 3 + 1 + 3


def test_sampled_form_counts_whole_decisions_alone(teacher):
    """A = log pi_T (cached) - log pi (now) of recorded tokens, where a decision began: steps 0, 3, .. of an episode."""
    student = lab.make_policy(1)
    dataset, bins = record(student)
    algo = make(student, teacher, dataset, kl_estimator="sample", teacher_dtype="float32")
    steps = [0, 1, 3, 7, 8, 13]  # episodes begin at 0, 7, 12
    batch = batch_of(algo, dataset, steps)
    whole = [0, 2, 3]
    tokens = student.encode(batch.action)
    now = taken(student.log_probs(batch.obs), tokens)
    reward = taken(algo._teacher.tokens.log_probs(batch.obs), tokens) - now
    wanted = -(reward * now)[whole].mean().item()
    assert torch.equal(tokens[0].flatten(0, 0), bins[0:3])
    assert algo.update(batch)["loss/opd"].item() == pytest.approx(wanted, rel=1e-4)


def test_student_nears_the_teacher_on_recorded_states(teacher):
    student = lab.make_policy(1)
    dataset, _ = record(student, lengths=(30, 30))
    algo = make(student, teacher, dataset, lr=1e-2, weight_decay=0.0, batch_size=32)
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(150):
        steps = dataset.draw(32, g, chunks=True)
        batch = dataset.chunks_at(steps, 3, extra=("step",))
        values.append(algo.update(batch)["policy/kl_teacher"].item())
    assert values[-1] < 0.1 * values[0]
    assert algo._scores["teacher"].dtype == torch.float16
    assert not any("teacher" in key or "scores" in key for key in algo.state_dict()["tensors"])


def test_extrapolation_keeps_the_student_it_began_with(teacher):
    student = lab.make_policy(1)
    dataset, _ = record(student)
    algo = make(student, teacher, dataset, reference="student_init", reward_scale=2.0)
    before = algo._scores["reference"].clone()
    algo.update(batch_of(algo, dataset, [0, 1, 2]))
    other = make(lab.make_policy(3), teacher, dataset, reference="student_init", reward_scale=2.0)
    other.load_state_dict(algo.state_dict())
    other.attach(dataset)
    assert torch.equal(other._scores["reference"], before), "resumed: still the initial student's"


def test_what_is_refused(teacher):
    student = lab.make_policy(1)
    dataset, _ = record(student, off=0.02)
    make(student, teacher, dataset)
    with pytest.raises(DataError, match="not tokens of this student"):
        make(student, teacher, dataset, kl_estimator="sample")
    with pytest.raises(ConfigError, match="algo=vla_opd_cached fine-tunes a token policy"):
        make(lab.make_flow(0), teacher, dataset)
    with pytest.raises(ConfigError, match=r"algo\.teacher is empty"):
        make(student, "", dataset)
    with pytest.raises(ConfigError, match=r"algo\.batch_size=0"):
        make(student, teacher, dataset, batch_size=0)
