# SPDX-License-Identifier: Apache-2.0
"""The arm family as environments: seeds, autoreset, saved states, pictures, Gymnasium ids."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from robopost_envs.arms.env import ArmVectorEnv
from robopost_envs.arms.expert import ScriptedExpert
from robopost_envs.arms.tasks import CENTRE, SCALE

from robopost.errors import ConfigError, EnvError
from robopost.registry import ENVS

NAMES = ("arm_reach", "arm_push", "arm_pick_place", "arm_language")
STATE_SIZE = {"arm_reach": 15, "arm_push": 25, "arm_pick_place": 27, "arm_language": 42}


def config(name, **options):
    return ENVS.get(name).config(**{"threads": 1, **options})


def make(name, num_envs=2, render=None, **options):
    return ArmVectorEnv(config(name, **options), num_envs, render=render)


def random_actions(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_spaces_and_state_size(name):
    env = make(name, 3)
    obs, info = env.reset(seed=0)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert obs["state"].shape == (3, STATE_SIZE[name])
    assert obs["state"].dtype == np.float32
    assert env.observation_space.contains(obs)
    assert env.single_action_space.shape == (4 if name in ("arm_pick_place", "arm_language") else 3,)
    if name == "arm_language":
        assert [bytes(row).rstrip(b"\0").decode() for row in obs["instruction"]] == info["instruction"]


@pytest.mark.parametrize("name", NAMES)
def test_environment_depends_only_on_its_seed(name):
    batch, one = make(name, 4, threads=3, max_steps=12), make(name, 1, max_steps=12)
    actions = random_actions(batch, 30)
    obs_b, _ = batch.reset(seed=[5, 6, 7, 8])
    obs_1, _ = one.reset(seed=7)
    np.testing.assert_array_equal(obs_b["state"][2], obs_1["state"][0])
    for action in actions:  # beyond two autoresets
        obs_b, reward_b, _, cut_b, _ = batch.step(action)
        obs_1, reward_1, _, cut_1, _ = one.step(action[2:3])
        np.testing.assert_array_equal(obs_b["state"][2], obs_1["state"][0])
        assert reward_b[2] == reward_1[0]
        assert cut_b[2] == cut_1[0]


def test_seeding():
    env = make("arm_push", 2)
    first, _ = env.reset(seed=3)
    second, _ = env.reset(seed=[3, 4])
    np.testing.assert_array_equal(first["state"], second["state"])
    later, _ = env.reset()
    assert np.abs(later["state"] - second["state"]).max() > 1e-3
    with pytest.raises(EnvError, match="3 seeds for 2 environments"):
        env.reset(seed=[1, 2, 3])


def test_autoreset_keeps_the_true_final_observation():
    env, free = make("arm_push", 3, max_steps=5), make("arm_push", 3, max_steps=50)
    actions = random_actions(env, 6)
    env.reset(seed=0)
    free.reset(seed=0)
    for step in range(5):
        obs, reward, terminated, truncated, info = env.step(actions[step])
        true, true_reward, _, _, _ = free.step(actions[step])
        np.testing.assert_array_equal(reward, true_reward)
    assert truncated.all()
    assert not terminated.any()
    assert info["_final_obs"].all()
    np.testing.assert_array_equal(info["final_obs"]["state"], true["state"])
    assert np.abs(obs["state"] - true["state"]).max() > 1e-2
    _, _, _, truncated, info = env.step(actions[5])
    assert not truncated.any()
    assert "final_obs" not in info


def test_termination_on_success_resets_only_the_solved():
    env = make("arm_reach", 16, terminate_on_success=True)
    expert = ScriptedExpert(env.config, 16, 1.0, 0)
    obs, _ = env.reset(seed=0)
    seen = 0
    for _ in range(12):
        goals = obs["state"][:, 9:12].copy()
        obs, _, terminated, truncated, info = env.step(expert.act(obs))
        np.testing.assert_array_equal(terminated, info["success"])
        assert not truncated.any()
        changed = np.abs(obs["state"][:, 9:12] - goals).max(axis=1) > 1e-6
        np.testing.assert_array_equal(changed, terminated)
        if terminated.any() and not terminated.all():
            np.testing.assert_array_equal(info["_final_obs"], terminated)
            running = ~terminated
            np.testing.assert_array_equal(info["final_obs"]["state"][running], obs["state"][running])
            seen += 1
    assert seen > 0


@pytest.mark.parametrize(("name", "control"), [("arm_push", "delta_ee"), ("arm_language", "position")])
def test_restored_state_continues_bitwise(name, control):
    env, other = make(name, 3, max_steps=20, control=control), make(name, 3, max_steps=20, control=control)
    actions = random_actions(env, 60)
    env.reset(seed=0)
    for action in actions[:25]:
        env.step(action)
    state = env.get_state()
    assert all(isinstance(value, np.ndarray) for value in state.values())
    expected = [env.step(action) for action in actions[25:]]  # passes a reset: random streams count too
    other.reset(seed=99)
    other.set_state(state)
    for action, (obs, reward, _, truncated, info) in zip(actions[25:], expected, strict=True):
        got = other.step(action)
        for key, value in obs.items():
            np.testing.assert_array_equal(got[0][key], value)
        np.testing.assert_array_equal(got[1], reward)
        np.testing.assert_array_equal(got[3], truncated)
        np.testing.assert_array_equal(got[4]["success"], info["success"])
    with pytest.raises(EnvError, match="expected shape"):
        make(name, 4).set_state(state)


def test_state_vector_is_what_the_table_says():
    env = make("arm_push", 2)
    obs, _ = env.reset(seed=0)
    for action in random_actions(env, 5):
        obs, *_ = env.step(action)
    state, scene = obs["state"].astype(float), env.scene
    np.testing.assert_allclose(state[:, 0:3] / SCALE + CENTRE, scene.ee, atol=1e-6)
    np.testing.assert_allclose(state[:, 9:12] / SCALE + CENTRE, scene.position[:, 0], atol=1e-6)
    np.testing.assert_allclose(state[:, 18:20] / SCALE + CENTRE[:2], scene.goal[:, 0, :2], atol=1e-6)
    relative = (scene.goal - scene.position)[:, 0, :2] * SCALE
    np.testing.assert_allclose(state[:, 20:22], relative, atol=1e-5)


@pytest.mark.parametrize("obs", ["pixels96", "pixels128", "state+pixels96"])
def test_image_observations(obs):
    env = make("arm_push", 2, obs=obs, max_steps=2)
    first, _ = env.reset(seed=0)
    size = env.config.image_size
    assert first["image"].shape == (2, size, size, 3)
    assert first["image"].dtype == np.uint8
    assert first["state"].shape == (2, 25 if obs.startswith("state") else 9)
    assert np.abs(first["image"][0].astype(int) - first["image"][1]).max() > 50  # other layout, other picture
    env.step(np.zeros((2, 3)))
    last, _, _, truncated, info = env.step(np.zeros((2, 3)))
    assert truncated.all()
    still = np.abs(info["final_obs"]["image"].astype(int) - first["image"]).mean()
    assert still < 1.0  # the arm stood still: the final picture is the old episode's
    assert np.abs(last["image"].astype(int) - first["image"]).mean() > 2 * still
    env.close()


def test_fast_rendering_flags_and_frames():
    env = make("arm_language", 3, render="rgb_array")
    env.reset(seed=0)
    model = env.physics.model
    assert model.vis.quality.shadowsize == 0
    assert model.vis.quality.offsamples == 0
    frames = env.render([2, 0])
    assert frames.shape == (2, 256, 256, 3)
    np.testing.assert_array_equal(frames[0], env.render([2])[0])
    renderer = env._renderers[256]
    assert renderer.fast
    assert all(renderer._renderer.scene.flags[flag] == 0 for flag in renderer._off)
    assert len(np.unique(frames[0].reshape(-1, 3), axis=0)) > 50  # a picture, not one colour
    env.close()
    with pytest.raises(EnvError, match="render='rgb_array'"):
        make("arm_push").render()


def test_missing_gl_names_the_fix(monkeypatch):
    import mujoco

    def broken(*args, **kwargs):
        raise RuntimeError("no display")

    monkeypatch.setattr(mujoco.Renderer, "__init__", broken)
    monkeypatch.setattr(mujoco.Renderer, "__del__", lambda self: None)
    env = make("arm_push", 1, render="rgb_array")
    env.reset(seed=0)
    with pytest.raises(EnvError, match=r"no display.*apt-get install -y libegl1.*MUJOCO_GL=osmesa"):
        env.render()


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_ids_pass_check_env(name):
    words = "".join(word.capitalize() for word in name.split("_"))
    env = gym.make(f"robopost/{words}-v0", reward="sparse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded observation space
        check_env(env.unwrapped, skip_render_check=True)
    single, _ = env.reset(seed=4)
    vector, _ = make(name, 2, reward="sparse").reset(seed=3)
    np.testing.assert_array_equal(single["state"], vector["state"][1])
    for _ in range(env.unwrapped.vector.max_steps):
        _, _, _, truncated, info = env.step(env.action_space.sample())
    assert truncated
    assert isinstance(info["success"], bool)
    assert "final_obs" not in info
    env.close()


def test_single_environment_renders_and_rejects_unknown_options():
    env = gym.make("robopost/ArmPush-v0", render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (256, 256, 3)
    env.close()
    with pytest.raises(ConfigError, match="Did you mean 'reward'"):
        gym.make("robopost/ArmPush-v0", rewards="sparse")


def test_bad_actions_are_refused():
    env = make("arm_push", 2)
    with pytest.raises(EnvError, match="before reset"):
        env.step(np.zeros((2, 3)))
    env.reset(seed=0)
    with pytest.raises(EnvError, match="action of environment 1, dimension 1 is nan"):
        env.step(np.array([[0, 0, 0], [0, np.nan, 0]]))
    with pytest.raises(EnvError, match=r"shape \(2, 4\), expected \(2, 3\)"):
        env.step(np.zeros((2, 4)))


def test_obs_keys_choose_observations():
    env = make("arm_language", 1, obs_keys=["instruction"])
    obs, _ = env.reset(seed=0)
    assert list(obs) == ["instruction"]
    with pytest.raises(ConfigError, match="names 'image'"):
        make("arm_push", obs_keys=["image"])


@pytest.mark.parametrize("hz", [5, 20])
def test_control_rate_sets_physics_steps(hz):
    env = make("arm_reach", 1, control_hz=hz)
    assert env.physics.nstep == 100 // hz
    assert env.metadata["render_fps"] == hz
