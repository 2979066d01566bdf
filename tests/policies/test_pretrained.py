# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.config import PolicyConfig
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, ConfigError
from robopost.policies.base import build_policy
from robopost.policies.chunked import StepPolicy
from robopost.policies.flow import FlowConfig
from robopost.policies.pretrained import PretrainedConfig, load_pretrained
from robopost.policies.reference import Reference, ReferenceConfig, index_entry, load_reference

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", ROOT.parent / "shared" / "data"))
SPEC = Spec({"state": ((3,), "float32")}, 2, (-1.0, -1.0), (1.0, 1.0), 50)


def data(*parts):
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference data {path} is absent (set ROBOPOST_TEST_DATA)")
    return path


def write_actor(folder, entry=None, **arrays):
    rng = np.random.default_rng(0)
    made = {
        "w0": rng.normal(size=(4, 3)),
        "b0": rng.normal(size=4),
        "w1": rng.normal(size=(2, 4)),
        "b1": rng.normal(size=2),
    } | arrays
    made = {key: np.asarray(value, np.float32) for key, value in made.items()}
    np.savez(folder / "actor.npz", **made)
    described = {"file": "actor.npz", "env": "Toy-v0", "activation": "relu", "output": "clip"} | (entry or {})
    (folder / "index.json").write_text(json.dumps([described]))
    return folder / "actor.npz", made


def forward(made, x, activation):
    return made["w1"] @ activation(made["w0"] @ x + made["b0"]) + made["b1"]


def relu(x):
    return np.maximum(x, 0)


def test_clipped_actor_by_numpy(tmp_path):
    mean, var = np.array([1.0, -1.0, 0.0]), np.array([4.0, 1.0, 0.25])
    path, made = write_actor(tmp_path, {"clip_obs": 1.5, "eps": 1e-8}, obs_mean=mean, obs_var=var)
    policy = load_reference(path, SPEC)
    x = np.array([2.0, 3.0, 0.5], np.float32)
    scaled = np.clip((x - mean) / np.sqrt(var + 1e-8), -1.5, 1.5)
    assert scaled.tolist() == pytest.approx([0.5, 1.5, 1.0])
    expected = np.clip(forward(made, scaled, relu), -1, 1)
    chunk = policy.act({"state": torch.from_numpy(x)[None]}, deterministic=True).chunk
    assert chunk.shape == (1, 1, 2)
    np.testing.assert_allclose(chunk[0, 0], expected, atol=1e-6)


def test_tanh_actor_is_scaled_to_the_bounds(tmp_path):
    path, made = write_actor(tmp_path, {"output": "tanh", "activation": "tanh"})
    wide = Spec({"state": ((3,), "float32")}, 2, (-2.0, 0.0), (2.0, 10.0))
    x = np.array([0.3, -0.2, 0.1], np.float32)
    squashed = np.tanh(forward(made, x, np.tanh))
    chunk = load_reference(path, wide).act({"state": torch.from_numpy(x)[None]}, deterministic=True).chunk
    np.testing.assert_allclose(chunk[0, 0], [2 * squashed[0], 5 + 5 * squashed[1]], atol=1e-5)


def test_dapg_actor_shifts_input_and_output(tmp_path):
    path, made = write_actor(
        tmp_path,
        in_shift=[1.0, 0.0, 0.0],
        in_scale=[2.0, 1.0, 1.0],
        out_shift=[0.1, 0.0],
        out_scale=[0.05, 0.1],
        log_std=[-1.0, -1.0],
    )
    x = np.array([0.3, -0.2, 0.1], np.float32)
    expected = 0.05 * forward(made, np.array([-0.35, -0.2, 0.1]), np.tanh)[0] + 0.1
    chunk = load_reference(path, SPEC).act({"state": torch.from_numpy(x)[None]}, deterministic=True).chunk
    assert chunk[0, 0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_stochastic_actions_use_the_stored_std(tmp_path):
    zeros = {"w1": np.zeros((2, 4)), "b1": np.zeros(2)}
    path, _ = write_actor(tmp_path, log_std=np.log([0.1, 0.2]), **zeros)
    policy = load_reference(path, SPEC)
    obs = {"state": torch.zeros(20_000, 3)}
    chunk = policy.act(obs, generator=torch.Generator().manual_seed(0)).chunk[:, 0]
    np.testing.assert_allclose(chunk.std(0), [0.1, 0.2], rtol=0.02)
    assert not policy.act(obs, deterministic=True).chunk.any()
    head = {"logstd_w": np.zeros((2, 4)), "logstd_b": np.log([0.3, 0.05]), **zeros}
    path, _ = write_actor(tmp_path, {"output": "tanh"}, **head)
    chunk = load_reference(path, SPEC).act(obs, generator=torch.Generator().manual_seed(0)).chunk[:, 0]
    np.testing.assert_allclose(chunk.atanh().std(0), [0.3, 0.05], rtol=0.02)


def test_time_feature_counts_each_environment_on_its_own():
    policy = Reference(ReferenceConfig(obs_mode="time_feature"), SPEC)
    stepper = StepPolicy(policy, 2)
    state = torch.zeros(2, 3)
    seen = []
    inner = policy.features
    policy.features = lambda *x: seen.append(inner(*x)) or seen[-1]
    stepper.reset()
    for _ in range(3):
        stepper.act({"state": state})
    stepper.reset(torch.tensor([True, False]))
    stepper.act({"state": state})
    left = torch.stack(seen)[:, :, -1]
    torch.testing.assert_close(left, torch.tensor([[1.0, 1.0], [0.999, 0.999], [0.998, 0.998], [1.0, 0.997]]))
    stepper.reset()
    stepper.act({"state": state})
    assert seen[-1][:, -1].tolist() == [1.0, 1.0]


def test_time_feature_counts_on_when_some_environments_are_asked():
    """What happens behind a residual at an episode's end: `only` the new episode is asked for its first step."""
    policy = Reference(ReferenceConfig(obs_mode="time_feature"), SPEC)
    seen = []
    inner = policy.features
    policy.features = lambda *x: seen.append(inner(*x)) or seen[-1]
    stepper, obs = StepPolicy(policy, 3), {"state": torch.zeros(3, 3)}
    left = lambda: seen[-1][:, -1].tolist()  # noqa: E731
    stepper.act(obs)
    stepper.act(obs)
    ended = torch.tensor([False, True, False])
    stepper.reset(ended)
    stepper.act(obs, only=ended)
    assert left() == [1.0]
    stepper.act(obs)
    assert left() == pytest.approx([0.998, 0.999, 0.998])
    # Another user of the same policy (an evaluation with fewer environments) changes nothing here ...
    StepPolicy(policy, 1).act({"state": torch.zeros(1, 3)})
    assert left() == [1.0]
    saved = stepper.state_dict()
    stepper.act(obs)
    assert left() == pytest.approx([0.997, 0.998, 0.997])
    # ... and a resumed run goes on counting.
    twin = StepPolicy(policy, 3)
    twin.load_state_dict(saved)
    twin.act(obs)
    assert left() == pytest.approx([0.997, 0.998, 0.997])
    # On its own the policy counts by row.
    for expected in (1.0, 0.999):
        policy.act(obs)
        assert left() == pytest.approx([expected] * 3)


def test_ant_actor_sees_zeros_in_place_of_contact_forces():
    spec = Spec({"state": ((105,), "float32")}, 8, (-1.0,) * 8, (1.0,) * 8)
    policy = Reference(ReferenceConfig(obs_mode="ant27_zeros_time"), spec)
    out = policy.features(torch.arange(1.0, 106.0)[None])
    assert out.shape == (1, 112)
    assert out[0, :27].tolist() == list(range(1, 28))
    assert not out[0, 27:111].any()
    assert out[0, 111] == 1.0


def test_reference_policy_survives_its_own_checkpoint(tmp_path):
    path, _ = write_actor(tmp_path, obs_mean=[1.0, 2.0, 3.0], obs_var=[1.0, 4.0, 9.0], log_std=[0.0, 0.0])
    policy = load_reference(path, SPEC)
    save_folder(tmp_path / "saved", policy_files(policy))
    path.unlink()
    loaded = load_pretrained(tmp_path / "saved", SPEC)
    assert isinstance(loaded, Reference)
    obs = {"state": torch.randn(4, 3)}
    left, right = policy.act(obs, deterministic=True).chunk, loaded.act(obs, deterministic=True).chunk
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.fixture
def flow_folder(tmp_path):
    torch.manual_seed(0)
    policy = build_policy(
        FlowConfig(horizon=4, execute=2, history=2, width=16, depth=1, obs_keys=["state"]), SPEC
    )
    stats = {"state": {"min": [0.0] * 3, "max": [2.0] * 3}, "action": {"min": [-0.5] * 2, "max": [0.5] * 2}}
    policy.normaliser.fit(stats, obs="minmax", action="minmax", source="toy data")
    save_folder(tmp_path / "policy", policy_files(policy))
    return policy, tmp_path / "policy"


def test_pretrained_config_takes_the_shape_of_what_it_loads(flow_folder):
    policy, folder = flow_folder
    config = PretrainedConfig(path=str(folder))
    assert (config.horizon, config.execute, config.history) == (4, 2, 2)
    loaded = build_policy(config, SPEC)
    assert loaded.registry_name == "flow"
    assert loaded.normaliser_fixed
    assert loaded.normaliser.provenance["source"] == "toy data"
    obs = {"state": torch.randn(3, 2, 3)}
    torch.testing.assert_close(
        loaded.act(obs, deterministic=True).chunk, policy.act(obs, deterministic=True).chunk, rtol=0, atol=0
    )
    assert build_policy(PretrainedConfig(path=str(folder), execute=3), SPEC).execute == 3
    assert load_policy(folder).execute == 2


def test_misfits_are_named(flow_folder, tmp_path):
    _, folder = flow_folder
    with pytest.raises(ConfigError, match="execute=9"):
        build_policy(PretrainedConfig(path=str(folder), execute=9), SPEC)
    with pytest.raises(ConfigError, match=r"policy.path is empty"):
        build_policy(PretrainedConfig(), SPEC)
    with pytest.raises(ConfigError, match=r"observes 'state' of shape \(3,\), here it is \(4,\)"):
        load_pretrained(folder, Spec({"state": ((4,), "float32")}, 2, (-1.0,) * 2, (1.0,) * 2))
    with pytest.raises(ConfigError, match="observes 'state', the environment offers image"):
        load_pretrained(folder, Spec({"image": ((9, 9, 3), "uint8")}, 2, (-1.0,) * 2, (1.0,) * 2))
    with pytest.raises(ConfigError, match="has 2 actions, the environment has 3"):
        load_pretrained(folder, Spec({"state": ((3,), "float32")}, 3, (-1.0,) * 3, (1.0,) * 3))
    with pytest.raises(CheckpointError, match="does not exist"):
        PretrainedConfig(path=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="horizon and history are 1"):
        Reference(ReferenceConfig(horizon=2), SPEC)


def test_unreadable_actors_are_named(tmp_path):
    path, _ = write_actor(tmp_path)
    with pytest.raises(ConfigError, match="needs an environment"):
        load_pretrained(path)
    with pytest.raises(CheckpointError, match=r"made for Toy-v0: inputs and actions \(3, 2\), here \(5, 2\)"):
        load_reference(path, Spec({"state": ((5,), "float32")}, 2, (-1.0,) * 2, (1.0,) * 2))
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"doesn't describe 'actor.npz'"):
        load_reference(path, SPEC)
    (tmp_path / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"needs a readable index.json"):
        load_reference(path, SPEC)
    path.write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="not a readable npz"):
        load_reference(path, SPEC)
    objects = tmp_path / "objects.npz"
    np.savez(objects, w0=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="not a readable npz"):
        load_reference(objects, SPEC)


def test_config_fields_a_loop_reads_exist():
    assert {"horizon", "execute", "history"} <= {f for f in PolicyConfig.__dataclass_fields__}


# One episode each; all actors over ten episodes are measured by `robopost bench reference_policies`.
SHORT = [
    ("halfcheetah_tqc.npz", "HalfCheetah-v5", 0.1),
    ("hopper_trpo.npz", "Hopper-v5", 0.02),
    ("swimmer_ppo.npz", "Swimmer-v5", 0.1),  # time feature
    ("ant_trpo.npz", "Ant-v5", 0.1),  # zero-padded observation
]


@pytest.mark.parametrize(("name", "env", "tolerance"), SHORT)
def test_published_actor_reproduces_its_return(name, env, tolerance):
    gym = pytest.importorskip("gymnasium")
    path = data("policies_mujoco", name)
    made = gym.make(env)
    low, high = (tuple(float(v) for v in bound) for bound in (made.action_space.low, made.action_space.high))
    spec = Spec({"state": (made.observation_space.shape, "float32")}, len(low), low, high, 1000)
    policy = load_reference(path, spec)
    state, _ = made.reset(seed=0)
    total = 0.0
    for _ in range(1000):
        obs = {"state": torch.from_numpy(state.astype(np.float32))[None]}
        state, reward, terminated, _, _ = made.step(policy.act(obs, deterministic=True).chunk[0, 0].numpy())
        assert not terminated
        total += float(reward)
    made.close()
    assert total == pytest.approx(index_entry(path)["mean_return"], rel=tolerance)


def test_published_door_policy_opens_the_door():
    gym = pytest.importorskip("gymnasium")
    robotics = pytest.importorskip("gymnasium_robotics")
    path = data("adroit", "door_dapg_policy.npz")
    gym.register_envs(robotics)
    made = gym.make("AdroitHandDoor-v1", max_episode_steps=200)
    spec = Spec({"state": ((39,), "float32")}, 28, (-1.0,) * 28, (1.0,) * 28, 200)
    policy = load_reference(path, spec)
    state, _ = made.reset(seed=0)
    success, total = False, 0.0
    for _ in range(200):
        obs = {"state": torch.from_numpy(state.astype(np.float32))[None]}
        state, reward, _, _, info = made.step(policy.act(obs, deterministic=True).chunk[0, 0].numpy())
        success |= bool(info["success"])
        total += float(reward)
    made.close()
    assert success
    assert total == pytest.approx(index_entry(path)["mean_return"], rel=0.05)
