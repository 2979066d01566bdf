# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from robopost.config import EnvConfig, PolicyConfig
from robopost.data.batch import Spec
from robopost.errors import ConfigError, EnvError
from robopost.evaluate.rollout import EvalResult, evaluate
from robopost.evaluate.statistics import wilson
from robopost.policies.base import Policy
from robopost.registry import ENVS
from robopost.vector import VecEnv


class Seeded(VectorEnv):
    """Everything about an episode follows from its reset seed; later episodes of a slot are poison.

    Even seeds fail after 2 + seed % 5 steps, odd seeds succeed (in one step only) and end after 20. The
    reward is the seed's noise, so returns identify seeds. Observation: (seed, step).
    """

    def __init__(self, num_envs, endless=False, success=True, render=None):
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": 20}
        self.num_envs, self.endless, self.has_success, self.render_mode = num_envs, endless, success, render
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.closed_times, self.rendered, self.actions = 0, [], []

    def reset(self, *, seed=None, options=None):
        self.seeds = np.array(seed, dtype=np.int64)
        self.rngs = [np.random.default_rng(s) for s in seed]
        self.t = np.zeros(self.num_envs, np.int64)
        return self._obs(), {}

    def step(self, action):
        self.actions.append(action.copy())
        self.t += 1
        odd = self.seeds % 2 == 1
        length = np.where(odd, 20, 2 + self.seeds % 5)
        reward = np.array([rng.normal() for rng in self.rngs]) + action[:, 0]
        success = odd & (self.t == 15) | (self.seeds < 0)  # successes of later episodes must not count
        done = (self.t >= length) & (not self.endless)
        final = self._obs()
        self.seeds = np.where(done, -1, self.seeds)
        self.t = np.where(done, 0, self.t)
        info = {"final_obs": final} if done.any() else {}
        if self.has_success:
            info["success"] = success
        return self._obs(), reward, done & ~odd, done & odd, info

    def render(self, indices=None):
        picked = list(range(self.num_envs)) if indices is None else list(indices)
        self.rendered.append(picked)
        return [np.full((48, 64, 3), 10 * (i + 1), np.uint8) for i in picked]

    def close(self, **kwargs):
        self.closed_times += 1

    def _obs(self):
        return np.stack([self.seeds, self.t], axis=1).astype(np.float32)


@pytest.fixture(autouse=True)
def made_envs():
    made = []

    def make(config, num_envs, *, render=None):
        made.append(Seeded(num_envs, render=render))
        return made[-1]

    ENVS.register("seeded_eval_test", config=EnvConfig)(make)
    yield made
    del ENVS._entries["seeded_eval_test"]


class Constant(Policy):
    """Acts 0, or with noise; counts what it was told."""

    def __init__(self, spec, horizon=1, execute=0):
        super().__init__(PolicyConfig(horizon=horizon, execute=execute), spec)
        self.modes, self.resets, self.asked = [], [], []

    def sample(self, obs, *, generator=None, deterministic=False):
        self.modes.append(self.training)
        self.asked.append(obs["state"].clone())
        shape = (len(obs["state"]), self.horizon, 1)
        return (torch.zeros(shape) if deterministic else torch.randn(shape, generator=generator)), None, None

    def reset(self, mask):
        self.resets.append(mask)


SPEC = Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,))
CONFIG = EnvConfig(name="seeded_eval_test")


def expected(seed, episodes):
    """Returns, lengths and successes from the env's own rules, episode by episode."""
    lengths = [20 if s % 2 else 2 + s % 5 for s in range(seed, seed + episodes)]
    returns = [
        np.random.default_rng(s).normal(size=n).astype(np.float32).sum()
        for s, n in zip(range(seed, seed + episodes), lengths, strict=True)
    ]
    return np.array(returns), np.array(lengths), np.arange(seed, seed + episodes) % 2 == 1


@pytest.mark.parametrize("num_envs", [1, 3, 7, 12, 50])
def test_episodes_are_counted_once_whatever_the_number_of_environments(num_envs):
    result = evaluate(Constant(SPEC), CONFIG, episodes=12, seed=5, num_envs=num_envs)
    returns, lengths, successes = expected(5, 12)
    assert np.array_equal(result.lengths, lengths)
    assert np.array_equal(result.successes, successes)
    assert np.allclose(result.returns, returns, atol=1e-4)
    assert result.num_envs == min(num_envs, 12)


def test_short_failing_episodes_do_not_take_over():
    # Half of all seeds succeed. Counting the first 40 episodes to finish would see failures almost only: they
    # are five times shorter.
    result = evaluate(Constant(SPEC), CONFIG, episodes=40, seed=0, num_envs=10)
    assert result.successes.mean() == 0.5
    assert result.lengths.max() == 20


def test_success_at_any_step_counts_but_not_after_the_episode():
    result = evaluate(Constant(SPEC), CONFIG, episodes=2, seed=0, num_envs=2)
    # Slot 0 (seed 0) failed after 2 steps; its slot then runs an episode that reports success at each step.
    assert result.successes.tolist() == [False, True]


def test_max_reward_by_hand():
    result = evaluate(Constant(SPEC), CONFIG, episodes=3, seed=2, num_envs=2)
    peaks = [np.random.default_rng(s).normal(size=n).max() for s, n in ((2, 4), (3, 20), (4, 6))]
    assert np.allclose(result.max_rewards, peaks, atol=1e-5)


def test_automatic_waves_are_even(made_envs):
    evaluate(Constant(SPEC), CONFIG, episodes=100, seed=0)
    assert made_envs[-1].num_envs == 25
    evaluate(Constant(SPEC), CONFIG, episodes=5, seed=0)
    assert made_envs[-1].num_envs == 5
    assert all(env.closed_times == 1 for env in made_envs)


def test_chunk_queues_are_forgotten_at_episode_ends():
    policy = Constant(SPEC, horizon=6, execute=6)
    evaluate(policy, CONFIG, episodes=2, seed=1, num_envs=2)
    # Slot 1 (seed 2) ends after 4 steps, amid its chunk: at the fifth step only this slot asks again.
    asked = [obs for obs in policy.asked if len(obs) == 1]
    assert asked[0].tolist() == [[-1.0, 0.0]]
    assert any(mask is not None and mask.tolist() == [False, True] for mask in policy.resets)
    assert policy.resets[0] is None


def test_mode_is_eval_inside_and_restored_outside():
    policy = Constant(SPEC).train()
    evaluate(policy, CONFIG, episodes=1, seed=0)
    assert policy.modes
    assert not any(policy.modes)
    assert policy.training


def test_stochastic_policies_repeat_and_leave_global_randomness_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    policy = Constant(SPEC)
    first = evaluate(policy, CONFIG, episodes=6, seed=0, num_envs=3, deterministic=False)
    second = evaluate(policy, CONFIG, episodes=6, seed=0, num_envs=3, deterministic=False)
    other = evaluate(policy, CONFIG, episodes=6, seed=100, num_envs=3, deterministic=False)
    assert np.array_equal(first.returns, second.returns)
    assert not np.array_equal(first.returns, other.returns)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_made_environment_stays_open_and_may_be_used_again():
    env = Seeded(4)
    vec = VecEnv(env)
    a = evaluate(Constant(SPEC), vec, episodes=6, seed=0)
    b = evaluate(Constant(SPEC), vec, episodes=6, seed=0)
    assert np.array_equal(a.returns, b.returns)
    assert env.closed_times == 0
    with pytest.raises(ConfigError, match=r"stacks 2 observations, the policy sees 1"):
        evaluate(Constant(SPEC), VecEnv(env, history=2), episodes=1, seed=0)


def test_time_limit_ends_an_episode_the_environment_does_not_end(monkeypatch):
    result = evaluate(Constant(SPEC), VecEnv(Seeded(2, endless=True), max_steps=9), episodes=3, seed=0)
    assert result.lengths.tolist() == [9, 9, 9]
    monkeypatch.setattr("robopost.evaluate.rollout.NO_LIMIT", 30)
    with pytest.raises(EnvError, match=r"did not end in 30 steps.*env\.max_steps"):
        evaluate(Constant(SPEC), VecEnv(Seeded(2, endless=True)), episodes=1, seed=0)


def test_no_success_predicate_is_none_not_zero():
    result = evaluate(Constant(SPEC), VecEnv(Seeded(2, success=False)), episodes=4, seed=0)
    assert result.successes is None
    assert result.success() is None
    assert "eval/success" not in result.metrics()
    assert result.to_json()["success"] is None
    assert not any("success" in line for line in result.summary())


def test_json_round_trip_metrics_and_summary():
    result = evaluate(Constant(SPEC), CONFIG, episodes=10, seed=3)
    data = json.loads(json.dumps(result.to_json()))
    back = EvalResult.from_json(data)
    assert np.array_equal(back.returns, result.returns)
    assert np.array_equal(back.successes, result.successes)
    assert back.env == "seeded_eval_test"
    rate = wilson(5, 10)
    assert data["success"] == {"value": 0.5, "low": rate.low, "high": rate.high, "n": 10, "level": 0.95}
    metrics = result.metrics()
    assert metrics["eval/success"] == 0.5
    assert metrics["eval/return"] == pytest.approx(result.returns.mean())
    assert metrics["eval/length"] == result.lengths.mean()
    assert result.summary()[0] == "success  50.0 % [23.7, 76.3]  (5 of 10)"


def test_a_gymnasium_id_names_the_environment():
    @dataclass
    class WithId(EnvConfig):
        id: str = ""

    result = evaluate(Constant(SPEC), WithId(name="seeded_eval_test", id="Hopper-v5"), episodes=1, seed=0)
    assert result.env == "Hopper-v5"


def test_progress_reports_every_episode():
    seen = []
    evaluate(Constant(SPEC), CONFIG, episodes=7, seed=0, num_envs=3, progress=seen.append)
    assert seen[-1] == 7
    assert seen == sorted(seen)


def test_only_recorded_running_episodes_are_rendered(tmp_path, made_envs):
    result = evaluate(
        Constant(SPEC), CONFIG, episodes=6, seed=0, num_envs=4, video=tmp_path / "eval.mp4", video_episodes=2
    )
    env = made_envs[-1]
    assert env.render_mode == "rgb_array"
    # Seed 0 lasts 2 steps, seed 1 lasts 20: two frames of both, 18 more of slot 1.
    assert env.rendered == [[0, 1]] * 2 + [[1]] * 18
    assert [len(clip.frames) for clip in result.clips] == [2, 20]
    assert [clip.success_at for clip in result.clips] == [None, 15]
    assert [clip.length for clip in result.clips] == [2, 20]
    assert result.video == "eval.mp4"
    assert (tmp_path / "eval.mp4").stat().st_size > 500


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"episodes": 0}, "eval.episodes=0"),
        ({"episodes": 2, "video_episodes": 3}, r"video_episodes=3 must lie in 0\.\.2"),
    ],
)
def test_bad_counts_are_named(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(Constant(SPEC), CONFIG, seed=0, **kwargs)
