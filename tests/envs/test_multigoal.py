# SPDX-License-Identifier: Apache-2.0
"""MultiGoal: rewards by hand, endings, exact resume, bad input, and a run of `robopost train`."""

import numpy as np
import pytest
from robopost_envs.multigoal import MultiGoalConfig, MultiGoalVectorEnv, distances, goal_positions

from robopost.artefacts.checkpoint import load_policy
from robopost.compose import compose
from robopost.errors import ConfigError, EnvError
from robopost.loops import train
from robopost.vector import make_vec


def test_goals_lie_on_the_circle():
    goals = goal_positions(MultiGoalConfig(goals=4, radius=2.0))
    np.testing.assert_allclose(goals, [[2, 0], [0, 2], [-2, 0], [0, -2]], atol=1e-12)
    away = distances(MultiGoalConfig(), goal_positions(MultiGoalConfig()))
    assert away.shape == (6, 6)
    np.testing.assert_allclose(np.sort(away, 1)[:, :2], [[0, 1.5]] * 6, atol=1e-12)


def test_reward_by_hand_and_every_episode_terminates():
    env = make_vec(MultiGoalConfig(), 4)
    assert not env.spec.bounded
    assert env.spec.max_steps == 1
    env.reset(seed=3)
    step = env.step(np.array([[1.5, 0.0], [1.5, 0.30001], [-1.9, 0.0], [50.0, 0.0]], np.float32))
    np.testing.assert_allclose(step.reward, [1.0, np.exp(-0.5), np.exp(-8 / 9), 0.0], rtol=1e-4)
    assert step.terminated.all()
    assert not step.truncated.any()
    assert step.success.tolist() == [True, False, False, False]
    assert (step.obs["state"] == 0).all()


def test_saved_state_goes_on():
    first, second = MultiGoalVectorEnv(MultiGoalConfig(), 2), MultiGoalVectorEnv(MultiGoalConfig(), 2)
    first.reset(seed=0)
    second.set_state(first.get_state())
    action = np.ones((2, 2), np.float32)
    assert np.array_equal(first.step(action)[1], second.step(action)[1])
    with pytest.raises(EnvError, match=r"saved state is of 2 copies, here are 3"):
        MultiGoalVectorEnv(MultiGoalConfig(), 3).set_state(first.get_state())


def test_bad_input_is_named():
    for options, message in (
        ({"goals": 0}, r"env.goals=0 must be at least 1"),
        ({"width": 0.0}, r"env.width=0.0 must be above 0"),
        ({"radius": float("inf")}, r"env.radius=inf must be above 0 and finite"),
        ({"max_steps": 3}, r"env.max_steps=3: an episode of multigoal has 1 step"),
    ):
        with pytest.raises(ConfigError, match=message):
            MultiGoalConfig(**options)
    with pytest.raises(ConfigError, match=r"nothing to show"):
        MultiGoalVectorEnv(MultiGoalConfig(), 1, render="rgb_array")
    env = MultiGoalVectorEnv(MultiGoalConfig(), 2)
    with pytest.raises(EnvError, match=r"before reset"):
        env.step(np.zeros((2, 2)))
    env.reset()
    with pytest.raises(EnvError, match=r"environment 1, dimension 0 is nan"):
        env.step(np.array([[0.0, 0.0], [np.nan, 0.0]]))


@pytest.mark.parametrize("algo", ["policyflow", "fpo"])
def test_train_runs_on_it(algo, tmp_path):
    words = ["env=multigoal", "env.num_envs=8", "policy=flow", "policy.horizon=1", "policy.width=16"]
    words += ["policy.depth=1", "policy.steps=2", "policy.normalise_action=bounds", "loop.eval_episodes=4"]
    words += ["algo.rollout_steps=4", "algo.batch_size=16", "algo.hidden=[16]", "loop.steps=64"]
    run = train(compose([f"algo={algo}", *words, "track.console=false", f"out={tmp_path / 'run'}"]))
    assert load_policy(run).clip == float("inf")  # goals outside [-1, 1] are within reach
