# SPDX-License-Identifier: Apache-2.0
"""Adapters: observation mapping, in-process stepping, light imports, configs."""

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
