# SPDX-License-Identifier: Apache-2.0
"""Smoothness by hand: differences, saturation, seams, spectral arc length, overlapping chunks; never across an end."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from robopost.config import EnvConfig, PolicyConfig
from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.evaluate.rollout import EvalResult, evaluate
from robopost.evaluate.smoothness import (
    MotionLog,
    Smoothness,
    difference_rms,
    ratio_samples,
    saturation,
    seam_jumps,
    sparc,
)
from robopost.policies.base import Policy
from robopost.registry import ENVS
from robopost.report import write_report
from robopost.vector import VecEnv, make_vec

NAN = math.nan


def columns(*episodes):
    """Episodes of one action dimension side by side, (T, N, 1), with poison behind their ends."""
    x = np.full((max(map(len, episodes)), len(episodes), 1), 1e6)
    for i, values in enumerate(episodes):
        x[: len(values), i, 0] = values
    return x, np.array([len(values) for values in episodes])


def test_differences_by_hand():
    x, lengths = columns([0.0, 0.1, 0.3, 0.3], [0.5, 0.7], [0.2])
    rate = [math.sqrt((0.01 + 0.04 + 0.0) / 3), 0.2, NAN]
    np.testing.assert_allclose(difference_rms(x, lengths, 1), rate)
    np.testing.assert_allclose(difference_rms(x, lengths, 2), [math.sqrt((0.01 + 0.04) / 2), NAN, NAN])
    np.testing.assert_allclose(difference_rms(x, lengths, 3), [0.3, NAN, NAN])
    # At 10 Hz: a tenth of a second between two actions.
    for order in (1, 2, 3):
        faster = difference_rms(x, lengths, order, dt=0.1)
        np.testing.assert_allclose(faster, difference_rms(x, lengths, order) * 10.0**order)


def test_differences_average_over_dimensions():
    x = np.array([[[0.0, 0.0]], [[0.3, 0.4]]])  # one episode, two dimensions
    assert difference_rms(x, np.array([2]), 1)[0] == pytest.approx(math.sqrt((0.09 + 0.16) / 2))


def test_jerk_of_a_parabola_is_zero_and_of_a_cubic_constant():
    t = np.arange(20) * 0.05
    x, lengths = columns(t**2, t**3)
    assert difference_rms(x, lengths, 2, dt=0.05)[0] == pytest.approx(2.0)
    np.testing.assert_allclose(difference_rms(x, lengths, 3, dt=0.05), [0.0, 6.0], atol=1e-9)


def test_saturation_by_hand():
    x, lengths = columns([0.0, 0.004, 0.5, 1.0], [0.5, 0.994])
    np.testing.assert_allclose(saturation(x, lengths), [0.75, 0.0])


def test_seams_by_hand():
    x, lengths = columns([0.0, 0.1, 0.4, 0.5, 0.9, 1.0], [0.0, 0.1, 0.2])
    begins = np.zeros((6, 2), bool)
    begins[[0, 2, 4]] = True  # chunks of two; the second episode's third chunk would begin behind its end
    seam, inner = seam_jumps(x, lengths, begins)
    np.testing.assert_allclose(seam, [math.sqrt((0.09 + 0.16) / 2), 0.1])
    np.testing.assert_allclose(inner, [0.1, 0.1])
    seam, inner = seam_jumps(x[:2], np.array([2, 2]), begins[:2])
    assert np.isnan(seam).all()


def test_spectral_arc_length_of_a_gaussian_in_closed_form():
    # |F| of a Gaussian of width s is exp(-2 (pi s f)^2); cut at 0.05 it is 20^(-u^2) for u = f / f_cut in [0, 1],
    # whatever s: the length of that curve.
    u = np.linspace(0.0, 1.0, 200_001)
    slope = -2 * u * math.log(20) * 20.0 ** -(u**2)
    expected = -np.trapezoid(np.sqrt(1 + slope**2), u)
    t = np.arange(-4, 4, 0.01)
    for width in (0.2, 0.5):
        assert sparc(7 * np.exp(-0.5 * (t / width) ** 2), 100.0) == pytest.approx(expected, abs=2e-3)


def test_spectral_arc_length_of_movements():
    u = np.linspace(0.0, 1.0, 101)
    one = 30 * u**2 - 60 * u**3 + 30 * u**4  # speed of a minimum-jerk movement of one second
    assert sparc(one, 100.0) == pytest.approx(-1.41, abs=0.01)  # the value Balasubramanian et al. give
    assert sparc(5 * one, 20.0) == pytest.approx(-1.41, abs=0.01)
    two = np.concatenate([one, np.zeros(20), one])
    three = np.concatenate([two, np.zeros(20), one])
    assert sparc(three, 100.0) < sparc(two, 100.0) < -1.6
    assert math.isnan(sparc(np.zeros(10), 10.0))
    assert math.isnan(sparc(np.ones(1), 10.0))
    # Noise at 40 Hz lies above the cut of 10 Hz and changes nothing; at 5 Hz it does.
    noisy = lambda hz: one + 0.3 * np.sin(2 * np.pi * hz * u)  # noqa: E731
    assert sparc(noisy(40), 100.0) == pytest.approx(sparc(one, 100.0), abs=0.05)
    assert sparc(noisy(5), 100.0) < sparc(one, 100.0) - 0.2


def test_a_ratio_of_means_is_not_ruled_by_small_denominators():
    above, below = np.array([2.0, 4.0, 1.0, NAN]), np.array([1.0, 2.0, 1e-9, 5.0])
    values = ratio_samples(above, below)
    assert len(values) == 3
    assert values.mean() == pytest.approx(7 / 3)
    # Delta method: the standard error of r is that of (a - r b) / mean(b).
    assert values.std(ddof=1) == pytest.approx(np.std(above[:3] - 7 / 3 * below[:3], ddof=1))
    assert len(ratio_samples(above, np.zeros(4))) == 0


class Ends(VectorEnv):
    """Episodes of 3 + 2 (seed % 4) steps, at 20 Hz; observes (seed, step), seed -1 in episodes that don't count."""

    def __init__(self, num_envs, low=-1.0, high=1.0, motion=True):
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "control_hz": 20.0}
        if motion:
            self.metadata["motion"] = {"gone": (0, 3), "state": (1, 2)}
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = gym.spaces.Box(low, high, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.seeds, self.t = np.array(seed), np.zeros(self.num_envs, int)
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        done = self.t >= 3 + 2 * (self.seeds % 4)
        info = {"final_obs": self._obs()} if done.any() else {}
        self.seeds, self.t = np.where(done, -1, self.seeds), np.where(done, 0, self.t)
        kind = self.seeds % 2 == 0
        return self._obs(), action[:, 0].astype(float), done & kind, done & ~kind, info

    def _obs(self):
        return np.stack([self.seeds, self.t], axis=1).astype(np.float32)


SPEC = Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,))
LENGTHS = [3 + 2 * (seed % 4) for seed in range(12)]


class Scripted(Policy):
    """Chunk at step t: `at * t + within * h` in fractions of the range, from 0.1 on; wild where nothing counts."""

    def __init__(self, horizon, execute, at=0.01, within=0.01, noise=0.0):
        super().__init__(PolicyConfig(horizon=horizon, execute=execute), SPEC)
        self.at, self.within, self.noise = at, within, noise
        self.register_buffer("unused", torch.zeros(1))

    def sample(self, obs, *, generator=None, deterministic=False):
        seed, t = obs["state"][..., :1], obs["state"][..., 1:]
        x = 0.1 + self.at * t + self.within * torch.arange(self.horizon)
        x = torch.where(seed < 0, torch.rand(1).expand_as(x), x)
        if not deterministic:
            x = x + self.noise * torch.randn(x.shape, generator=generator)
        return (2 * x - 1)[..., None], None, None


def run(policy, num_envs=12, episodes=12, **options):
    return evaluate(policy, VecEnv(Ends(num_envs)), episodes=episodes, seed=0, **options).smoothness


@pytest.mark.parametrize("num_envs", [1, 5, 12, 20])
def test_numbers_are_of_the_counted_episodes_alone(num_envs):
    torch.manual_seed(num_envs)
    found = run(Scripted(4, 2, at=0.03), num_envs).episodes
    for i, length in enumerate(LENGTHS):
        t = np.arange(length)
        x = 0.1 + 0.03 * (t - t % 2) + 0.01 * (t % 2)
        change = np.diff(x)
        assert found["action_rate"][i] == pytest.approx(20 * np.sqrt(np.square(change).mean()), rel=1e-4)
        jerk = np.diff(x, 3)
        if len(jerk):
            assert found["action_jerk"][i] == pytest.approx(8000 * np.sqrt(np.square(jerk).mean()), rel=1e-3)
        else:
            assert np.isnan(found["action_jerk"][i])
        assert found["seam_jump"][i] == pytest.approx(0.05, rel=1e-4)
        assert found["inner_jump"][i] == pytest.approx(0.01, rel=1e-4)
        # Chunks two steps apart promised 0.06 - 0.02 too little for the same steps.
        assert found["chunk_overlap_rms"][i] == pytest.approx(0.04, rel=1e-4)
        # `state`'s second column is the step: constant speed, up to the true final observation.
        assert found["sparc"][i] == pytest.approx(sparc(np.ones(length), 20.0))
    assert not found["saturation"].any()


def test_chunks_that_agree_have_no_seams():
    smooth = run(Scripted(6, 2))
    intervals = smooth.intervals()
    assert intervals["chunk_overlap_rms"].value == pytest.approx(0.0, abs=1e-6)
    assert intervals["chunk_seam_ratio"].value == pytest.approx(1.0, abs=1e-3)
    assert intervals["chunk_seam_ratio"].n == 12
    assert run(Scripted(6, 2, at=0.03)).intervals()["chunk_seam_ratio"].value == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize(
    ("horizon", "execute", "absent"),
    [
        (1, 1, {"seam_jump", "inner_jump", "chunk_overlap_rms", "sample_std"}),
        (4, 4, {"chunk_overlap_rms", "sample_std"}),  # chunks don't overlap
        (4, 1, {"seam_jump", "inner_jump", "sample_std"}),  # every step is a seam
        (4, 3, {"sample_std"}),
    ],
)
def test_what_a_policy_has_no_such_thing_for_is_absent(horizon, execute, absent):
    smooth = run(Scripted(horizon, execute))
    every = {"action_rate", "action_acceleration", "action_jerk", "saturation", "sparc", "seam_jump"}
    every |= {"inner_jump", "chunk_overlap_rms", "sample_std"}
    assert set(smooth.episodes) == every - absent
    assert smooth.dt == 0.05
    if execute == 1 and horizon > 1:
        assert smooth.intervals()["chunk_overlap_rms"].value == pytest.approx(0.0, abs=1e-6)
        assert "chunk_seam_ratio" not in smooth.intervals()


def test_spread_of_samples_changes_no_episode():
    policy = Scripted(4, 2, noise=0.02)
    plain = evaluate(policy, VecEnv(Ends(4)), episodes=12, seed=0, deterministic=False)
    drawn = evaluate(policy, VecEnv(Ends(4)), episodes=12, seed=0, deterministic=False, draws=50)
    assert np.array_equal(plain.returns, drawn.returns)
    spread = drawn.smoothness.intervals()["sample_std"].value
    assert spread == pytest.approx(0.02, rel=0.05)
    # Independent noise in both chunks: their difference has twice its variance, on top of no systematic one.
    many = evaluate(policy, VecEnv(Ends(4)), episodes=200, seed=0, deterministic=False).smoothness
    squares = np.nanmean(np.square(many.episodes["chunk_overlap_rms"]))
    assert math.sqrt(squares) == pytest.approx(math.sqrt(2) * 0.02, rel=0.05)
    single = run(Scripted(1, 1, noise=0.02), draws=50)
    assert single.intervals()["sample_std"].value == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ConfigError, match="draws=1 must be 0"):
        run(policy, draws=1)


def test_no_bounds_and_discrete_actions_have_no_smoothness():
    open_ended = Spec({"state": ((2,), "float32")}, 1, (-np.inf,), (np.inf,))
    policy = Scripted(1, 1)
    env = VecEnv(Ends(2, -np.inf, np.inf))
    assert env.spec == open_ended
    result = evaluate(policy, env, episodes=2, seed=0)
    assert result.smoothness is None
    assert result.to_json()["smoothness"] is None
    assert not any(line.startswith("motion") for line in result.summary())
    discrete = VecEnv(Ends(2))
    discrete.spec = Spec({"state": ((2,), "float32")}, 1, (0.0,), (4.0,), 0, 5)
    log = MotionLog(discrete, policy, 2)
    assert not log.measures
    assert log.watch is None
    log.begin(discrete.reset([0, 1]), np.ones(2, bool))
    log.step(np.zeros((2, 1), np.float32), {})
    log.end(np.arange(2), np.ones(2, bool), np.ones(2, int))
    assert log.result() is None


def test_json_console_trackers_and_report(tmp_path):
    result = evaluate(Scripted(4, 2, at=0.03), VecEnv(Ends(4)), episodes=6, seed=0)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False, sort_keys=True))
    back = EvalResult.from_json(data).smoothness
    assert back.dt == 0.05
    assert back.episodes.keys() == result.smoothness.episodes.keys()
    for name, values in result.smoothness.episodes.items():
        np.testing.assert_allclose(back.episodes[name], values, rtol=1e-5, err_msg=name)
    assert data["smoothness"]["chunk_seam_ratio"]["value"] == pytest.approx(5.0, rel=1e-3)
    old = {key: value for key, value in data.items() if key != "smoothness"}
    assert EvalResult.from_json(old).smoothness is None
    metrics = result.metrics()
    assert metrics["eval/chunk_overlap_rms"] == pytest.approx(0.04, rel=1e-3)
    assert metrics["eval/saturation"] == 0.0
    assert {key for key in metrics if "chunk" in key or "action" in key} == {
        "eval/action_jerk",
        "eval/chunk_seam_ratio",
        "eval/chunk_overlap_rms",
    }
    assert [row[0] for row in back.rows()] == [row[0] for row in result.smoothness.rows()]
    rows = {label: (interval.value, unit) for label, interval, unit in back.rows()}
    assert rows["action jerk"][1] == "range/s³"
    assert rows["chunk seam ratio"] == (pytest.approx(5.0, rel=1e-3), "x")
    assert rows["saturation"] == (0.0, "%")
    assert "SPARC" in rows
    assert result.summary()[-1].startswith("motion   action jerk ")
    folder = tmp_path / "run"
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"algo": {"name": "bc"}, "policy": {"name": "flow"}}))
    (folder / "eval" / "step_000000010.json").write_text(json.dumps(data | {"step": 10}))
    page = write_report([folder], tmp_path / "page.html").read_text()
    assert "<h3>Smoothness</h3>" in page
    assert "chunk overlap RMS (range)" in page
    (folder / "eval" / "step_000000010.json").write_text(json.dumps(old | {"step": 10}))
    assert "Smoothness" not in write_report([folder], tmp_path / "page.html").read_text()


def test_per_step_where_the_control_rate_is_unknown():
    env = Ends(4)
    del env.metadata["control_hz"]
    smooth = evaluate(Scripted(4, 2, at=0.03), VecEnv(env), episodes=4, seed=0).smoothness
    assert smooth.dt == 0.0
    assert "sparc" not in smooth.episodes  # its cut is in Hz
    x = 0.1 + np.array([0.0, 0.01, 0.06])
    assert smooth.episodes["action_rate"][0] == pytest.approx(np.sqrt(np.square(np.diff(x)).mean()), rel=1e-4)
    assert {unit for label, _, unit in smooth.rows() if label == "action jerk"} == {"range/step³"}


def test_a_history_is_read_at_its_newest_observation():
    class Seeing(Scripted):
        def sample(self, obs, **options):
            assert obs["state"].shape[1:] == (3, 2)
            return super().sample({"state": obs["state"][:, -1]}, **options)

    policy = Seeing(4, 2)
    policy.history = 3
    found = evaluate(policy, VecEnv(Ends(4), history=3), episodes=4, seed=0).smoothness.episodes
    np.testing.assert_allclose(found["sparc"], [sparc(np.ones(n), 20.0) for n in LENGTHS[:4]])


def test_empty_is_empty():
    nothing = Smoothness({"action_jerk": np.full(3, NAN), "saturation": np.full(3, NAN)})
    assert nothing.intervals() == {}
    assert nothing.metrics() == {}
    assert nothing.line() == ""
    assert Smoothness.from_json(nothing.to_json()).intervals() == {}


def test_our_environments_say_how_fast_they_are_and_where_they_move():
    arm = make_vec(ENVS.get("arm_push").config(), 2)
    assert arm.env.metadata["control_hz"] == pytest.approx(10.0)
    # The first three numbers of `state` follow the commanded fingertips.
    before = arm.reset(0)["state"][:, :3]
    for _ in range(5):
        after = arm.step(np.tile(np.float32([1.0, 0.0, 0.0]), (2, 1))).next_obs["state"][:, :3]
    move = after - before
    assert arm.env.metadata["motion"] == {"state": (0, 3)}
    assert (move[:, 0] > 0.5).all()  # decimetres
    assert (np.abs(move[:, 1:]) < 0.2).all()
    arm.close()
    cheetah = make_vec(ENVS.get("gymnasium").config(id="HalfCheetah-v5"), 1)
    assert cheetah.env.metadata["control_hz"] == pytest.approx(20.0)
    cheetah.close()
    pendulum = make_vec(ENVS.get("gymnasium").config(id="Pendulum-v1"), 1)
    assert pendulum.env.metadata["control_hz"] == pytest.approx(20.0)  # it renders at 30
    pendulum.close()
    pytest.importorskip("gym_pusht")
    push = make_vec(ENVS.get("pusht").config(), 1)
    assert push.env.metadata["control_hz"] == 10.0
    obs = push.reset(3)
    ends = {key: obs[key][0, slice(*at)] for key, at in push.env.metadata["motion"].items()}
    assert np.array_equal(ends["state"], ends["keypoint"])
    push.close()


def test_residual_on_chunks_in_our_arm_env(tmp_path):
    from robopost.artefacts.checkpoint import policy_files, save_folder
    from robopost.policies.flow import Flow, FlowConfig
    from robopost.policies.residual import ResidualConfig, ResidualPolicy

    config = ENVS.get("arm_reach").config()
    env = make_vec(config, 2)
    spec = env.spec
    torch.manual_seed(0)
    base = Flow(FlowConfig(horizon=4, execute=2, steps=2, width=16, depth=1), spec)
    save_folder(tmp_path / "base", policy_files(base))
    policy = ResidualPolicy(ResidualConfig(base=str(tmp_path / "base"), hidden=[8]), spec)
    one = evaluate(policy, env, episodes=3, seed=0)
    two = evaluate(policy, env, episodes=3, seed=0, draws=4)  # its base's queue is not asked again
    plain = evaluate(base, env, episodes=3, seed=0)
    env.close()
    assert np.array_equal(one.returns, two.returns)
    assert set(one.smoothness.episodes) == {
        "action_rate",
        "action_acceleration",
        "action_jerk",
        "saturation",
        "sparc",
    }
    assert one.smoothness.dt == pytest.approx(0.1)
    # The correction starts at zero: the same actions as its base, whose chunks show in addition.
    for name, values in one.smoothness.episodes.items():
        np.testing.assert_allclose(values, plain.smoothness.episodes[name], rtol=1e-4)
    assert {"seam_jump", "inner_jump", "chunk_overlap_rms"} <= set(plain.smoothness.episodes)
    assert (one.smoothness.episodes["sparc"] < -1).all()


def test_eval_command_config():
    from robopost.config import EvalConfig

    with pytest.raises(ConfigError, match="draws=1 must be 0"):
        EvalConfig(policy="x", draws=1)
    assert EvalConfig(policy="x", env=EnvConfig(), draws=8).draws == 8
