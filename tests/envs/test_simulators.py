# SPDX-License-Identifier: Apache-2.0
"""Adapters of other people's simulators: Push-T and gymnasium-robotics."""

import os
from pathlib import Path

import numpy as np
import pytest
from robopost_envs.adapters import pusht, robotics

from robopost.errors import ConfigError, EnvError

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", ROOT.parent / "shared" / "data"))


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
