# SPDX-License-Identifier: Apache-2.0
"""Contract test of the Isaac Lab adapter against stand-ins.

Isaac Lab needs Isaac Sim and a GPU, so two small classes stand in for it. They keep what the adapter relies
on, in the order of `ManagerBasedRLEnv.step` and `DirectRLEnv.step` of Isaac Lab 2.3: physics, counters,
terminations, rewards, `_reset_idx` of ended environments, then observations, all in buffers that are reused.
"""

import math
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from robopost_envs.adapters import isaaclab
from robopost_envs.adapters.isaaclab import IsaacLabConfig, IsaacLabVecEnv

from robopost.errors import ConfigError, EnvError, MissingExtraError
from robopost.vector import VecEnv

N = 3


class Sim(types.SimpleNamespace):
    """Position moves by the action; reset puts it at 100 + number of resets so far."""


def config(**changes):
    base = {
        "decimation": 2,
        "episode_length_s": 0.4,
        "sim": types.SimpleNamespace(dt=0.05),
        "scene": types.SimpleNamespace(num_envs=N),
        "observation_noise_model": None,
    }
    return types.SimpleNamespace(**(base | changes))


class StandIn(gym.Env):
    metadata = {"render_modes": [None, "rgb_array"]}  # noqa: RUF012

    def __init__(self, cfg, render_mode=None):
        self.cfg, self.render_mode = cfg, render_mode
        self.num_envs, self.device = cfg.scene.num_envs, "cpu"
        self.position = torch.zeros(self.num_envs)
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
        self.resets = 0
        self.extras = {}
        self.seeds = []
        self.reward_buf = torch.zeros(self.num_envs)
        self.reset_terminated = torch.zeros(self.num_envs, dtype=torch.bool)
        self.reset_time_outs = torch.zeros(self.num_envs, dtype=torch.bool)

    @property
    def max_episode_length(self):
        return math.ceil(self.cfg.episode_length_s / (self.cfg.sim.dt * self.cfg.decimation))

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self._reset_idx(torch.arange(self.num_envs))
        return self._compute(), self.extras

    def step(self, action):
        self.action = action.clone()
        self.position += action[:, 0]
        self.episode_length_buf += 1
        self.reset_terminated[:] = self.position < 0
        self.reset_time_outs[:] = self.episode_length_buf >= self.max_episode_length
        self.success = self.position > 150
        self.reward_buf[:] = self.position
        ended = (self.reset_terminated | self.reset_time_outs).nonzero().squeeze(-1)
        if getattr(self.cfg, "compute_final_obs", False):
            self.extras["final_obs"] = self._compute()
        if len(ended):
            self._reset_idx(ended)
        return self._compute(), self.reward_buf, self.reset_terminated, self.reset_time_outs, self.extras

    def _reset_idx(self, env_ids):
        self.resets += 1
        self.position[env_ids] = 100.0 + self.resets
        self.episode_length_buf[env_ids] = 0

    def render(self):
        return np.zeros((4, 4, 3), np.uint8)


class ManagerBased(StandIn):
    def __init__(self, cfg, render_mode=None, terms=("time_out", "success")):
        super().__init__(cfg, render_mode)
        box = lambda *shape: gym.spaces.Box(-np.inf, np.inf, shape)  # noqa: E731
        terms_space = gym.spaces.Dict({"position": box(1), "step": box(1), "camera": box(4, 5, 3)})
        self.single_observation_space = gym.spaces.Dict({"policy": terms_space, "critic": box(1)})
        self.single_action_space = box(2)
        env = self

        class Observations:
            def compute(self, update_history=False):
                env.history = getattr(env, "history", 0) + update_history
                obs = torch.stack([env.position, env.episode_length_buf.float()], 1)
                image = env.position.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 5, 3)
                policy = {"position": obs[:, :1], "step": obs[:, 1:], "camera": image}
                return {"policy": policy, "critic": obs[:, :1]}

        class Terminations:
            active_terms = list(terms)  # noqa: RUF012

            def get_term(self, name):
                return {"success": env.success, "time_out": env.reset_time_outs}[name]

        self.observation_manager, self.termination_manager = Observations(), Terminations()

    def _compute(self):
        return self.observation_manager.compute(update_history=True)


class Direct(StandIn):
    def __init__(self, cfg, render_mode=None):
        super().__init__(cfg, render_mode)
        self.single_observation_space = gym.spaces.Dict({"policy": gym.spaces.Box(-np.inf, np.inf, (2,))})
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def _observation_noise_model(self, obs):
        return obs + 1000

    def _get_observations(self):
        return {"policy": torch.stack([self.position, self.episode_length_buf.float()], 1)}

    def _compute(self):
        obs = self._get_observations()
        if self.cfg.observation_noise_model:
            obs["policy"] = self._observation_noise_model(obs["policy"])
        return obs


def zeros(env):
    return np.zeros((N, env.single_action_space.shape[0]), np.float32)


@pytest.mark.parametrize("publishes", [False, True])
@pytest.mark.parametrize("kind", [ManagerBased, Direct])
def test_time_out_gives_the_true_final_observation_and_the_next_first_one(kind, publishes):
    raw = kind(config(**({"compute_final_obs": True} if publishes else {})))
    env = IsaacLabVecEnv(raw)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.max_steps == 4
    obs, _ = env.reset(seed=7)
    assert raw.seeds == [7]
    np.testing.assert_array_equal(obs["state"], [[101, 0]] * N)
    for step in range(1, 4):
        obs, reward, terminated, truncated, info = env.step(zeros(env) + 0.5)
        np.testing.assert_array_equal(obs["state"], [[101 + 0.5 * step, step]] * N)
        assert not truncated.any()
        assert "final_obs" not in info
    obs, reward, terminated, truncated, info = env.step(zeros(env) + 0.5)
    assert truncated.all()
    assert not terminated.any()
    np.testing.assert_array_equal(info["final_obs"]["state"], [[103, 4]] * N)  # before the reset
    np.testing.assert_array_equal(obs["state"], [[102, 0]] * N)  # after it
    np.testing.assert_array_equal(reward, [103] * N)  # belongs to the ended episode


@pytest.mark.parametrize("kind", [ManagerBased, Direct])
def test_only_ended_environments_reset_and_results_survive_the_next_step(kind):
    env = IsaacLabVecEnv(kind(config()))
    env.reset()
    action = zeros(env)
    action[1, 0] = -500
    obs, reward, terminated, _, info = env.step(action)
    assert terminated.tolist() == [False, True, False]
    assert info["_final_obs"].tolist() == [False, True, False]
    assert info["final_obs"]["state"][1].tolist() == [101 - 500, 1]
    assert obs["state"][:, 0].tolist() == [101, 102, 101]
    kept = [array.copy() for array in (obs["state"], reward, terminated, info["final_obs"]["state"])]
    env.step(zeros(env) + 3)
    for before, now in zip(kept, (obs["state"], reward, terminated, info["final_obs"]["state"]), strict=True):
        np.testing.assert_array_equal(before, now)


def test_capture_does_not_advance_histories_and_ignores_explicit_resets():
    raw = ManagerBased(config())
    env = IsaacLabVecEnv(raw)
    env.reset()
    for _ in range(9):
        env.step(zeros(env))
    assert raw.history == 10  # one per step and one for the reset, none for the two captures


def test_direct_environments_final_observation_carries_the_noise_of_the_returned_one():
    env = IsaacLabVecEnv(Direct(config(observation_noise_model=object())))
    env.reset()
    for _ in range(4):
        *_, info = env.step(zeros(env))
    assert info["final_obs"]["state"][0].tolist() == [1101, 1004]


def test_success_comes_from_the_named_termination_term():
    env = IsaacLabVecEnv(ManagerBased(config()))
    env.reset()
    action = zeros(env)
    action[2, 0] = 60
    *_, info = env.step(action)
    assert info["success"].tolist() == [False, False, True]
    without = IsaacLabVecEnv(ManagerBased(config(), terms=("time_out",)))
    without.reset()
    assert "success" not in without.step(zeros(without))[-1]


def test_images_and_vectors_of_a_group():
    env = IsaacLabVecEnv(ManagerBased(config()))
    assert env.single_observation_space["state"].shape == (2,)
    image = env.single_observation_space["image"]
    assert (image.shape, image.dtype) == ((4, 5, 3), np.uint8)
    obs, _ = env.reset()
    assert obs["image"].shape == (N, 4, 5, 3)
    assert obs["image"].max() == 101


def test_action_limit_bounds_and_clips_unbounded_actions_only():
    raw = ManagerBased(config())
    env = IsaacLabVecEnv(raw, action_limit=2.0)
    assert env.single_action_space.high.tolist() == [2, 2]
    env.reset()
    env.step(zeros(env) + 9)
    assert raw.action.max() == 2
    bounded = IsaacLabVecEnv(Direct(config()), action_limit=2.0)
    assert bounded.single_action_space.high.tolist() == [1]


def test_it_fits_the_wrapper_of_the_loops():
    vec = VecEnv(IsaacLabVecEnv(Direct(config())))
    vec.reset(seed=0)
    for _ in range(4):
        step = vec.step(np.zeros((N, 1), np.float32))
    assert step.done.all()
    assert step.next_obs["state"][:, 1].tolist() == [4, 4, 4]
    assert step.obs["state"][:, 1].tolist() == [0, 0, 0]


def test_step_tensors_stay_tensors():
    env = IsaacLabVecEnv(Direct(config()))
    env.reset()
    result = env.step_tensors(torch.zeros(N, 1))
    assert isinstance(result.obs["state"], torch.Tensor)
    assert result.final_obs is None


def test_bad_actions_and_groups():
    env = IsaacLabVecEnv(Direct(config()))
    env.reset()
    with pytest.raises(EnvError, match=r"shape \(3, 4\), expected \(3, 1\)"):
        env.step(np.zeros((N, 4)))
    with pytest.raises(EnvError, match="environment 2, dimension 0"):
        env.step(np.array([[0.0], [0.0], [np.nan]]))
    with pytest.raises(EnvError, match=r"obs_group 'actor'.*policy"):
        IsaacLabVecEnv(Direct(config()), obs_group="actor")


def test_missing_package_names_the_extra():
    if "isaaclab" in sys.modules:
        pytest.skip("isaaclab is installed")
    with pytest.raises(MissingExtraError, match=r"robopost\[isaaclab\]"):
        isaaclab.make(IsaacLabConfig(id="Isaac-Cartpole-v0"), 2)


def test_make_launches_the_simulator_first_and_configures_the_task(monkeypatch):
    order = []

    class AppLauncher:
        def __init__(self, **kwargs):
            order.append(("launch", kwargs))
            self.app = object()

    def parse_env_cfg(task, device, num_envs):
        order.append(("parse", task, device, num_envs))
        cfg = config(compute_final_obs=False)
        cfg.scene.num_envs = num_envs
        return cfg

    modules = {
        "isaaclab": {},
        "isaaclab.app": {"AppLauncher": AppLauncher},
        "isaaclab_tasks": {},
        "isaaclab_tasks.utils": {"parse_env_cfg": parse_env_cfg},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(isaaclab, "_app", None)
    monkeypatch.setattr(isaaclab, "_open", set())
    gym.register("Isaac-StandIn-v0", entry_point=Direct, disable_env_checker=True)
    try:
        env = isaaclab.make(IsaacLabConfig(id="Isaac-StandIn-v0", device="cpu", max_steps=7), 5)
        with pytest.raises(EnvError, match="one simulation per process"):
            isaaclab.make(IsaacLabConfig(id="Isaac-StandIn-v0"), 5)
        env.close()
    finally:
        gym.registry.pop("Isaac-StandIn-v0")
    assert [entry[0] for entry in order] == ["launch", "parse"]
    assert order[1][1:] == ("Isaac-StandIn-v0", "cpu", 5)
    assert (env.num_envs, env.max_steps) == (5, 7)
    assert env.unwrapped._base.cfg.compute_final_obs is True
    with pytest.raises(ConfigError, match=r"env\.id is empty"):
        isaaclab.make(IsaacLabConfig(), 2)
    with pytest.raises(ConfigError, match=r"action_limit=-1"):
        IsaacLabConfig(action_limit=-1.0)
