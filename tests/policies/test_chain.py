# SPDX-License-Identifier: Apache-2.0
"""Chains of flow and diffusion policies: against diffusers, one batch against single steps, frozen steps."""

import diffusers
import pytest
import torch

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.diffusion import Diffusion, DiffusionConfig
from robopost.policies.flow import Flow, FlowConfig

SPEC = Spec({"state": ((3,), "float32")}, 2, (-1.0, -1.0), (1.0, 1.0))


def obs(batch=3):
    return {"state": torch.randn(batch, 3, generator=torch.Generator().manual_seed(5))}


def flow(**options):
    torch.manual_seed(0)
    return Flow(FlowConfig(**{"horizon": 4, "steps": 4, "width": 16, "depth": 1} | options), SPEC)


def diffusion(**options):
    torch.manual_seed(0)
    return Diffusion(DiffusionConfig(**{"horizon": 4, "steps": 5, "width": 16, "depth": 1} | options), SPEC)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("kind", "eta", "steps"),
    [("ddim", 0.0, 5), ("ddim", 0.5, 5), ("ddim", 1.0, 3), ("ddpm", 0.0, 5), ("ddpm", 0.0, 100)],
)
def test_every_step_is_the_one_of_diffusers(kind, eta, steps, prediction):
    policy = diffusion(sampler=kind, eta=eta, steps=steps, prediction=prediction)
    options = {"set_alpha_to_one": True} if kind == "ddim" else {}
    scheduler = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[kind](
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=True,
        **options,
    )
    scheduler.set_timesteps(steps)
    cond = policy.encoder(obs())
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    for k, level in enumerate(scheduler.timesteps.tolist()):
        output = policy.predict(x, torch.full((3,), level), cond)
        draw = {"generator": torch.Generator().manual_seed(k)}
        draw |= {"eta": eta} if kind == "ddim" else {}
        theirs = scheduler.step(output, level, x, **draw).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        ours = policy.means(x[:, None], k, cond)[:, 0] + policy.sampler.std[k] * noise
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
        x = theirs


@pytest.mark.parametrize("backbone", ["mlp", "unet", "transformer"])
@pytest.mark.parametrize(
    "make",
    [flow, lambda **o: flow(variant="shortcut", **o), diffusion],
    ids=["rectified", "shortcut", "diffusion"],
)
def test_all_steps_in_one_batch_equal_the_steps_of_the_sampler(make, backbone):
    policy = make(backbone=backbone)
    x = torch.randn(3, policy.num_steps, 4, 2, generator=torch.Generator().manual_seed(1))
    cond = policy.encoder(obs())
    together = policy.means(x, 0, cond)
    for k in range(policy.num_steps):
        torch.testing.assert_close(
            together[:, k], policy.means(x[:, k : k + 1], k, cond)[:, 0], rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(policy.means(x[:, 2:], 2, cond), together[:, 2:], rtol=1e-5, atol=1e-6)


def test_the_one_batch_form_of_the_network_equals_its_plain_form():
    policy = flow(variant="shortcut")
    x = torch.randn(3, 4, 4, 2, generator=torch.Generator().manual_seed(1))
    cond, t = policy.encoder(obs()), torch.tensor([0.0, 0.25, 0.5, 0.75])
    together = policy.velocities(x, t, cond)
    for k in range(4):
        alone = policy.velocity(x[:, k], t[k].expand(3), cond)
        torch.testing.assert_close(together[:, k], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [flow, diffusion])
def test_first_steps_stay_frozen_and_travel_with_the_policy(make, tmp_path):
    policy = make()
    start = torch.Generator().manual_seed(3)
    before = policy.sample(obs(), generator=start)[2]
    policy.freeze_first(2)
    torch.testing.assert_close(
        policy.sample(obs(), generator=start.manual_seed(3))[2], before, rtol=0, atol=0
    )
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.add_(0.05)
    after = policy.sample(obs(), generator=start.manual_seed(3))[2]
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=0)
    assert not torch.equal(after[:, 3], before[:, 3])
    assert not any(p.requires_grad for p in policy.frozen.parameters())
    save_folder(tmp_path / "policy", policy_files(policy))
    loaded = load_policy(tmp_path / "policy")
    assert loaded.frozen_steps == 2
    again = loaded.sample(obs(), generator=start.manual_seed(3))[2]
    torch.testing.assert_close(again, after, rtol=0, atol=0)
    loaded.freeze_first(2)  # going on as before
    with pytest.raises(ConfigError, match=r"first 2 of .* steps frozen, now 1"):
        loaded.freeze_first(1)


def test_freezing_every_step_is_refused():
    with pytest.raises(ConfigError, match=r"4 frozen of policy.steps=4 .* Fix: fine-tune 1..4 steps"):
        flow().freeze_first(4)
    with pytest.raises(ConfigError, match=r"policy.frozen_steps=4 must lie in 0..3"):
        flow(frozen_steps=4)


def test_midpoint_is_of_second_order_on_a_linear_field():
    errors = []
    for steps in (4, 8, 16):
        policy = flow(solver="midpoint", steps=steps)
        policy.velocities = lambda x, t, cond, net=None: -1.5 * x
        x = torch.ones(1, 4, 2)
        end = policy.chain(obs(1), x)[-1]
        errors.append((end - torch.exp(torch.tensor(-1.5))).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_the_grid_lists_the_points_its_solver_asks_for():
    policy, seen = flow(solver="midpoint", steps=4), []
    policy.velocities = lambda x, t, cond, net=None: seen.append(t.item()) or torch.zeros_like(x)
    policy.sample(obs(1))
    assert seen == policy.grid.points(torch.device("cpu")).tolist()
    with pytest.raises(ConfigError, match="a shortcut model jumps whole steps"):
        FlowConfig(variant="shortcut", solver="midpoint", steps=4)
