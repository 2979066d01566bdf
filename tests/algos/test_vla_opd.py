# SPDX-License-Identifier: Apache-2.0
"""VLA-OPD: what an update does with a rollout, and which teachers and options are refused."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from robopost.algos.vla.frame import Decisions
from robopost.algos.vla.objectives import kl, scope_weights
from robopost.policies.tokens import TokenConfig, TokenPolicy, taken
from robopost.registry import POLICIES

found = importlib.util.spec_from_file_location("opd_lab", Path(__file__).parent / "opd_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)
make, make_flow, make_policy, ordered, rollout, save = (
    getattr(lab, name) for name in ("make", "make_flow", "make_policy", "ordered", "rollout", "save")
)
SPEC, Ordered = lab.SPEC, lab.Ordered
LENGTHS = [9, 4, 6, 2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save(make_policy(7, spread=2.0), tmp_path_factory.mktemp("teacher") / "policy")


def losses(algo, batch):
    """(loss, gradient, metrics) of the whole rollout as one minibatch."""
    data, metrics = algo.prepare(Decisions.of(batch))
    loss, found = algo.loss(data)
    algo._flat.backward(loss)
    return loss.detach(), algo._flat.grad.clone(), metrics | found


def test_loss_is_the_mean_kl_over_executed_slots(teacher):
    student = make_policy(1)
    algo = make(student, teacher)
    batch = rollout(student, lengths=LENGTHS)
    loss, _, metrics = losses(algo, batch)
    expert = algo._teacher.tokens
    total, count = 0.0, 0
    for d in range(3):
        for m, length in enumerate(LENGTHS):
            for h in range(3):
                if d * 3 + h < length:
                    obs = {"state": batch.obs["state"][d, m][None]}
                    total += kl(student.log_probs(obs), expert.log_probs(obs))[0, h].sum().item()
                    count += 2
    assert count == 2 * sum(LENGTHS)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert metrics["policy/kl_teacher"].item() == pytest.approx(total / count, rel=1e-5)
    rows = Decisions.of(batch)
    assert len(rows) == 3 + 2 + 2 + 1
    assert metrics["data/valid"].item() == pytest.approx(sum(LENGTHS) / (3 * len(rows)))
    entropies = torch.stack([metrics[f"policy/entropy_dim{i}"] for i in range(2)])
    assert metrics["policy/entropy"].item() == pytest.approx(entropies.mean().item())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_estimator": "sample", "control_variate": True},
        {"return_to_go": True},
        {"lambda_outcome": 1.0, "group": 2},
        {"routing": "scope", "group": 2},
        {"routing": "uni_opd", "group": 2},
        {"divergence": "jsd", "top_k": 4},
        {"reference": "student_init", "reward_scale": 1.25},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_what_was_not_executed_changes_nothing(teacher, options):
    """Check 5: tokens after success leave loss and gradient identical to the bit; so do rows that are padding."""
    student = make_policy(1)
    algo = make(student, teacher, **options)
    batch = rollout(student, lengths=LENGTHS)
    loss, grad, _ = losses(algo, batch)
    other = (batch.chain + 5) % student.bins
    there = batch.chunk_mask[:, :, None, :, None]
    changed = type(batch)(**{**vars(batch), "chain": torch.where(there, batch.chain, other)})
    assert not torch.equal(changed.chain, batch.chain)
    loss_changed, grad_changed, _ = losses(algo, changed)
    assert torch.equal(loss, loss_changed)
    assert torch.equal(grad, grad_changed)
    assert grad.norm() > 0


def test_all_masked_is_zero_not_nan(teacher):
    student = make_policy(1)
    algo = make(student, teacher, lambda_outcome=1.0, group=2)
    data, _ = algo.prepare(Decisions.of(rollout(student)))
    data["valid"] = torch.zeros_like(data["valid"])
    loss, metrics = algo.loss(data)
    algo._flat.backward(loss)
    assert loss.item() == 0.0
    assert not algo._flat.grad.any()
    assert all(torch.isfinite(value) for value in metrics.values())


class Vocabulary(TokenPolicy):
    """Actions are the last 16 ids of a vocabulary of 40."""

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.head = nn.Linear(3, 6 * 40)
        self.register_buffer("ids", torch.arange(24, 40), persistent=False)

    def logits(self, obs, tokens=None):
        return self.head(obs["state"]).unflatten(-1, (3, 2, 40)).index_select(-1, self.ids)


def test_logits_outside_the_action_ids_change_nothing(teacher):
    """Check 5: the softmax is over action ids alone."""
    torch.manual_seed(0)
    student = Vocabulary(TokenConfig(name="vocabulary", horizon=3, bins=16), SPEC)
    algo = make(student, teacher)
    batch = rollout(student, lengths=LENGTHS)
    loss, grad, _ = losses(algo, batch)
    with torch.no_grad():
        for p in (student.head.weight, student.head.bias):
            p.view(6, 40, -1)[:, :24] += 3.0
    loss_changed, grad_changed, _ = losses(algo, batch)
    assert torch.equal(loss, loss_changed)
    assert torch.equal(grad, grad_changed)
    assert not grad[:720].view(6, 40, 3)[:, :24].any(), "no gradient either"


def test_student_becomes_the_teacher(teacher):
    student = make_policy(1)
    algo = make(student, teacher, lr=1e-2, weight_decay=0.0, batch_size=12, epochs=2)
    first = algo.update(rollout(student))["policy/kl_teacher"]
    for seed in range(150):
        metrics = algo.update(rollout(student, seed=seed))
    assert metrics["policy/kl_teacher"] < 0.1 * first
    assert algo.updates == 151


def test_sampled_gradients_average_to_the_exact_one_in_the_algorithm(teacher):
    student = make_policy(1)
    exact, sampled = make(student, teacher), make(student, teacher, kl_estimator="sample")
    batch = rollout(student, lengths=LENGTHS)
    _, wanted, _ = losses(exact, batch)
    g, total = torch.Generator().manual_seed(0), torch.zeros_like(wanted)
    flat_obs = {"state": batch.obs["state"].flatten(0, 1)}
    for _ in range(400):
        tokens = student.sample(flat_obs, generator=g)[2]
        drawn = type(batch)(**{**vars(batch), "chain": tokens.unflatten(0, (3, 4))})
        total += losses(sampled, drawn)[1]
    assert torch.nn.functional.cosine_similarity(total, wanted, dim=0) > 0.98
    assert (total / 400).norm().item() == pytest.approx(wanted.norm().item(), rel=0.1)


def test_reused_tokens_are_weighed_by_the_truncated_ratio(teacher):
    student = make_policy(1)
    algo = make(student, teacher, kl_estimator="sample", is_cap=1.5)
    data, _ = algo.prepare(Decisions.of(rollout(student)))
    with torch.no_grad():
        algo._flat.data.add_(
            0.3 * torch.randn(algo._flat.data.shape, generator=torch.Generator().manual_seed(3))
        )
    obs = {"state": data["obs/state"]}
    log_probs = student.log_probs(obs)
    now = taken(log_probs, data["tokens"])
    ratio = (now - data["old"]).exp().clamp(max=1.5).detach()
    assert (ratio == 1.5).any()
    assert (ratio < 1.0).any()
    reward = (taken(data["teacher"], data["tokens"]) - now).detach()
    loss, _ = algo.loss(data)
    torch.testing.assert_close(loss, -(ratio * reward * now).mean())


def test_outcome_term_adds_grpo(teacher):
    student = make_policy(1)
    both = make(student, teacher, lambda_opd=0.5, lambda_outcome=2.0, group=4)
    success = [1.0, 0.0, 0.0, 0.0]
    batch = rollout(student, lengths=LENGTHS, success=success)
    loss, grad, metrics = losses(both, batch)
    _, pure, alone = losses(make(student, teacher), batch)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    slots = 2 * torch.tensor(LENGTHS) / (2 * sum(LENGTHS))
    wanted = -(slots * torch.tensor([0.75, -0.25, -0.25, -0.25]) / std).sum()
    torch.testing.assert_close(metrics["loss/outcome"], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, 0.5 * alone["loss/opd"] + 2.0 * wanted, rtol=1e-4, atol=1e-5)
    only = make(student, teacher, lambda_opd=0.0, lambda_outcome=2.0, group=4)
    torch.testing.assert_close(grad, 0.5 * pure + losses(only, batch)[1], rtol=1e-4, atol=1e-6)


def test_scope_is_the_formula_of_the_card(teacher):
    """Successes imitate themselves, failures are distilled, weighed within the group of four."""
    student = make_policy(1)
    algo = make(student, teacher, routing="scope", group=4)
    success = [1.0, 0.0, 1.0, 0.0]
    batch = rollout(student, lengths=LENGTHS, success=success)
    loss, _, _ = losses(algo, batch)
    expert = algo._teacher.tokens
    own, theirs, distance = [], [], []
    for m, length in enumerate(LENGTHS):
        obs, tokens = {"state": batch.obs["state"][:, m]}, batch.chain[:, m, 0]
        valid = batch.chunk_mask[:, m][..., None].expand(-1, -1, 2)
        ours, other = student.log_probs(obs), expert.log_probs(obs)
        own.append(taken(ours, tokens)[valid].mean())
        theirs.append(taken(other, tokens)[valid].mean())
        distance.append(kl(ours, other)[valid].mean())
        assert valid.sum() == 2 * length
    own, theirs, distance = (torch.stack(item).detach() for item in (own, theirs, distance))
    solved = torch.tensor(success) > 0
    weight = scope_weights(own, theirs, solved, 4)
    wanted = (weight * torch.where(solved, -own, distance)).sum()
    torch.testing.assert_close(loss, wanted)


def test_uni_opd_moves_successes_and_failures_apart(teacher):
    student = make_policy(1)
    algo = make(student, teacher, routing="uni_opd", group=4, margin=50.0, kl_estimator="sample")
    batch = rollout(student, lengths=LENGTHS, success=[1.0, 0.0, 1.0, 0.0])
    data, metrics = algo.prepare(Decisions.of(batch))
    rows = Decisions.of(batch)
    reward = taken(data["teacher"], rows.tokens) - data["old"] + data["bonus"]
    means = []
    for m in range(4):
        at = rows.episode == m
        means.append(reward[at][data["valid"][at]].mean())
    assert ((means[0] + means[2]) / 2 - (means[1] + means[3]) / 2).item() == pytest.approx(50.0, rel=1e-4)
    assert metrics["data/shift"] > 10
    far = (taken(data["teacher"], rows.tokens) - data["old"]).abs() > 10
    assert not (far & data["valid"]).any()


@pytest.mark.parametrize("kind", [make_policy, ordered])
def test_return_to_go_counts_what_follows_in_the_episode(kind, tmp_path, monkeypatch):
    if kind is ordered:
        POLICIES.names()  # loads all of them: the copy that this test adds to must be whole
        monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
        POLICIES.register("ordered", config=TokenConfig)(Ordered)
    expert = save(kind(5), tmp_path / "teacher")
    student = kind(1)
    algo = make(student, expert, return_to_go=True)
    batch = rollout(student, lengths=LENGTHS)
    rows = Decisions.of(batch)
    data, _ = algo.prepare(rows)
    for m, length in enumerate(LENGTHS):
        obs, tokens = {"state": batch.obs["state"][:, m]}, batch.chain[:, m, 0]
        own = -kl(student.log_probs(obs, tokens), algo._teacher.tokens.log_probs(obs, tokens)).detach()
        own = own.flatten(0, 1)[:length]  # (steps, A)
        for d in range(-(-length // 3)):
            row = int(torch.nonzero((rows.episode == m) & (rows.depth == d)))
            for h in range(min(3, length - 3 * d)):
                for a in range(2):
                    if kind is ordered:
                        wanted = own.flatten()[2 * (3 * d + h) + a + 1 :].sum()
                    else:
                        wanted = own[3 * (d + 1) :].sum()
                    torch.testing.assert_close(data["bonus"][row, h, a], wanted, rtol=1e-4, atol=1e-5)


def test_temperature_is_that_of_both_and_is_exported(teacher):
    student = make_policy(1)
    algo = make(student, teacher, temperature=1.6)
    assert student.temperature == algo._teacher.tokens.temperature == 1.6
    assert algo.export_policy().config.temperature == 1.6
    obs = {"state": torch.ones(1, 3)}
    torch.testing.assert_close(student.log_probs(obs), (student.logits(obs) / 1.6).log_softmax(-1))
    own = make_policy(1, temperature=0.7)
    assert make(own, teacher)._teacher.tokens.temperature == 0.7


def test_state_holds_the_initial_student_and_not_the_teacher(teacher):
    student = make_policy(1)
    algo = make(student, teacher, reference="student_init", reward_scale=1.25)
    names = algo.state_dict()["tensors"]
    assert any(name.startswith("initial/") for name in names)
    assert not any("teacher" in name for name in names)
    start = algo._flat.data.clone()
    algo.update(rollout(student))
    assert not torch.equal(start, algo._flat.data)
    assert torch.equal(torch.cat([p.flatten() for p in algo.initial.parameters()]), start)
    half = make(make_policy(1), teacher, teacher_dtype="float16")
    data, _ = half.prepare(Decisions.of(rollout(student)))
    assert data["teacher"].dtype == torch.float16


def test_captured_steps_get_minibatches_of_one_shape(teacher):
    student = make_policy(1)
    plain, padded = make(student, teacher, batch_size=6), make(student, teacher, batch_size=6)
    padded._one_shape = True
    data, _ = plain.prepare(Decisions.of(rollout(student, lengths=[9, 9, 9, 6])))
    ours, theirs = plain._minibatches(data, 11), padded._minibatches(data, 11)
    assert [len(part["valid"]) for part in ours] == [6, 5]
    assert [len(part["valid"]) for part in theirs] == [6, 6]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(plain.loss(a)[0], plain.loss(b)[0])


def test_compiled_update_is_the_eager_one(teacher):
    """Graph capture and vmap ask for the same: steps that are pure functions of tensors."""
    found = []
    for mode in ("eager", "compile"):
        student = make_policy(1)
        algo = make(student, teacher, batch_size=6)
        if mode == "compile":
            algo._one_shape = True
            algo.minibatch_step = torch.compile(algo.minibatch_step, backend="eager", fullgraph=False)
        for seed in range(2):
            algo.update(rollout(student, seed=seed))
        found.append(algo._flat.data.clone())
    torch.testing.assert_close(*found)
