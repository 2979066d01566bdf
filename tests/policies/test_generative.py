# SPDX-License-Identifier: Apache-2.0
"""Flow and diffusion policies: shapes, determinism, what they learn, and what padding must not do."""

import pytest
import torch

from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.base import build_policy
from robopost.policies.diffusion import Diffusion, DiffusionConfig
from robopost.policies.flow import Flow, FlowConfig, TimeGrid

SPEC = Spec({"state": ((3,), "float32")}, 2, (0.0, 0.0), (512.0, 512.0), 300)
SMALL = {"width": 32, "depth": 2}
KINDS = {
    "rectified": lambda **o: FlowConfig(steps=4, **SMALL, **o),
    "shortcut": lambda **o: FlowConfig(variant="shortcut", steps=4, shortcut_finest=16, **SMALL, **o),
    "ddim": lambda **o: DiffusionConfig(steps=5, train_steps=20, **SMALL, **o),
    "ddpm": lambda **o: DiffusionConfig(sampler="ddpm", steps=20, train_steps=20, **SMALL, **o),
}


def build(kind, **options):
    torch.manual_seed(0)
    return build_policy(KINDS[kind](**options), SPEC)


def state(rows=4, history=1):
    lead = (rows, history) if history > 1 else (rows,)
    return {"state": torch.randn(*lead, 3, generator=torch.Generator().manual_seed(1))}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", ["mlp", "unet", "transformer"])
@pytest.mark.parametrize(("history", "horizon"), [(1, 1), (1, 4), (3, 4)])
def test_shapes_and_randomness(kind, backbone, history, horizon):
    if backbone == "unet" and horizon == 1:
        pytest.skip("a U-Net of depth 2 needs an even horizon")
    policy = build(kind, backbone=backbone, history=history, horizon=horizon)
    obs = state(4, history)
    action = policy.act(obs, generator=seeded())
    assert action.chunk.shape == (4, horizon, 2)
    assert action.chunk.min() >= 0.0
    assert action.chunk.max() <= 512.0
    assert action.log_prob is None
    assert action.chain.shape == (4, len(policy_steps(policy)) + 1, horizon, 2)
    torch.testing.assert_close(policy.act(obs, generator=seeded()).chunk, action.chunk, rtol=0, atol=0)
    assert not torch.equal(policy.act(obs, generator=seeded(1)).chunk, action.chunk)


def policy_steps(policy):
    return range(policy.num_steps)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_is_a_function_of_the_observation_alone(kind):
    policy = build(kind, horizon=4)
    obs = state(4)
    first = policy.act(obs, generator=seeded(), deterministic=True).chunk
    second = policy.act(obs, generator=seeded(7), deterministic=True).chunk
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone = policy.act({"state": obs["state"][2:3]}, deterministic=True).chunk
    torch.testing.assert_close(alone, first[2:3], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_reaches_neither_loss_nor_gradient(kind):
    policy = build(kind, horizon=4)
    mask = torch.tensor([[True, True, False, False]] * 3 + [[True] * 4])
    chunk = torch.randn(4, 4, 2, generator=seeded(2))
    other = torch.where(mask.unsqueeze(-1), chunk, torch.full_like(chunk, 1e4))
    results = []
    for target in (chunk, other):
        policy.zero_grad()
        loss = policy.bc_loss(state(4), target, mask, seeded(3))
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in policy.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    for left, right in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_euler_steps_run_on_the_grid():
    policy = build("rectified", horizon=2)
    seen = []

    def record(x, t, cond, net=None):
        seen.append(t.item())
        return torch.ones_like(x)

    policy.velocities = record
    _, _, chain = policy.sample(state(1), generator=seeded())
    assert seen == [0.0, 0.25, 0.5, 0.75] == policy.grid.starts(0, 4, torch.device("cpu")).tolist()
    # velocity 1 over the whole unit interval moves every element by exactly 1
    torch.testing.assert_close(chain[:, -1] - chain[:, 0], torch.ones(1, 2, 2))
    assert TimeGrid(4).dt == 0.25


@pytest.mark.parametrize("prediction", ["sample", "velocity"])
def test_flow_loss_by_hand(prediction):
    policy = build("rectified", horizon=2, prediction=prediction)
    obs, chunk = state(3), torch.randn(3, 2, 2, generator=seeded(1))
    loss = policy.bc_loss(obs, chunk, torch.ones(3, 2, dtype=torch.bool), seeded(5))
    generator = seeded(5)
    x0 = torch.randn(3, 2, 2, generator=generator)
    t = torch.rand(3, generator=generator)
    x = (1 - t)[:, None, None] * x0 + t[:, None, None] * chunk
    target = chunk if prediction == "sample" else chunk - x0
    torch.testing.assert_close(loss, (policy.net(x, obs["state"], t) - target).square().mean())


def test_sample_prediction_gives_the_velocity_towards_the_sample():
    policy = build("rectified", horizon=2, prediction="sample")
    x, cond, t = torch.randn(3, 2, 2), state(3)["state"], torch.tensor([0.0, 0.25, 0.75])
    arrive = x + policy.velocity(x, t, cond) * (1 - t)[:, None, None]
    torch.testing.assert_close(arrive, policy.net(x, cond, t))
    # so the last Euler step, from t = 1 - 1/K, ends exactly on the network's estimate
    _, _, chain = policy.sample(state(3), generator=seeded())
    torch.testing.assert_close(chain[:, -1], policy.net(chain[:, -2], cond, torch.full((3,), 0.75)))


def test_shortcut_target_is_two_half_steps():
    policy = build("shortcut", horizon=2)
    cond = state(3)["state"]
    x, t = torch.randn(3, 2, 2, generator=seeded(1)), torch.tensor([0.0, 0.5, 0.75])
    step = torch.tensor([1.0, 0.5, 0.25])
    half = step / 2
    a = policy.velocity(x, t, cond, half)
    b = policy.velocity(x + a * half[:, None, None], t + half, cond, half)
    target = policy.shortcut_target(x, t, cond, step)
    torch.testing.assert_close(target, (a + b) / 2)
    assert not target.requires_grad
    # following the target for one step is following both halves
    torch.testing.assert_close(
        x + target * step[:, None, None],
        x + a * half[:, None, None] + b * half[:, None, None],
    )


def test_shortcut_trains_every_step_size_on_its_own_grid():
    policy = build("shortcut", horizon=1)
    seen = []
    inner = policy.output

    def record(x, t, cond, step=None):
        if torch.is_grad_enabled():
            seen.append((t, step))
        return inner(x, t, cond, step)

    policy.output = record
    policy.bc_loss(state(2000), torch.randn(2000, 1, 2), torch.ones(2000, 1, dtype=torch.bool), seeded())
    ((t, step),) = seen
    consistent = slice(0, 500)  # a quarter
    assert set(step[consistent].tolist()) == {1.0, 0.5, 0.25, 0.125}
    assert set(step[500:].tolist()) == {1 / 16}
    ratio = t[consistent] / step[consistent]
    torch.testing.assert_close(ratio, ratio.round())
    assert (t[consistent] + step[consistent] <= 1).all()
    assert t.max() < 1


def fit(policy, sample, updates, lr=4e-3):
    """Train on `sample(n, generator) -> obs, chunk`."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
    generator = seeded(11)
    for _ in range(updates):
        obs, chunk = sample(128, generator)
        loss = policy.bc_loss(obs, chunk, torch.ones(chunk.shape[:2], dtype=torch.bool), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def two_modes(rows, generator):
    """Half the actions at s + 0.5, half at s - 0.5, a little noise; s is the observation's sign times 0.2."""
    obs = torch.randint(0, 2, (rows, 1), generator=generator).float() * 2 - 1
    mode = torch.randint(0, 2, (rows, 1), generator=generator).float() - 0.5
    noise = 0.03 * torch.randn(rows, 1, 2, generator=generator)
    return {"state": obs.expand(-1, 3)}, (0.2 * obs + mode)[:, None].expand(-1, 1, 2) + noise


@pytest.mark.parametrize(
    ("config", "updates"),
    [
        (FlowConfig(horizon=1, steps=10, **SMALL), 350),
        (FlowConfig(horizon=1, steps=10, prediction="velocity", **SMALL), 350),
        (FlowConfig(horizon=1, variant="shortcut", steps=4, shortcut_finest=16, **SMALL), 600),
        (DiffusionConfig(horizon=1, train_steps=50, steps=10, prediction="epsilon", **SMALL), 350),
        (DiffusionConfig(horizon=1, train_steps=50, steps=10, prediction="sample", **SMALL), 350),
        (DiffusionConfig(horizon=1, train_steps=50, steps=10, prediction="v_prediction", **SMALL), 350),
        (DiffusionConfig(horizon=1, train_steps=50, steps=50, sampler="ddpm", **SMALL), 350),
    ],
    ids=["rectified", "rectified velocity", "shortcut", "ddim epsilon", "ddim sample", "ddim v", "ddpm"],
)
def test_learns_both_modes_given_the_observation(config, updates):
    torch.manual_seed(0)
    policy = build_policy(config, SPEC)
    fit(policy, two_modes, updates)
    with torch.no_grad():
        for sign in (-1.0, 1.0):
            obs = {"state": torch.full((500, 3), sign)}
            out = policy.sample(obs, generator=seeded(3))[0][:, 0]
            distance = torch.stack([(out - (0.2 * sign + mode)).norm(dim=1) for mode in (-0.5, 0.5)])
            near = distance.min(0).values < 0.2
            assert near.float().mean() > 0.8
            share = (distance[0] < distance[1]).float().mean()
            assert 0.35 < share < 0.65


def test_one_shortcut_step_agrees_with_many():
    """A shortcut model's single step lands near its small steps; a rectified flow's does not."""
    distances = {}
    for variant in ("shortcut", "rectified"):
        torch.manual_seed(0)
        policy = Flow(FlowConfig(horizon=1, variant=variant, steps=1, shortcut_finest=32, **SMALL), SPEC)
        fit(policy, two_modes, 500)
        obs = {"state": torch.ones(300, 3)}
        with torch.no_grad():
            policy.grid = TimeGrid(1)
            one = policy.sample(obs, generator=seeded(3))[0]
            policy.grid = TimeGrid(32)
            many = policy.sample(obs, generator=seeded(3))[0]
        distances[variant] = (one - many).norm(dim=-1).mean().item()
    assert distances["shortcut"] < 0.6 * distances["rectified"]


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'shortcut'"):
        FlowConfig(variant="shortcuts")
    with pytest.raises(ConfigError, match="Did you mean 'velocity'"):
        FlowConfig(prediction="velocty")
    with pytest.raises(ConfigError, match=r"policy.steps=3 must be a power of two"):
        FlowConfig(variant="shortcut", steps=3)
    with pytest.raises(ConfigError, match=r"policy.steps=0"):
        FlowConfig(steps=0)
    with pytest.raises(ConfigError, match=r"policy.steps=200 must lie in 1..100"):
        DiffusionConfig(steps=200)
    with pytest.raises(ConfigError, match="Did you mean 'epsilon'"):
        DiffusionConfig(prediction="epsilom")


def test_missing_diffusers_names_the_extra(monkeypatch):
    import sys

    from robopost.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'robopost\[diffusers\]'"):
        Diffusion(DiffusionConfig(), SPEC)


@pytest.mark.parametrize("mode", ["bounds", "minmax"])
def test_normaliser_round_trip_through_the_policy(mode):
    policy = build("rectified", horizon=2)
    stats = {
        "state": {"mean": [1.0, 2.0, 3.0], "std": [2.0, 1.0, 0.5], "min": [0.0] * 3, "max": [4.0] * 3},
        "action": {
            "mean": [200.0] * 2,
            "std": [50.0] * 2,
            "min": [100.0, 0.0],
            "max": [300.0, 512.0],
            "count": 7,
        },
    }
    policy.normaliser.fit(stats, obs="meanstd", action=mode, source="test")
    raw = torch.tensor([[[120.0, 500.0], [299.0, 1.0]]])
    inside = policy.normaliser.action(raw)
    assert inside.abs().max() <= 1
    torch.testing.assert_close(policy.normaliser.unnormalise_action(inside), raw)
    scaled = policy.normaliser.obs({"state": torch.tensor([[3.0, 2.0, 2.0]])})["state"]
    torch.testing.assert_close(scaled, torch.tensor([[1.0, 0.0, -2.0]]))
