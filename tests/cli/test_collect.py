# SPDX-License-Identifier: Apache-2.0
"""Recording: what is stored, seeds, noise, resumption, refusal of other settings."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from robopost.cli import main
from robopost.collect import collect, ensure_data
from robopost.compose import compose
from robopost.config import CollectConfig, EnvConfig
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError, DataError, EnvError
from robopost.registry import ENVS


class Counter(VectorEnv):
    """state = [seed, step]; episodes of 3 + seed % 3 steps, seeds divisible by 3 terminate, the rest are cut.

    Reward is the executed action; success on the last step of even seeds.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": 20}  # noqa: RUF012

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)
        self.seeds, self.steps = np.zeros(num_envs, int), np.zeros(num_envs, int)

    def _obs(self):
        return np.stack([self.seeds, self.steps], 1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.seeds, self.steps = np.array(seed), np.zeros(self.num_envs, int)
        return self._obs(), {}

    def step(self, action):
        self.steps = self.steps + 1
        done = self.steps >= 3 + self.seeds % 3
        terminated = done & (self.seeds % 3 == 0)
        info = {"success": done & (self.seeds % 2 == 0)}
        if done.any():
            info |= {"final_obs": self._obs(), "_final_obs": done}
            self.seeds, self.steps = self.seeds + 1000 * done, np.where(done, 0, self.steps)
        return self._obs(), action[:, 0].copy(), terminated, done & ~terminated, info


class Pusher:
    def __init__(self, config, num_envs, quality, seed):
        self.value = [quality * (seed + i) for i in range(num_envs)]

    def act(self, obs):
        assert obs["state"].shape == (len(self.value), 2)
        return np.array(self.value, np.float32)[:, None]


@pytest.fixture(autouse=True, scope="module")
def counter():
    def make(config, num_envs, *, render=None):
        return Counter(num_envs)

    make.expert = Pusher
    ENVS.register("counter", config=EnvConfig)(make)
    yield
    del ENVS._entries["counter"]


def config(out, **changes):
    return replace(
        CollectConfig(env=EnvConfig(name="counter"), out=str(out), episodes=5, num_envs=2), **changes
    )


def test_episodes_are_whole_and_in_order(tmp_path):
    result = collect(config(tmp_path / "a.zarr", quality=0.5))
    assert (result.episodes, result.recorded, result.steps) == (5, 5, 3 + 4 + 5 + 3 + 4)
    assert result.successes == [True, False, True, False, True]
    with EpisodeStore.open(tmp_path / "a.zarr") as store:
        assert store.fps == 20
        for i, episode in enumerate(store):
            steps = 3 + i % 3
            assert episode.metadata["seed"] == i
            np.testing.assert_array_equal(episode.obs["state"], [[i, t] for t in range(steps + 1)])
            # 0.5 * seed, clipped to the bound 2: what was executed is what is stored.
            np.testing.assert_array_equal(episode.action, np.full((steps, 1), min(0.5 * i, 2.0)))
            np.testing.assert_array_equal(episode.reward, episode.action[:, 0])
            assert (episode.terminated, episode.truncated) == (i % 3 == 0, i % 3 != 0)
            assert episode.success == (i % 2 == 0)
    np.testing.assert_allclose(result.returns, [0.0, 0.5 * 4, 1.0 * 5, 1.5 * 3, 2.0 * 4])


@pytest.mark.parametrize(
    "settings", [{"policy": "random"}, {"noise": 0.3}, {"policy": "random", "noise": 0.1}]
)
def test_number_of_environments_does_not_matter(tmp_path, settings):
    ids = []
    for num_envs in (1, 2, 5):
        out = tmp_path / f"{num_envs}.zarr"
        collect(config(out, num_envs=num_envs, quality=0.1, **settings))
        with EpisodeStore.open(out) as store:
            ids.append([episode.action.tolist() for episode in store])
    assert ids[0] == ids[1] == ids[2]
    assert ids[0][0] != ids[0][3]  # episodes differ from one another


def test_noise_has_the_asked_size(tmp_path):
    collect(config(tmp_path / "n.zarr", quality=0.0, noise=0.25, episodes=60, num_envs=60))
    with EpisodeStore.open(tmp_path / "n.zarr") as store:
        actions = np.concatenate([episode.action for episode in store])
    assert abs(actions.std() - 0.25 * 2.0) < 0.06  # half the action range is 2
    assert abs(actions.mean()) < 0.1


def test_seed_moves_every_episode(tmp_path):
    collect(config(tmp_path / "s.zarr", seed=7, episodes=2))
    with EpisodeStore.open(tmp_path / "s.zarr") as store:
        assert [episode.obs["state"][0, 0] for episode in store] == [7, 8]


def test_continues_where_it_stopped(tmp_path):
    whole = collect(config(tmp_path / "whole.zarr", policy="random", episodes=7))
    part = tmp_path / "part.zarr"
    assert collect(config(part, policy="random", episodes=3)).recorded == 3
    seen = []
    later = collect(config(part, policy="random", episodes=7), progress=seen.append)
    assert (later.recorded, later.episodes) == (4, 7)
    assert seen[0] == 3
    assert seen[-1] == 7
    with EpisodeStore.open(part) as a, EpisodeStore.open(whole.path) as b:
        assert a.dataset_id == b.dataset_id
    assert collect(config(part, policy="random", episodes=7)).recorded == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "recorded with seed=0, this is seed=1"),
        ({"noise": 0.5}, "recorded with noise=0.0, this is noise=0.5"),
        ({"quality": 0.2}, r"recorded with quality=1.0, this is quality=0.2"),
        ({"policy": "random"}, "recorded with policy=script, this is policy=random"),
        ({"env": EnvConfig(name="counter", max_steps=2)}, "recorded with env="),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    out = tmp_path / "a.zarr"
    collect(config(out, episodes=2))
    with pytest.raises(ConfigError, match=message):
        collect(config(out, episodes=4, **changes))
    with EpisodeStore.open(out) as store:
        assert len(store) == 2


def test_foreign_targets_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt exists and is no robopost store"):
        collect(config(tmp_path / "notes.txt"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    spec = EpisodeStore.open(collect(config(tmp_path / "a.zarr")).path).spec
    EpisodeStore.create(tmp_path / "other.zarr", spec=spec, fps=1.0, source="a robot").close()
    with pytest.raises(ConfigError, match="was not recorded by collect"):
        collect(config(tmp_path / "other.zarr"))


def test_unbounded_actions_have_no_random_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Counter,
        "__init__",
        lambda self, n, init=Counter.__init__: (init(self, n), setattr_unbounded(self))[0],
    )
    with pytest.raises(EnvError, match="policy=random needs action bounds"):
        collect(config(tmp_path / "r.zarr", policy="random"))


def test_random_choices_are_uniform_and_have_no_noise(tmp_path):
    words = ["env=CartPole-v1", "policy=random", "episodes=20", "num_envs=4", f"out={tmp_path / 'c.zarr'}"]
    collect(compose(words, "collect"))
    with EpisodeStore.open(tmp_path / "c.zarr") as store:
        actions = np.concatenate([episode.action for episode in store])
        assert store.spec.choices == 2
    assert set(actions.ravel().tolist()) == {0.0, 1.0}
    assert abs(actions.mean() - 0.5) < 0.1
    with pytest.raises(ConfigError, match=r"noise=0.1 needs continuous actions, here are 2 discrete ones"):
        collect(compose([*words[:-1], "noise=0.1", f"out={tmp_path / 'n.zarr'}"], "collect"))


def setattr_unbounded(env):
    env.single_action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)


def test_a_failing_environment_leaves_whole_episodes(tmp_path, monkeypatch):
    step = Counter.step

    def broken(self, action):
        if 4 in self.seeds:
            raise RuntimeError("simulator died")
        return step(self, action)

    monkeypatch.setattr(Counter, "step", broken)
    with pytest.raises(RuntimeError, match="simulator died"):
        collect(config(tmp_path / "f.zarr", episodes=6))
    monkeypatch.setattr(Counter, "step", step)
    assert collect(config(tmp_path / "f.zarr", episodes=6)).recorded == 2


def test_demonstrations_of_a_run(tmp_path):
    wanted = compose(["algo=bc", "data.collect=3", "data.quality=0.5"])
    wanted = replace(wanted, env=EnvConfig(name="counter"), seed=2)
    filled = ensure_data(wanted, tmp_path)
    assert (filled.data.path, filled.data.collect) == (str(tmp_path / "data.zarr"), 0)
    with EpisodeStore.open(filled.data.path) as store:
        assert len(store) == 3
    assert ensure_data(filled, tmp_path) == filled
    with pytest.raises(ConfigError, match=r"data\.collect=3 needs an environment"):
        ensure_data(replace(wanted, env=None), tmp_path)


def test_images_history_and_a_trained_policy(tmp_path, capsys):
    """The command, with a policy that sees two observations: single frames are stored, not stacks."""
    run = tmp_path / "run"
    words = ["recipe=debug_offline", "policy.history=2", "loop.steps=2", "loop.eval_episodes=1", f"out={run}"]
    assert main(["train", *words]) == 0
    out = tmp_path / "again.zarr"
    words = ["env=arm_reach", f"policy={run}", "episodes=3", f"out={out}", "num_envs=2", "deterministic=true"]
    assert main(["collect", *words]) == 0
    assert "3 episodes, 120 steps" in capsys.readouterr().out
    with EpisodeStore.open(out) as store:
        episode = store.episode(0)
        assert episode.obs["state"].ndim == 2
        assert len(episode.obs["state"]) == len(episode) + 1
        assert store.metadata["collect"]["policy"] == str(run)


def test_killed_collection_goes_on(tmp_path):
    out = tmp_path / "k.zarr"
    words = ["collect", "env=arm_reach", "episodes=60", f"out={out}", "num_envs=4", "env.threads=1"]
    code = f"import sys; from robopost.cli import main; sys.exit(main({words!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not committed(out):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = committed(out)
    assert done > 0
    assert main(words) == 0
    assert main([*words[:2], "episodes=60", f"out={tmp_path / 'whole.zarr'}", "num_envs=16"]) == 0
    with EpisodeStore.open(out) as a, EpisodeStore.open(tmp_path / "whole.zarr") as b:
        assert a.dataset_id == b.dataset_id


def committed(path):
    try:
        with EpisodeStore.open(path) as store:
            return len(store)
    except DataError:
        return 0
