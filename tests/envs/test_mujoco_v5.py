# SPDX-License-Identifier: Apache-2.0
"""The batched MuJoCo v5 tasks against Gymnasium's own environments, number by number."""

import threading

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.vector import AutoresetMode
from robopost_envs.adapters.gymnasium import GymnasiumConfig, make
from robopost_envs.adapters.inprocess import InProcessVecEnv
from robopost_envs.mujoco_v5 import MujocoV5VecEnv, find_task
from robopost_envs.mujoco_v5_tasks import TASKS
from robopost_envs.threads import ThreadTeam

from robopost.errors import EnvError
from robopost.vector import VecEnv

ALL = [
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
]
N = 3


def actions_for(space, steps, seed=0, num_envs=N):
    rng = np.random.default_rng(seed)
    return rng.uniform(space.low, space.high, (steps, num_envs, *space.shape)).astype(np.float32)


def vec(task, num_envs=N, threads=2, dtype=np.float64, **kwargs):
    return MujocoV5VecEnv(gym.make(task, **kwargs), num_envs, threads=threads, dtype=dtype)


def assert_follows_gymnasium(task, steps, **kwargs):
    """Same seeds and actions: every number is Gymnasium's, through resets. Returns the resets seen."""
    ours, theirs = vec(task, **kwargs), [gym.make(task, **kwargs) for _ in range(N)]
    obs, _ = ours.reset(seed=11)
    for i, env in enumerate(theirs):
        np.testing.assert_array_equal(obs["state"][i], env.reset(seed=11 + i)[0])
    resets = 0
    for action in actions_for(ours.single_action_space, steps):
        obs, reward, terminated, truncated, info = ours.step(action)
        for i, env in enumerate(theirs):
            expected, expected_reward, term, trunc, _ = env.step(action[i])
            assert (terminated[i], truncated[i]) == (term, trunc)
            np.testing.assert_allclose(reward[i], expected_reward, rtol=0, atol=1e-12)
            if term or trunc:
                resets += 1
                assert info["_final_obs"][i]
                np.testing.assert_array_equal(info["final_obs"]["state"][i], expected)
                expected, _ = env.reset()  # goes on with the same random stream
            np.testing.assert_array_equal(obs["state"][i], expected)
    ours.close()
    return resets


@pytest.mark.parametrize("task", ALL)
def test_every_task_is_gymnasium_bit_for_bit_through_resets(task):
    assert assert_follows_gymnasium(task, 130, max_episode_steps=60) >= 2 * N


@pytest.mark.parametrize(
    ("task", "kwargs"),
    [
        ("HalfCheetah-v5", {"forward_reward_weight": 2.0, "reset_noise_scale": 0.3, "frame_skip": 2}),
        ("Hopper-v5", {"terminate_when_unhealthy": False, "healthy_reward": 0.25}),
        (
            "Hopper-v5",
            {"healthy_state_range": (-1.0, 1.0), "exclude_current_positions_from_observation": False},
        ),
        ("Walker2d-v5", {"healthy_z_range": (0.9, 1.3), "ctrl_cost_weight": 0.5}),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.7}),
        ("Ant-v5", {"contact_force_range": (-0.2, 0.1), "exclude_current_positions_from_observation": False}),
        ("Humanoid-v5", {"include_cvel_in_observation": False, "include_cfrc_ext_in_observation": False}),
        ("HumanoidStandup-v5", {"include_cinert_in_observation": False, "impact_cost_weight": 1e-3}),
        ("InvertedDoublePendulum-v5", {"healthy_reward": 3.0}),
        ("Reacher-v5", {"reward_control_weight": 4.0}),
        ("Pusher-v5", {"reward_near_weight": 2.0}),
    ],
)
def test_keyword_arguments_hold(task, kwargs):
    assert_follows_gymnasium(task, 25, **kwargs)


def test_all_v5_tasks_are_covered():
    registered = {
        entry.entry_point.replace(":", ".")
        for name, entry in gym.registry.items()
        if name.endswith("-v5") and "gymnasium.envs.mujoco" in str(entry.entry_point)
    }
    assert {path.split(".")[-1] for path in registered} == {path.split(".")[-1] for path in TASKS}


def test_float32_observations_are_gymnasiums_rounded_once():
    ours, one = vec("Walker2d-v5", num_envs=1, dtype=np.float32), gym.make("Walker2d-v5")
    obs, _ = ours.reset(seed=3)
    expected, _ = one.reset(seed=3)
    assert obs["state"].dtype == np.float32
    np.testing.assert_array_equal(obs["state"][0], expected.astype(np.float32))


@pytest.mark.parametrize("task", ["Hopper-v5", "Ant-v5"])
def test_number_of_threads_changes_nothing(task):
    runs = []
    for threads in (1, 3):
        env = vec(task, num_envs=5, threads=threads)
        assert env.threads == threads
        trace = [env.reset(seed=0)[0]["state"]]
        for action in actions_for(env.single_action_space, 60, num_envs=5):
            obs, reward, *_ = env.step(action)
            trace += [obs["state"], reward]
        env.close()
        runs.append(trace)
    for one, three in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("task", ["Hopper-v5", "Ant-v5", "Humanoid-v5", "Pusher-v5"])
def test_saved_state_continues_bit_for_bit_in_another_environment(task):
    first = vec(task, max_episode_steps=40)
    first.reset(seed=5)
    actions = actions_for(first.single_action_space, 75)
    for action in actions[:25]:
        first.step(action)
    saved = first.get_state()
    assert saved["rng"].dtype == np.uint64
    second = vec(task, threads=1, max_episode_steps=40)
    second.set_state({key: value.copy() for key, value in saved.items()})
    ended = 0
    for action in actions[25:]:
        a, b = first.step(action), second.step(action)
        for x, y in zip(a[1:4], b[1:4], strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(a[0]["state"], b[0]["state"])
        ended += int((a[2] | a[3]).sum())
    assert ended >= N  # resets drew from the restored streams


def test_saved_state_is_a_copy_and_must_fit():
    env = vec("Hopper-v5")
    with pytest.raises(EnvError, match="before reset"):
        env.get_state()
    env.reset(seed=0)
    saved = env.get_state()
    before = saved["physics"].copy()
    env.step(np.zeros((N, 3)))
    np.testing.assert_array_equal(saved["physics"], before)
    with pytest.raises(EnvError, match="saved physics has shape"):
        vec("Hopper-v5", num_envs=2).set_state(saved)


def test_seeds_lists_masks_and_streams():
    env, one = vec("Hopper-v5"), gym.make("Hopper-v5")
    first, _ = env.reset(seed=[9, 4, 9])
    np.testing.assert_array_equal(first["state"][0], first["state"][2])
    np.testing.assert_array_equal(first["state"][1], one.reset(seed=4)[0])
    moved, *_ = env.step(np.ones((N, 3)))
    masked, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(masked["state"][[0, 2]], moved["state"][[0, 2]])
    np.testing.assert_array_equal(masked["state"][1], one.reset()[0])  # second draw of the stream of seed 4
    with pytest.raises(EnvError, match="2 seeds for 3 environments"):
        env.reset(seed=[1, 2])


def test_same_step_contract_through_the_loops_wrapper():
    env = VecEnv(make(GymnasiumConfig(id="HalfCheetah-v5", max_steps=7), 2))
    assert env.env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.can_save
    env.reset(seed=0)
    for step in range(1, 8):
        out = env.step(np.zeros((2, 6), np.float32))
        assert out.truncated.all() == (step == 7)
    assert not out.terminated.any()
    assert np.abs(out.next_obs["state"] - out.obs["state"]).max() > 1e-3
    later = env.step(np.zeros((2, 6), np.float32))
    assert not later.done.any()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((N, 4)), r"shape \(3, 4\), expected \(3, 3\)"),
        (np.zeros(3), r"shape \(3,\), expected \(3, 3\)"),
        (np.array([[0, 0, 0], [0, np.nan, 0], [0, 0, 0]]), "environment 1, dimension 1 is nan"),
        (np.array([[0, 0, 0], [0, 0, 0], [np.inf, 0, 0]]), "environment 2, dimension 0 is inf"),
    ],
)
def test_bad_actions_are_named_and_leave_the_physics_alone(action, message):
    env = vec("Hopper-v5")
    with pytest.raises(EnvError, match="before reset"):
        env.step(np.zeros((N, 3)))
    env.reset(seed=0)
    before = env.get_state()
    with pytest.raises(EnvError, match=message):
        env.step(action)
    for key, value in env.get_state().items():
        np.testing.assert_array_equal(value, before[key])


class OtherReward(HopperEnv):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 42.0, *rest


def test_anything_but_the_original_task_takes_the_in_process_path():
    gym.register("OtherHopper-v0", entry_point=OtherReward, max_episode_steps=30)
    try:
        env = make(GymnasiumConfig(id="OtherHopper-v0"), 2)
        assert isinstance(env, InProcessVecEnv)
        env.reset(seed=0)
        assert env.step(np.zeros((2, 3), np.float32))[1].tolist() == [42.0, 42.0]
    finally:
        gym.registry.pop("OtherHopper-v0")
    wrapped = gym.wrappers.RescaleAction(gym.make("Hopper-v5"), -2.0, 2.0)
    assert find_task(wrapped) is None
    with pytest.raises(EnvError, match=r"env\.fast=false"):
        MujocoV5VecEnv(wrapped, 2)


def test_both_paths_give_the_same_episodes():
    fast, slow = (make(GymnasiumConfig(id="Hopper-v5", fast=f, max_steps=40), 2) for f in (True, False))
    assert (type(fast), type(slow)) == (MujocoV5VecEnv, InProcessVecEnv)
    np.testing.assert_array_equal(fast.reset(seed=2)[0]["state"], slow.reset(seed=2)[0]["state"])
    for action in actions_for(fast.single_action_space, 60, num_envs=2):
        a, b = fast.step(action), slow.step(action)
        np.testing.assert_array_equal(a[0]["state"], b[0]["state"])
        for x, y in zip(a[1:4], b[1:4], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)
        assert a[4].keys() == b[4].keys()


def test_frames_of_chosen_environments_and_untouched_physics():
    env = MujocoV5VecEnv(gym.make("HalfCheetah-v5", render_mode="rgb_array", width=64, height=48), 2)
    env.reset(seed=0)
    for _ in range(10):
        env.step(np.array([[1.0] * 6, [-1.0] * 6]))
    before = env.get_state()["physics"]
    try:
        frames = env.render([1, 0])
    except Exception as error:
        pytest.skip(f"no OpenGL here: {error}")
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 2
    assert np.abs(frames[0].astype(int) - frames[1]).max() > 0
    np.testing.assert_array_equal(env.get_state()["physics"], before)
    env.close()


def test_thread_team_does_every_job_once_and_balances():
    seen, lock = [], threading.Lock()
    barrier = threading.Barrier(3)

    def work(jobs):
        barrier.wait(timeout=10)  # all three are at work before the first job is taken
        for job in jobs:
            with lock:
                seen.append((threading.get_ident(), job))

    team = ThreadTeam([work] * 3)
    assert len(team) == 3
    for _ in range(20):
        seen.clear()
        team.run(range(50))
        assert sorted(job for _, job in seen) == list(range(50))
    team.close()
    team.close()
    with pytest.raises(RuntimeError, match="closed"):
        team.run(range(1))


def test_thread_team_raises_what_a_thread_raised_and_survives():
    other_took_it = threading.Event()

    def mine(jobs):
        assert other_took_it.wait(timeout=10)

    def other(jobs):
        job = next(jobs)
        other_took_it.set()
        if job == 7:
            raise ValueError("job 7")

    team = ThreadTeam([mine, other])
    with pytest.raises(ValueError, match="job 7"):
        team.run([7])
    other_took_it.clear()
    team.run([1])
    team.close()
