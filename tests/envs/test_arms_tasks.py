# SPDX-License-Identifier: Apache-2.0
"""The arm family: kinematics, tasks, rewards, instructions, scripted experts."""

import dataclasses

import numpy as np
import pytest
from robopost_envs.arms import kinematics
from robopost_envs.arms.env import HIGH, LOW, ArmVectorEnv
from robopost_envs.arms.expert import ScriptedExpert
from robopost_envs.arms.instructions import (
    BYTES,
    HELD_OUT,
    INSTRUCTIONS,
    KIND,
    OBJECT,
    PUT,
    ZONE,
    decode,
    split_ids,
)

from robopost.errors import ConfigError
from robopost.registry import ENVS

NAMES = ("arm_reach", "arm_push", "arm_pick_place", "arm_language")


def config(name, **options):
    return ENVS.get(name).config(**{"threads": 1, **options})


def make(name, num_envs=2, render=None, **options):
    return ArmVectorEnv(config(name, **options), num_envs, render=render)


def play(env, expert, seed, steps):
    """Any-step success per environment, rewards (T, N), final observation."""
    obs, _ = env.reset(seed=seed)
    solved, rewards = np.zeros(env.num_envs, bool), []
    for _ in range(steps):
        obs, reward, _, _, info = env.step(expert.act(obs))
        solved |= info["success"]
        rewards.append(reward)
    return solved, np.array(rewards), obs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("control", ["delta_ee", "position"])
def test_perfect_expert_solves_every_task(name, control):
    options = {"split": "all"} if name == "arm_language" else {}
    env = make(name, 40, control=control, **options)
    solved, rewards, _ = play(env, ScriptedExpert(env.config, 40, 1.0, 0), 0, env.max_steps)
    assert solved.mean() >= 0.95
    assert rewards.min() >= 0.0
    assert rewards.max() <= 1.0


@pytest.mark.parametrize(("name", "low", "high"), [("arm_push", 0.25, 0.65), ("arm_pick_place", 0.25, 0.7)])
def test_middling_expert_solves_about_half(name, low, high):
    env = make(name, 100)
    solved, _, _ = play(env, ScriptedExpert(env.config, 100, 0.5, 0), 0, env.max_steps)
    assert low <= solved.mean() <= high


def test_expert_is_deterministic_and_independent_of_the_batch():
    big, one = make("arm_push", 3), make("arm_push", 1)
    first, _, obs_a = play(big, ScriptedExpert(big.config, 3, 0.4, 7), 7, 30)
    second, _, obs_b = play(big, ScriptedExpert(big.config, 3, 0.4, 7), 7, 30)
    _, _, alone = play(one, ScriptedExpert(one.config, 1, 0.4, 8), 8, 30)
    np.testing.assert_array_equal(obs_a["state"], obs_b["state"])
    np.testing.assert_array_equal(obs_a["state"][1], alone["state"][0])
    _, _, other = play(big, ScriptedExpert(big.config, 3, 0.4, 11), 7, 30)
    assert np.abs(other["state"] - obs_a["state"]).max() > 1e-3
    np.testing.assert_array_equal(first, second)


def test_expert_rejects_bad_quality_and_missing_state():
    with pytest.raises(ConfigError, match=r"quality=1\.5 must lie in \[0, 1\]"):
        ScriptedExpert(config("arm_push"), 1, 1.5)
    with pytest.raises(ConfigError, match="state\\+pixels96"):
        ScriptedExpert(config("arm_push", obs="pixels96"), 1, 1.0)


def test_registered_functions_offer_the_expert():
    for name in NAMES:
        entry = ENVS.get(name)
        expert = entry.target.expert(config(name), 2, 0.7, 5)
        env = entry.target(config(name), 2)
        obs, _ = env.reset(seed=0)
        assert env.action_space.contains(expert.act(obs))


def test_held_out_instructions():
    train, held = set(split_ids("train")), set(split_ids("heldout"))
    assert len(INSTRUCTIONS) == 18
    assert not train & held
    assert train | held == set(split_ids("all")) == set(range(18))
    assert len(held) == len(HELD_OUT) == 4
    seen = [i for i in train if KIND[i] == PUT]
    assert {int(OBJECT[i]) for i in seen} == {0, 1, 2}  # parts are seen, only their combination is new
    assert {int(ZONE[i]) for i in seen} == {0, 1, 2, 3}
    np.testing.assert_array_equal(decode(BYTES), np.arange(18))
    assert decode(np.zeros((1, 64), np.uint8))[0] == -1
    for split, allowed in (("train", train), ("heldout", held)):
        env = make("arm_language", 64, split=split)
        obs, _ = env.reset(seed=0)
        given = set(decode(obs["instruction"]))
        assert given <= allowed
        assert len(given) >= 4


def test_instructions_can_be_chosen_by_their_words():
    env = make("arm_language", 64, split="all", only=["touch", "put the red"])
    obs, _ = env.reset(seed=0)
    texts = {INSTRUCTIONS[i] for i in decode(obs["instruction"])}
    assert texts <= {text for text in INSTRUCTIONS if "touch" in text or "put the red" in text}
    assert len(texts) == 7
    with pytest.raises(ConfigError, match=r"env.only names 'push', which no instruction of env.split=train"):
        make("arm_language", 1, only=["push"])


def test_only_the_named_cube_and_zone_count():
    env = make("arm_language", 1, split="all")
    env.reset(seed=0)
    scene = env.scene
    for number in np.flatnonzero(KIND == PUT):
        for cube in range(3):
            for zone in range(4):
                position = scene.position.copy()
                position[0, cube] = scene.goal[0, zone] + [0.01, 0, 0.02]
                moved = dataclasses.replace(
                    scene, position=position, opening=np.ones(1), command=np.array([number])
                )
                assert bool(env.task.success(moved)[0]) == (cube == OBJECT[number] and zone == ZONE[number])
                held = dataclasses.replace(moved, opening=np.array([0.5]))
                assert not env.task.success(held)[0]


def test_push_success_and_reward_follow_the_distance():
    env = make("arm_push", 1)
    env.reset(seed=0)
    rewards = []
    for gap in (0.2, 0.1, 0.031, 0.029, 0.0):
        position = env.scene.goal[:, :1] + np.array([-gap, 0.0, 0.02])
        ee = position[:, 0] - np.array([0.05, 0.0, 0.0])
        scene = dataclasses.replace(env.scene, position=position, ee=ee)
        success = env.task.success(scene)
        assert success[0] == (gap < 0.03)
        rewards.append(env.task.progress(scene, success)[0])
        if gap == 0.1:  # fingertips behind the block: full reach term, push term 0.4 * (1 - tanh(0.6))
            assert rewards[-1] == pytest.approx(0.2 + 0.4 * (1 - np.tanh(0.6)), abs=1e-9)
    assert (np.diff(rewards) > 0).all()
    assert rewards[-1] == pytest.approx(1.0)


def test_sparse_reward_is_success():
    env = make("arm_reach", 8, reward="sparse")
    expert = ScriptedExpert(env.config, 8, 1.0, 0)
    obs, _ = env.reset(seed=0)
    for _ in range(15):
        obs, reward, _, _, info = env.step(expert.act(obs))
        np.testing.assert_array_equal(reward, info["success"].astype(float))
    assert reward.all()


def test_placing_needs_lifting_and_letting_go():
    env = make("arm_pick_place", 1)
    env.reset(seed=0)
    done = dataclasses.replace(
        env.scene,
        position=env.scene.goal[:, :1] + np.array([0.0, 0.0, 0.02]),
        opening=np.ones(1),
        lifted=np.array([True]),
    )
    assert env.task.success(done)[0]
    assert not env.task.success(dataclasses.replace(done, lifted=np.array([False])))[0]
    assert not env.task.success(dataclasses.replace(done, opening=np.array([0.5])))[0]
    assert not env.task.success(dataclasses.replace(done, position=done.position + np.array([0, 0, 0.05])))[0]


def test_inverse_kinematics_against_the_simulated_arm():
    env = make("arm_reach", 200)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    tip = rng.uniform(LOW, HIGH, (200, 3))
    qpos = np.zeros((200, env.physics.model.nq))
    qpos[:, :6] = kinematics.inverse(tip)
    env.physics.set_physics(np.arange(200), qpos, np.zeros((200, env.physics.model.nv)))
    env._refresh()
    height = tip[:, 2] + (kinematics.TOOL - kinematics.SHOULDER)
    wrist = np.hypot(np.hypot(tip[:, 0], tip[:, 1]), height)
    reachable = wrist < 0.719  # upper arm and forearm stretched: 0.72
    assert reachable.mean() > 0.9
    np.testing.assert_allclose(env.scene.ee[reachable], tip[reachable], atol=1e-9)
    assert np.abs(env.scene.ee - tip).max() < 0.06  # beyond: stretched towards it
    home = kinematics.HOME
    assert (home - kinematics.JOINT_SPAN > kinematics.JOINT_LOW).all()
    assert (home + kinematics.JOINT_SPAN < kinematics.JOINT_HIGH).all()


def test_delta_control_moves_the_fingertips_by_the_step_size():
    env = make("arm_reach", 1)
    env.reset(seed=0)
    start = env.scene.ee.copy()
    for _ in range(4):
        env.step(np.array([[0.5, -0.5, 0.25]]))
    for _ in range(10):
        env.step(np.zeros((1, 3)))
    np.testing.assert_allclose(env.scene.ee - start, [[0.06, -0.06, 0.03]], atol=1e-3)
    for _ in range(30):
        env.step(np.ones((1, 3)))  # clipped at the workspace, and above its corner
    assert env.scene.ee[0, 0] <= HIGH[0] + 0.01
    assert env.scene.ee[0, 2] <= HIGH[2] + 0.01


def test_position_control_reaches_the_commanded_joints():
    env = make("arm_reach", 1, control="position")
    env.reset(seed=0)
    action = np.array([[0.3, -0.2, 0.1, 0.2, -0.1, 0.4]])
    for _ in range(25):
        env.step(action)
    expected = kinematics.HOME + action[0] * kinematics.JOINT_SPAN
    np.testing.assert_allclose(env.physics.qpos[0, :6], expected, atol=5e-3)


def test_block_rests_and_is_pushed_quasi_statically():
    env = make("arm_push", 4)
    env.reset(seed=0)
    start = env.scene.position.copy()
    for _ in range(20):
        env.step(np.zeros((4, 3)))
    np.testing.assert_allclose(env.scene.position, start, atol=5e-4)
    expert = ScriptedExpert(env.config, 4, 1.0, 0)
    obs, _ = env.reset(seed=0)
    for _ in range(60):
        obs, *_ = env.step(expert.act(obs))
    stopped = env.scene.position.copy()
    for _ in range(5):
        env.step(np.zeros((4, 3)))
    np.testing.assert_allclose(env.scene.position[:, :, :2], stopped[:, :, :2], atol=5e-3)
    np.testing.assert_allclose(env.scene.position[:, 0, 2], 0.02, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"control": "delta"},
            "env.control='delta' must be one of delta_ee, position. Did you mean 'delta_ee'",
        ),
        ({"obs": "pixel96"}, "Did you mean 'pixels96'"),
        ({"reward": "shaped"}, "env.reward='shaped' must be one of dense, sparse"),
        ({"control_hz": 30}, "env.control_hz=30 must divide 100"),
        ({"step_size": 0.5}, "env.step_size=0.5 must lie in"),
        ({"goal_range": [0.3, 0.9, -0.1, 0.1]}, "env.goal_range="),
        ({"max_steps": 0}, "env.max_steps=0 must be at least 1"),
        ({"tolerance": 1.0}, "env.tolerance=1.0"),
    ],
)
def test_config_errors_name_key_value_and_range(options, words):
    with pytest.raises(ConfigError) as error:
        config("arm_push", **options)
    assert words in str(error.value)
