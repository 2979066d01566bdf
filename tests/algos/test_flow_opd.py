# SPDX-License-Identifier: Apache-2.0
"""Distillation of flow policies along the student's own noisy chain."""

import importlib.util
from pathlib import Path

import pytest
import torch

from robopost.algos.vla.flow_opd import chain_kl, chain_means
from robopost.algos.vla.frame import Decisions
from robopost.errors import ConfigError
from robopost.policies.diffusion import Diffusion, DiffusionConfig

found = importlib.util.spec_from_file_location("opd_lab", Path(__file__).parent / "opd_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)
make, make_flow, make_policy, rollout, save = (
    getattr(lab, name) for name in ("make", "make_flow", "make_policy", "rollout", "save")
)
SPEC = lab.SPEC


def losses(algo, batch):
    """(loss, gradient, metrics) of the whole rollout as one minibatch."""
    data, metrics = algo.prepare(Decisions.of(batch))
    loss, found = algo.loss(data)
    algo._flat.backward(loss)
    return loss.detach(), algo._flat.grad.clone(), metrics | found


def test_flow_student_by_hand(tmp_path):
    """KL of equal-variance Gaussians of every step of the student's own noisy chain."""
    student, expert = make_flow(1), make_flow(2)
    algo = make(student, save(expert, tmp_path / "teacher"), flow_noise=0.2)
    g = torch.Generator().manual_seed(0)
    obs = {"state": torch.randn(4, 3, generator=g)}
    action = algo.decide(obs, g)
    assert action.chain.shape == (4, 5, 3, 2)
    raw = action.chain[:, -1].clamp(-1, 1)
    torch.testing.assert_close(action.chunk, student.normaliser.unnormalise_action(raw))
    moved = chain_means(student, obs, action.chain[:, :-1], 0)
    noise = (action.chain[:, 1:] - moved).flatten()
    assert noise.std().item() == pytest.approx(0.2, rel=0.3)
    token = make_policy(1)
    batch = rollout(token, decisions=1, lengths=[3, 1, 2, 3])
    batch = type(batch)(**{**vars(batch), "chain": action.chain[None], "obs": {"state": obs["state"][None]}})
    loss, grad, metrics = losses(algo, batch)
    total, count = 0.0, 0
    for m, length in enumerate([3, 1, 2, 3]):
        one = {"state": obs["state"][m : m + 1]}
        for k in range(4):
            x = action.chain[m, k][None, None]
            ours, theirs = (item.means(x, k, item.encoder(one))[0, 0] for item in (student, expert))
            gauss = torch.distributions.Normal
            divergence = torch.distributions.kl_divergence(gauss(ours, 0.2), gauss(theirs, 0.2))
            total += divergence[:length].sum().item()
            count += 2 * length
    assert loss.item() == pytest.approx(total / count, rel=1e-4)
    assert metrics["loss/opd"] == metrics["policy/kl_teacher"] == loss
    assert grad.norm() > 0
    torch.testing.assert_close(
        chain_kl(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), 0.5), torch.full((1, 1, 1), 2.0)
    )


def test_flow_student_learns_and_frozen_steps_stay(tmp_path):
    expert = save(make_flow(2), tmp_path / "teacher")
    student = make_flow(1, frozen_steps=2)
    algo = make(student, expert, lr=1e-3)
    token, g = make_policy(1), torch.Generator().manual_seed(0)
    frozen = [p.clone() for p in student.frozen.parameters()]
    values = []
    for seed in range(60):
        batch = rollout(token, seed=seed)
        action = algo.decide({"state": batch.obs["state"].flatten(0, 1)}, g)
        batch = type(batch)(**{**vars(batch), "chain": action.chain.unflatten(0, (3, 4))})
        values.append(algo.update(batch)["loss/opd"].item())
    assert values[-1] < 0.3 * values[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen, student.frozen.parameters(), strict=True))


def test_flow_student_refuses_what_only_tokens_have(tmp_path):
    expert = save(make_flow(2), tmp_path / "teacher")
    for options, word in (
        ({"kl_estimator": "sample"}, "kl_estimator=sample"),
        ({"divergence": "forward"}, "divergence=forward"),
        ({"lambda_outcome": 1.0, "group": 2}, "lambda_outcome"),
        ({"temperature": 1.6}, "temperature"),
        ({"return_to_go": True}, "return_to_go"),
    ):
        with pytest.raises(ConfigError, match=f"algo.{word}.* is for token policies"):
            make(make_flow(1), expert, **options)
    with pytest.raises(ConfigError, match=r"policy\.steps=4, the student has 5"):
        make(make_flow(1, steps=5), expert)
    torch.manual_seed(0)
    sizes = {
        "horizon": 3,
        "steps": 4,
        "train_steps": 20,
        "width": 16,
        "depth": 1,
        "normalise_action": "bounds",
    }
    with pytest.raises(ConfigError, match="can't score policy=diffusion"):
        make(Diffusion(DiffusionConfig(**sizes), SPEC), expert)
