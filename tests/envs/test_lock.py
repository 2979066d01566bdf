# SPDX-License-Identifier: Apache-2.0
"""The combination lock: dynamics, observation, offline data, seeds, save and restore, bad input."""

import numpy as np
import pytest
from robopost_envs.lock import (
    LATENTS,
    LockConfig,
    LockExpert,
    LockVectorEnv,
    combination,
    hadamard,
    observation_dim,
)

from robopost.collect import collect
from robopost.config import CollectConfig
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError, EnvError
from robopost.vector import make_vec


def episode(env, expert, seed=0):
    """Rewards, successes and latent states of one episode in every lock."""
    obs, _ = env.reset(seed=seed)
    rewards, latents = [], [env.latent.copy()]
    for _ in range(env.config.horizon):
        obs, reward, terminated, truncated, info = env.step(expert.act({"state": obs}))
        rewards.append(reward)
        latents.append(env.latent.copy())
        assert not truncated.any()
    assert terminated.all()
    return np.array(rewards), info["success"], np.array(latents[:-1])


@pytest.mark.parametrize("horizon", [5, 10])
def test_optimal_actions_open_it_and_greedy_data_has_the_known_share(horizon):
    """Success of one-hot actions, and (1 - 0.9 / H)^H of epsilon-greedy ones with epsilon = 1/H."""
    config = LockConfig(horizon=horizon)
    env = LockVectorEnv(config, 2000)
    rewards, success, latents = episode(env, LockExpert(config, 2000))
    assert success.mean() >= 0.99  # the softmax leaks 0.04 % per step
    assert (rewards[:-1] == 0).all()
    assert (rewards[-1] == 1).sum() == success.sum()
    assert abs(np.mean(latents[0] == 0) - 0.5) < 0.05
    assert abs(np.mean(latents[1][success] != latents[0][success]) - 0.5) < 0.05
    _, success, _ = episode(env, LockExpert(config, 2000, 1 - 1 / horizon), seed=7)
    assert abs(success.mean() - (1 - 0.9 / horizon) ** horizon) < 0.04


def test_failures_are_paid_at_the_last_step_alone():
    """The released code computes a consolation in every step and returns 0 there; so does this lock."""
    config = LockConfig(horizon=6)
    rewards, success, latents = episode(LockVectorEnv(config, 4000), LockExpert(config, 4000, 0.0))
    assert (rewards[:-1] == 0).all()
    assert not success.any()
    assert (latents[-1] == 2).mean() > 0.99
    paid = rewards[-1] == 0.1
    assert abs(paid.mean() - 0.5) < 0.03
    assert (rewards[-1][~paid] == 0).all()


def test_every_probability_and_payment_is_a_setting():
    config = LockConfig(horizon=2, temperature=1.0, switch=0.9, consolation=0.3, consolation_rate=0.2)
    env, expert = LockVectorEnv(config, 4000), LockExpert(config, 4000)
    obs, _ = env.reset(seed=0)
    start = env.latent.copy()
    obs, *_ = env.step(expert.act({"state": obs}))
    alive = env.latent != 2
    assert abs(alive.mean() - np.e / (np.e + 9)) < 0.03  # softmax of a one-hot action
    assert abs((env.latent != start)[alive].mean() - 0.9) < 0.04
    before = env.latent.copy()
    _, reward, _, _, info = env.step(expert.act({"state": obs}))
    success = info["success"]
    assert abs(success[alive].mean() - np.e / (np.e + 9)) < 0.05
    assert abs((reward[~success] == 0.3).mean() - 0.2) < 0.03
    assert set(reward[~success].tolist()) == {0.0, 0.3}
    latent = (info["final_obs"] @ hadamard(observation_dim(2)))[:, :LATENTS].argmax(1)
    assert (latent[success] == before[success]).all()  # the last right action switches nothing
    assert (latent[~success] == 2).all()


def test_a_wrong_action_is_for_good():
    config = LockConfig(horizon=4, actions=3)
    env = LockVectorEnv(config, 8)
    env.reset(seed=0)
    right = combination(config)
    wrong = (right[env.latent, 0] + 1) % 3
    env.step(20.0 * np.eye(3)[wrong])  # beyond the bounds: clipped, no overflow
    assert (env.latent == 2).sum() >= 7
    for t in (1, 2):
        env.step(np.eye(3)[right[0, t].repeat(8)])
    dead = env.latent == 2
    _, reward, _, _, info = env.step(np.eye(3)[right[0, 3].repeat(8)])
    assert not info["success"][dead].any()
    assert (reward[dead] <= 0.1).all()


def test_the_transposed_matrix_recovers_latent_state_and_step():
    config = LockConfig(horizon=10)
    env, dim = LockVectorEnv(config, 500), observation_dim(10)
    assert dim == 16
    assert observation_dim(20) == 32
    assert observation_dim(12) == 16
    assert observation_dim(13) == 32
    assert np.array_equal(hadamard(dim) @ hadamard(dim), dim * np.eye(dim))
    obs, _ = env.reset(seed=3)
    expert = LockExpert(config, 500)
    for t in range(10):
        code = obs @ hadamard(dim) / dim
        code[:, LATENTS + t] -= 1
        code[np.arange(500), env.latent] -= 1
        assert abs(code[:, : 10 + LATENTS].std() - 0.1) < 0.005
        assert abs(code[:, 10 + LATENTS :]).max() < 1e-5  # no noise in the entries beyond
        obs, _, ended, _, info = env.step(expert.act({"state": obs}))
    last = info["final_obs"] @ hadamard(dim) / dim  # true last observation: step H
    assert ended.all()
    assert abs(last[:, LATENTS + 10] - 1).max() < 1e-5  # beyond the entries with noise
    assert abs(last[:, LATENTS : LATENTS + 10]).max() < 0.6
    assert (last[:, :LATENTS].max(1) > 0.5).all()
    assert (obs @ hadamard(dim) / dim)[:, LATENTS].min() > 0.5  # the next episode's first


def test_an_episode_depends_on_its_own_seed_alone():
    config = LockConfig(horizon=3)
    actions = np.random.default_rng(0).random((7, 4, 10))
    many, one = LockVectorEnv(config, 4), LockVectorEnv(config, 1)
    first, _ = many.reset(seed=10)
    alone, _ = one.reset(seed=12)
    assert np.array_equal(first[2:3], alone)
    for action in actions:
        a, b = many.step(action), one.step(action[2:3])
        assert all(np.array_equal(x[2:3], y) for x, y in zip(a[:4], b[:4], strict=True))
    later, _ = many.reset()  # without a seed the streams go on
    assert not np.isclose(later, first).all(1).any()
    assert np.array_equal(later[2:3], one.reset()[0])


def test_saved_state_goes_on_bitwise():
    config = LockConfig(horizon=3)
    actions = np.random.default_rng(1).random((8, 5, 10))
    first, second = LockVectorEnv(config, 5), LockVectorEnv(config, 5)
    first.reset(seed=0)
    for action in actions[:4]:
        first.step(action)
    state = {key: value.copy() for key, value in first.get_state().items()}
    second.reset(seed=99)
    second.set_state(state)
    for action in actions[4:]:
        a, b = first.step(action), second.step(action)
        assert all(np.array_equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    with pytest.raises(EnvError, match=r"saved locks have shape"):
        LockVectorEnv(LockConfig(horizon=4), 5).set_state(state)


def test_another_combination_is_another_lock():
    assert not np.array_equal(combination(LockConfig()), combination(LockConfig(combination=1)))
    config = LockConfig(horizon=6, combination=1)
    _, success, _ = episode(LockVectorEnv(config, 200), LockExpert(LockConfig(horizon=6), 200))
    assert success.mean() < 0.1


@pytest.mark.parametrize(("policy", "low", "high"), [("script", 0.3, 0.5), ("random", 0.0, 0.02)])
def test_collect_records_greedy_and_useless_data(tmp_path, policy, low, high):
    env = LockConfig(horizon=4)
    config = CollectConfig(
        env=env, policy=policy, quality=0.75, episodes=200, num_envs=50, out=str(tmp_path / "d")
    )
    result = collect(config)
    assert low <= np.mean(result.successes) <= high
    with EpisodeStore.open(result.path) as store:
        assert result.steps == 800
        made = store.episode(0)
        assert made.terminated
        assert made.action.min() >= 0
        assert made.action.max() <= 1


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"env.horizon=0 must be at least 1"):
        LockConfig(horizon=0)
    with pytest.raises(ConfigError, match=r"env.max_steps=7: an episode of the lock has env.horizon=5"):
        LockConfig(max_steps=7)
    with pytest.raises(ConfigError, match=r"env.switch=1.5 must lie in 0..1"):
        LockConfig(switch=1.5)
    with pytest.raises(ConfigError, match=r"unknown env.obs_keys entry 'image'. Available: state"):
        LockConfig(obs_keys=["image"])
    with pytest.raises(ConfigError, match=r"nothing to show"):
        LockVectorEnv(LockConfig(), 1, render="rgb_array")
    env = LockVectorEnv(LockConfig(), 2)
    with pytest.raises(EnvError, match=r"before reset"):
        env.step(np.zeros((2, 10)))
    env.reset(seed=0)
    with pytest.raises(EnvError, match=r"environment 1, dimension 3 is nan"):
        env.step(np.where(np.arange(20).reshape(2, 10) == 13, np.nan, 0.0))
    vec = make_vec(LockConfig(), 3)
    assert vec.spec.max_steps == 5
    assert vec.spec.bounded
