# SPDX-License-Identifier: Apache-2.0
"""Adapters: observation mapping, in-process stepping, Push-T, gymnasium-robotics, light imports, configs."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode
from robopost_envs.adapters import pusht, robotics
from robopost_envs.adapters.gymnasium import GymnasiumConfig, make
from robopost_envs.adapters.inprocess import InProcessVecEnv
from robopost_envs.adapters.observations import BatchAdapter, ObservationAdapter

from robopost.errors import ConfigError, EnvError, MissingExtraError
from robopost.registry import ENVS
from robopost.vector import VecEnv, make_vec

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", ROOT.parent / "shared" / "data"))


def box(*shape, high=np.inf, dtype=np.float32):
    return Box(0 if dtype == np.uint8 else -high, 255 if dtype == np.uint8 else high, shape, dtype)


# --- observations


def test_goal_dicts_become_observation_achieved_desired():
    adapter = ObservationAdapter(
        Dict({"achieved_goal": box(1), "desired_goal": box(1), "observation": box(2)})
    )
    assert adapter.parts == [("observation", 2), ("achieved_goal", 1), ("desired_goal", 1)]
    out = adapter({"achieved_goal": [3.0], "desired_goal": [4.0], "observation": [1.0, 2.0]})
    assert out["state"].tolist() == [1, 2, 3, 4]
    assert out["state"].dtype == np.float32


def test_nested_dicts_scalars_and_images():
    space = Dict({"cam": box(4, 4, 3, dtype=np.uint8), "joint": Dict({"a": box(2), "b": box()})})
    adapter = ObservationAdapter(space)
    assert set(adapter.space.spaces) == {"state", "image"}
    image = np.full((4, 4, 3), 7, np.uint8)
    out = adapter({"cam": image, "joint": {"a": [1.0, 2.0], "b": 3.0}})
    assert out["state"].tolist() == [1, 2, 3]
    assert out["image"] is image
    two = ObservationAdapter(Dict({"image_left": space["cam"], "wrist": space["cam"]}))
    assert set(two.space.spaces) == {"image_left", "image_wrist"}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Dict({"mode": Discrete(3)}), "mode is a Discrete"),
        (box(8, 8, 3), r"shape \(8, 8, 3\) and dtype float32: images must be uint8"),
    ],
)
def test_unsupported_observations_are_named(space, message):
    with pytest.raises(EnvError, match=message):
        ObservationAdapter(space)


def test_batches_of_tensors_map_like_single_observations():
    space = Dict({"cam": box(2, 2, 3, dtype=np.uint8), "x": box(2), "y": box()})
    raw = {
        "cam": torch.zeros(5, 2, 2, 3, dtype=torch.uint8),
        "x": torch.ones(5, 2),
        "y": torch.full((5,), 3.0),
    }
    out = BatchAdapter(space)(raw)
    assert out["state"].tolist() == [[1, 1, 3]] * 5
    raw["x"] += 1
    assert out["state"][0, 0] == 1  # not a view of a buffer the simulator reuses
    with pytest.raises(EnvError, match=r"cam is torch\.float32"):
        BatchAdapter(space)(raw | {"cam": raw["cam"].float()})


# --- any Gymnasium id


class Counter(gym.Env):
    """Counts steps; terminates at a multiple of 5, with success when that is even."""

    observation_space, action_space = box(1), box(2, high=1.0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = int(np.ravel((options or {}).get("start", self.np_random.integers(5) * 10))[0])
        return np.array([self.count], np.float32), {
            "is_success": True
        }  # the reset's info must never be reported

    def step(self, action):
        self.count += 1
        end = self.count % 5 == 0
        return (
            np.array([self.count], np.float32),
            0.5,
            end,
            False,
            {"is_success": end and self.count % 2 == 0},
        )


def test_in_process_same_step_success_and_final_observation_belong_to_the_ended_episode():
    env = InProcessVecEnv(Counter, 3, per_env_option="start")
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, _ = env.reset(seed=0, options={"start": [[3], [8], [1]]})
    assert obs["state"].ravel().tolist() == [3, 8, 1]
    assert not env.step(np.zeros((3, 2)))[2].any()
    obs, reward, terminated, truncated, info = env.step(np.zeros((3, 2)))
    assert terminated.tolist() == [True, True, False]
    assert not truncated.any()
    assert reward.tolist() == [0.5] * 3
    assert info["_final_obs"].tolist() == [True, True, False]
    assert info["final_obs"]["state"][:2].ravel().tolist() == [5, 10]
    assert info["success"].tolist() == [False, True, False]
    assert obs["state"][2] == 3
    assert (obs["state"][:2] % 10 == 0).all()


def test_wrapper_of_the_loops_reports_the_same_success():
    env = VecEnv(InProcessVecEnv(Counter, 2, per_env_option="start"))
    env.reset(options={"start": [[9], [1]]})
    step = env.step(np.zeros((2, 2), np.float32))
    assert step.success.tolist() == [True, False]
    assert step.next_obs["state"].ravel().tolist() == [10, 2]


def test_in_process_reset_options_and_seeds_per_environment():
    env = InProcessVecEnv(Counter, 2, per_env_option="start")
    assert env.reset(options={"start": 7})[0]["state"].ravel().tolist() == [7, 7]
    one = Counter()
    expected = [one.reset(seed=s)[0][0] for s in (4, 2)]
    assert env.reset(seed=[4, 2])[0]["state"].ravel().tolist() == expected
    with pytest.raises(EnvError, match="3 entries for 2 environments"):
        env.reset(options={"start": [[1], [2], [3]]})


def test_any_id_with_time_limit_follows_gymnasium():
    env, one = (
        make(GymnasiumConfig(id="Pendulum-v1", max_steps=5), 1),
        gym.make("Pendulum-v1", max_episode_steps=5),
    )
    obs, _ = env.reset(seed=8)
    np.testing.assert_array_equal(obs["state"][0], one.reset(seed=8)[0])
    for step in range(1, 11):
        obs, reward, _, truncated, info = env.step(np.array([[0.7]], np.float32))
        expected, expected_reward, *_ = one.step(np.array([0.7], np.float32))
        assert truncated[0] == (step % 5 == 0)
        got = info["final_obs"]["state"][0] if truncated[0] else obs["state"][0]
        np.testing.assert_array_equal(got, expected)
        assert reward[0] == pytest.approx(expected_reward)
        if truncated[0]:
            np.testing.assert_array_equal(obs["state"][0], one.reset()[0])
    assert env.max_steps == 5


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ConfigError, r"env\.id is empty.*env\.id=Hopper-v5"),
        ({"id": "Hoper-v5"}, ConfigError, r"Did you mean 'Hopper-v5'"),
        ({"id": "Hopper-v5", "kwargs": {"wrong": 1}}, ConfigError, r"env\.kwargs=.*'wrong'"),
        ({"id": "FrozenLake-v1"}, EnvError, r"Discrete\(16\)"),
        ({"id": "Hopper-v5", "obs_keys": ["image"]}, EnvError, r"'image'.*Available: state"),
        ({"id": "Hopper-v5", "threads": -1}, ConfigError, r"env\.threads=-1"),
    ],
)
def test_bad_configs_are_one_line(config, error, message):
    with pytest.raises(error, match=message) as caught:
        make(GymnasiumConfig(**config), 2)
    assert "\n" not in str(caught.value)


def test_missing_packages_name_their_extra(monkeypatch):
    for adapter, config, extra in (
        (pusht, pusht.PushTConfig(), "pusht"),
        (robotics, robotics.RoboticsConfig(id="FetchReach-v4"), "robotics"),
    ):
        package = {"pusht": "gym_pusht", "robotics": "gymnasium_robotics"}[extra]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.setattr("importlib.util.find_spec", lambda name: None)
            with pytest.raises(MissingExtraError, match=rf"robopost\[{extra}\]"):
                adapter.make(config, 1)


# --- Push-T


@pytest.fixture(scope="module")
def push():
    pytest.importorskip("gym_pusht")
    return lambda num_envs=1, **config: pusht.make(pusht.PushTConfig(**config), num_envs)


STATE = [222.99, 381.60, 300.0, 200.0, 3.008]


def test_pusht_reset_is_exact_where_the_package_is_not(push):
    env = push()
    obs, _ = env.reset(seed=0, options={"state": STATE})
    np.testing.assert_allclose(obs["state"][0], STATE, atol=1e-4)
    theirs, _ = env.envs[0].unwrapped.reset(options={"reset_to_state": STATE})
    assert np.abs(theirs[:4] - STATE[:4]).max() > 20  # if this fails, the package is repaired


def test_pusht_states_per_environment_and_still_bodies(push):
    env = push(2)
    states = np.array([STATE, [100, 100, 256, 300, 1.0]])
    obs, _ = env.reset(options={"state": states})
    np.testing.assert_allclose(obs["state"], states, atol=1e-4)
    obs, *_ = env.step(states[:, :2])  # the agent is told to stay, so nothing moves
    np.testing.assert_allclose(obs["state"], states, atol=1e-3)


def test_pusht_seeds_fix_a_hundred_different_initial_states(push):
    env, again = push(100), push(100)
    states = env.reset(seed=1000)[0]["state"]
    np.testing.assert_array_equal(states, again.reset(seed=1000)[0]["state"])
    assert len(np.unique(states, axis=0)) == 100
    np.testing.assert_array_equal(states[7], push().reset(seed=1007)[0]["state"][0])
    assert ((states[:, 2:4] >= 100) & (states[:, 2:4] < 400)).all()  # the block lies where it was drawn
    np.testing.assert_array_equal(states[:, :4], states[:, :4].round())


def test_pusht_initial_states_of_diffusion_policys_evaluation(push):
    env = push(initial="diffusion_policy")
    obs, _ = env.reset(seed=100_000)
    draw = np.random.RandomState(100_000)
    corner = [draw.randint(50, 450), draw.randint(50, 450), draw.randint(100, 400), draw.randint(100, 400)]
    angle = draw.randn() * 2 * np.pi - np.pi
    np.testing.assert_allclose(obs["state"][0, :2], corner[:2], atol=1e-4)
    assert obs["state"][0, 4] == pytest.approx(angle % (2 * np.pi), abs=0.05)
    # Position first, then the angle about the centre of gravity: the centre stays, the origin moves.
    centre = np.array(env.envs[0].unwrapped.block.center_of_gravity)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    expected = np.array(corner[2:]) + centre - turn @ centre
    np.testing.assert_allclose(obs["state"][0, 2:4], expected, atol=3.0)  # one physics step may push it
    np.testing.assert_array_equal(obs["state"], env.reset(seed=100_000)[0]["state"])
    assert np.abs(env.reset()[0]["state"] - obs["state"]).max() > 1  # the autoreset goes on to other states


def test_pusht_success_is_the_strict_line_and_reward_the_coverage(push):
    env = push()
    env.reset(options={"state": [50, 50, 256, 256, np.pi / 4]})  # block exactly on the goal
    obs, reward, terminated, _, info = env.step(np.array([[50.0, 50.0]]))
    assert terminated[0]
    assert info["success"][0]
    assert info["coverage"][0] == pytest.approx(1, abs=0.01)
    assert reward[0] == 1.0
    np.testing.assert_allclose(info["final_obs"]["state"][0, 2:], [256, 256, np.pi / 4], atol=1e-3)
    assert np.abs(obs["state"] - info["final_obs"]["state"]).max() > 1
    env.reset(options={"state": [50, 50, 256 + 14, 256, np.pi / 4]})
    _, reward, terminated, _, info = env.step(np.array([[50.0, 50.0]]))
    assert 0.3 < info["coverage"][0] < 0.95
    assert reward[0] == pytest.approx(info["coverage"][0] / 0.95)
    assert not terminated[0]
    assert not info["success"][0]


def test_pusht_images_and_bad_values(push):
    env = push(2, images=True, obs_keys=["image", "keypoint"])
    obs, _ = env.reset(seed=0)
    assert {key: value.shape for key, value in obs.items()} == {"image": (2, 96, 96, 3), "keypoint": (2, 20)}
    assert obs["image"].dtype == np.uint8
    assert np.abs(obs["image"][0].astype(int) - obs["image"][1]).max() > 50
    with pytest.raises(EnvError, match="5 finite numbers"):
        push().reset(options={"state": [1, 2, 3]})
    with pytest.raises(ConfigError, match=r"initial 'gympusht'.*gym_pusht"):
        pusht.PushTConfig(initial="gympusht")


def test_pusht_open_loop_replay_of_human_demonstrations_is_exact(push):
    path = DATA / "pusht_human" / "pusht_cchi_v7_replay.zarr.zip"
    if not path.exists():
        pytest.skip(f"no Push-T demonstrations at {path}: set ROBOPOST_TEST_DATA")
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r", zarr_format=2)
    ends = group["meta/episode_ends"][:6]
    state, action, keypoint = (group[f"data/{key}"][: ends[-1]] for key in ("state", "action", "keypoint"))
    env = push(max_steps=1000)
    errors, keypoint_errors, best = [], [], []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        env.reset(options={"state": state[start]})
        rewards = []
        for t in range(start, end - 1):
            obs, reward, terminated, _, info = env.step(action[t][None])
            obs = info["final_obs"] if terminated[0] else obs
            rewards.append(reward[0])
            errors.append(np.abs(obs["state"][0, :4] - state[t + 1, :4]).max())
            keypoint_errors.append(np.abs(obs["keypoint"][0, :18] - keypoint[t + 1].ravel()).max())
            np.testing.assert_array_equal(obs["keypoint"][0, 18:], obs["state"][0, :2])
            if terminated[0]:
                break
        best.append(max(rewards))
    assert np.median(errors) < 1e-3  # 70 pixels through the package's own reset
    assert np.max(errors) < 0.01
    assert np.median(keypoint_errors) < 0.05
    assert np.mean(best) > 0.85


# --- gymnasium-robotics


def test_fetch_concatenates_its_goals_and_reports_success():
    pytest.importorskip("gymnasium_robotics")
    env = robotics.make(robotics.RoboticsConfig(id="FetchReach-v4", max_steps=3), 2)
    obs, _ = env.reset(seed=0)
    raw = env.envs[1].unwrapped._get_obs()
    expected = np.concatenate([raw["observation"], raw["achieved_goal"], raw["desired_goal"]])
    np.testing.assert_allclose(obs["state"][1], expected, atol=1e-6)
    for _ in range(3):
        *_, truncated, info = env.step(np.zeros((2, 4), np.float32))
    assert truncated.all()
    assert info["success"].tolist() == [False, False]
    assert not np.allclose(info["final_obs"]["state"], env.reset()[0]["state"])


def test_kitchen_success_needs_every_task():
    assert robotics.task_success({"tasks_to_complete": ["kettle"], "success": True}) is False
    assert robotics.task_success({"tasks_to_complete": []}) is True
    assert robotics.task_success({"is_success": np.float32(1)}) is True
    assert robotics.task_success({}) is None


def test_adroit_door_replays_human_demonstrations_from_their_simulator_states():
    path = DATA / "adroit" / "door_human_demos.npz"
    if not path.exists():
        pytest.skip(f"no Adroit demonstrations at {path}: set ROBOPOST_TEST_DATA")
    pytest.importorskip("gymnasium_robotics")
    demos = np.load(path, allow_pickle=False)
    every = demos["episode_ends"]
    chosen = np.arange(0, len(every), 3)
    ends, firsts = every[chosen], np.array([0, *every[:-1]])[chosen]
    lengths = ends - firsts
    env = robotics.make(robotics.RoboticsConfig(id="AdroitHandDoor-v1", max_steps=1000), len(ends))
    keys = {"qpos": "init_qpos", "qvel": "init_qvel", "door_body_pos": "init_door_body_pos"}
    starts = [{key: demos[name][i] for key, name in keys.items()} for i in chosen]
    obs, _ = env.reset(seed=0, options={"initial_state_dict": starts})
    handle = slice(32, 35)
    np.testing.assert_allclose(obs["state"][:, handle], demos["observations"][firsts, handle], atol=1e-3)
    success, returns = np.zeros(len(ends), bool), np.zeros(len(ends))
    for t in range(lengths.max()):
        _, reward, _, _, info = env.step(demos["actions"][np.minimum(firsts + t, ends - 1)])
        success |= info["success"] & (t < lengths)
        returns += reward * (t < lengths)
    recorded = np.array([demos["rewards"][a:b].sum() for a, b in zip(firsts, ends, strict=True)])
    assert np.corrcoef(returns, recorded)[0, 1] > 0.95
    assert returns.mean() == pytest.approx(recorded.mean(), rel=0.05)
    assert 0.1 <= success.mean() <= 0.6  # over all 25: 0.32 on MuJoCo 3.8.1 and 4.0.0


# --- registration


def test_importing_the_package_imports_no_simulator():
    heavy = ("mujoco", "pygame", "pymunk", "torch", "gym_pusht", "gymnasium_robotics", "isaaclab")
    code = f"import sys, robopost_envs; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_registered_with_configs():
    for name in ("gymnasium", "isaaclab", "pusht", "robotics"):
        assert ENVS.get(name).config().name == name
        assert ENVS.get(name).summary


@pytest.mark.parametrize(
    "name",
    ["gymnasium", "pusht", "adroit_door", "fetch", "isaaclab", "hopper", "halfcheetah", "walker2d", "ant"],
)
def test_shipped_configs_fit_their_dataclasses(name):
    text = (ROOT / "configs" / "env" / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 15
    values = yaml.safe_load(text)
    assert values.pop("defaults") == [f"{values['name']}_schema", "_self_"]
    ENVS.get(values["name"]).config(**values)


def test_make_vec_gives_specs_of_the_shipped_tasks():
    env = make_vec(GymnasiumConfig(id="Ant-v5"), 2)
    assert env.spec.obs == {"state": ((105,), "float32")}
    assert (env.spec.action_dim, env.spec.max_steps, env.spec.bounded) == (8, 1000, True)
    env.close()


def test_discrete_actions_are_indices_and_checked():
    env = VecEnv(make(GymnasiumConfig(id="CartPole-v1"), 2))
    assert (env.spec.choices, env.spec.action_dim, env.spec.action_high) == (2, 1, (1.0,))
    one = gym.make("CartPole-v1")
    first, _ = one.reset(seed=4)
    np.testing.assert_array_equal(env.reset(seed=[4, 5])["state"][0], first)
    for choice in (1, 0, 1, 1):
        step = env.step(np.array([[choice - 1e-6], [1.0]], np.float32))
        obs, *_ = one.step(choice)
        np.testing.assert_array_equal(step.obs["state"][0], obs)
    with pytest.raises(EnvError, match=r"action of environment 1 is 2.*Discrete\(2\)"):
        env.step(np.array([[0.0], [2.0]], np.float32))
    with pytest.raises(EnvError, match=r"expected 2 integers"):
        env.env.step(np.zeros((2, 1)))
