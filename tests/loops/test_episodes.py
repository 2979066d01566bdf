# SPDX-License-Identifier: Apache-2.0
"""Rollouts of whole episodes: by hand, in groups that start alike, with images where they are looked at, resumed."""

from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from robopost.artefacts.checkpoint import latest, load_arrays, load_json, load_tensors
from robopost.compose import compose
from robopost.data.batch import Batch
from robopost.errors import ConfigError
from robopost.loops import train
from robopost.loops.collector import Collector
from robopost.loops.episodes import collect_episodes
from robopost.loops.ranks import ALONE
from robopost.loops.run import stream_seed
from robopost.policies.base import Action
from robopost.vector import VecEnv, make_vec

HORIZON, EXECUTE, LIMIT = 4, 3, 7
NEVER = 99
# Step at which episodes succeed, by the seed's remainder; episodes are cut after 7 steps and go on after success.
SOLVED = {0: 2, 1: NEVER, 2: 6, 3: 3, 4: 7}


class Seeded(gym.vector.VectorEnv):
    """Observes (seed % 5, step); the i-th step earns i; an episode does not end when it is solved.

    The image says the same; where nobody wants it, it is the last one once more.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, copies, success=True):
        self.num_envs, self.predicate = copies, success
        spaces = {
            "state": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
            "image": gym.spaces.Box(0, 255, (1, 1, 3), np.uint8),
        }
        self.single_observation_space = gym.spaces.Dict(spaces)
        self.single_action_space = gym.spaces.Box(-1e6, 1e6, (1,), np.float32)
        self.wanted, self.seeds, self.executed, self.looked = None, [], [], 0
        self.image = np.zeros((copies, 1, 1, 3), np.uint8)

    def observe(self, looked):
        state = np.stack([self.seed % 5, self.t], 1).astype(np.float32)
        self.looked += int(looked.sum())
        self.image = self.image.copy()
        self.image[looked] = (16 * state[:, 0] + state[:, 1])[looked, None, None, None]
        return {"state": state, "image": self.image}

    def reset(self, *, seed=None, options=None):
        self.seed = np.array(seed if isinstance(seed, list) else [seed + i for i in range(self.num_envs)])
        self.seeds.append(self.seed.tolist())
        self.t = np.zeros(self.num_envs, int)
        return self.observe(np.ones(self.num_envs, bool)), {}

    def step(self, actions):
        self.executed.append(actions[:, 0].tolist())
        self.t = self.t + 1
        reward = self.t.astype(float)
        late = self.t == LIMIT
        solved = self.t == np.array([SOLVED[s % 5] for s in self.seed])
        wanted = np.ones(self.num_envs, bool) if self.wanted is None else self.wanted
        obs = self.observe(wanted | late)
        info = {"success": solved} if self.predicate else {}
        if late.any():
            info["final_obs"] = {key: value.copy() for key, value in obs.items()}
            self.seed = self.seed + late
            self.t = np.where(late, 0, self.t)
            obs = self.observe(late)
        return obs, reward, np.zeros(self.num_envs, bool), late, info


class Counting:
    """Decides for chunks that say where they were chosen: 10 seed + step, plus 0.1 per action."""

    needs = SimpleNamespace(gamma=0.9)

    def __init__(self):
        self.policy = SimpleNamespace(execute=EXECUTE, horizon=HORIZON, spec=SimpleNamespace(action_dim=1))
        self.asked = []

    def decide(self, obs, generator):
        name = obs["state"] @ torch.tensor([10.0, 1.0])
        shown = obs["image"][:, 0, 0, 0].float()
        torch.testing.assert_close(shown, obs["state"] @ torch.tensor([16.0, 1.0]), msg="an image is stale")
        self.asked.append(name.tolist())
        chunk = (name[:, None] + 0.1 * torch.arange(HORIZON))[..., None]
        return Action(chunk, None, (100 * chunk).round().long()[:, None])


def collector(copies=4, path="", success=True):
    data = SimpleNamespace(path=path, reward_scale=0.5, reward_shift=-1.0)
    ended = []
    run = SimpleNamespace(
        ranks=ALONE,
        config=SimpleNamespace(data=data, seed=0),
        device=torch.device("cpu"),
        generators={"policy": None},
        record_episode=ended.append,
        ended=ended,
    )
    return Collector(VecEnv(Seeded(copies, success)), run)


def play(rounds=1, group=2, copies=4, **options):
    source, algo = collector(copies, **options), Counting()
    batch, steps = collect_episodes(source, algo, rounds, group)
    return source, algo, batch, steps


def kinds(source):
    """Seeds modulo 5 of the episodes, in order."""
    return [seed % 5 for seeds in source.env.env.seeds for seed in seeds]


def test_groups_start_alike_and_rounds_differ():
    source, _, batch, _ = play(rounds=3, group=2, copies=6)
    assert batch.reward.shape[1] == 18
    for seeds in source.env.env.seeds:
        assert seeds[0::2] == seeds[1::2]
        assert len(set(seeds)) == 3
    assert len({tuple(seeds) for seeds in source.env.env.seeds}) == 3
    first = batch.obs["state"][0, :, 0].tolist()
    assert first == kinds(source), "the first decision of an episode sees its start"
    assert not batch.obs["state"][0, :, 1].any()
    base = stream_seed(0, 50 + 1000) % 2**31
    assert source.env.env.seeds[0] == [base, base, base + 1, base + 1, base + 2, base + 2]


def test_decisions_by_hand():
    source, _, batch, steps = play(rounds=2, group=1, copies=5)
    assert sorted(kinds(source)[:5]) == [0, 1, 2, 3, 4], "every kind of episode once per round"
    total = 0
    for m, kind in enumerate(kinds(source)):
        end = min(SOLVED[kind], LIMIT)
        total += end
        executed = batch.chunk_mask[:, m].sum(-1).tolist()
        assert executed == [max(0, min(EXECUTE, end - d * EXECUTE)) for d in range(3)]
        for d in range(-(-end // EXECUTE)):
            last = min((d + 1) * EXECUTE, end)
            assert batch.obs["state"][d, m].tolist() == [kind, d * EXECUTE]
            assert batch.next_obs["state"][d, m].tolist() == [kind, last], "not the next episode's start"
            assert batch.reward[d, m] == sum(range(d * EXECUTE + 1, last + 1))
            name = 10 * kind + d * EXECUTE
            torch.testing.assert_close(batch.action[d, m, :, 0], name + 0.1 * torch.arange(4))
            assert batch.chain[d, m, 0, :, 0].tolist() == [100 * name + 10 * i for i in range(4)]
            over = last == end
            assert batch.terminated[d, m] == (over and SOLVED[kind] <= LIMIT)
            assert batch.truncated[d, m] == (over and SOLVED[kind] > LIMIT)
            assert batch.discount[d, m] == pytest.approx(0.0 if batch.terminated[d, m] else 0.9)
        for value in (batch.obs["state"], batch.action, batch.chain, batch.reward):
            assert not value[-(-end // EXECUTE) :, m].any(), "rows behind the last decision hold zeros"
        assert batch.extra["success"][:, m].tolist() == [float(SOLVED[kind] <= LIMIT)] * 3
        assert batch.extra["return"][:, m].tolist() == [sum(range(1, end + 1))] * 3
    assert steps == total == int(batch.chunk_mask.sum())


def test_episodes_are_recorded_once_and_waiting_copies_are_not_asked():
    source, algo, batch, steps = play(rounds=2, group=1, copies=5)
    ended = source.run.ended
    assert len(ended) == 10
    assert sum(figures["train/length"] for figures in ended) == steps
    assert sum(figures["train/success"] for figures in ended) == batch.extra["success"][0].sum()
    assert sum(figures["train/return"] for figures in ended) == batch.extra["return"][0].sum()
    decisions = int(batch.chunk_mask.any(-1).sum())
    assert sum(len(names) for names in algo.asked) == decisions
    assert len(source.env.env.executed) == 2 * LIMIT, "a round lasts as long as its longest episode"


def test_rewards_on_the_scale_of_recorded_data():
    _, _, plain, _ = play(group=1, copies=5)
    _, _, scaled, _ = play(group=1, copies=5, path="recorded.zarr")
    executed = plain.chunk_mask.sum((0, 2))
    torch.testing.assert_close(scaled.extra["return"][0], 0.5 * plain.extra["return"][0] - executed)
    assert torch.equal(scaled.extra["success"], plain.extra["success"])


def test_without_a_success_predicate_the_return_decides():
    source, _, batch, steps = play(group=1, copies=4, success=False)
    assert steps == 4 * LIMIT
    assert batch.extra["success"].all()
    assert "train/success" not in source.run.ended[0]
    _, _, batch, _ = play(group=1, copies=4, success=False, path="recorded.zarr")
    assert torch.equal(batch.extra["success"], (batch.extra["return"] > 0).float())


def test_only_wanted_images_are_looked_at_and_the_next_round_sees_all():
    """`Counting.decide` refuses a stale image; here: how many there were."""
    source, _, batch, _ = play(rounds=2, group=1, copies=5)
    env = source.env.env
    assert env.wanted is None, "whoever comes next sees everything"
    # Starts, ends of whole chunks, and every copy's end and new start at the time limit.
    chunks = int((batch.chunk_mask.sum(-1) == EXECUTE).sum())
    assert env.looked <= 10 + chunks + 2 * 10
    assert env.looked < 0.5 * (10 + 2 * LIMIT * 5 + 10), "half of what there is to see"


ARM = ["env=arm_language", "env.obs=pixels96", "env.max_steps=30", "env.num_envs=4"]


def test_images_only_where_wanted_give_the_same_rollout(monkeypatch):
    """The rendering arm: everything a decision saw is what it sees with all images rendered."""
    pytest.importorskip("mujoco")
    config = compose(["algo=grpo", *ARM]).env
    rollouts, real = [], VecEnv.step

    def step(self, action):
        """The copies succeed one after another, in the middle of chunks and of the environment's own episodes."""
        self.count = getattr(self, "count", -1) + 1
        return replace(real(self, action), success=np.arange(4) * 3 + 1 == self.count % 11)

    monkeypatch.setattr(VecEnv, "step", step)
    for render_all in (False, True):
        env = make_vec(config, 4)
        if render_all:
            monkeypatch.setattr(VecEnv, "want_images", lambda self, wanted: None)
        spec = env.spec
        generator = torch.Generator().manual_seed(0)

        def decide(obs, g, spec=spec):
            rows = len(obs["state"])
            chunk = torch.rand(rows, HORIZON, spec.action_dim, generator=g) * 2 - 1
            return Action(chunk, None, chunk[:, None])

        policy = SimpleNamespace(execute=EXECUTE, horizon=HORIZON, spec=spec)
        algo = SimpleNamespace(policy=policy, decide=decide, needs=SimpleNamespace(gamma=0.9))
        run = collector().run
        run.generators["policy"] = generator
        batch, _ = collect_episodes(Collector(env, run), algo, 2, 2)
        rollouts.append(batch)
        env.close()
    sparse, full = rollouts
    assert full.obs["image"].float().std() > 0
    assert torch.equal(sparse.chunk_mask, full.chunk_mask)
    assert full.chunk_mask.sum((0, 2)).tolist() == [2, 5, 8, 11, 2, 5, 8, 11]
    for key, value in full.obs.items():
        assert torch.equal(sparse.obs[key], value), f"obs {key!r} differs"
    there = full.chunk_mask.any(-1) & ~full.terminated
    for key, value in full.next_obs.items():
        assert torch.equal(sparse.next_obs[key][there], value[there]), f"next_obs {key!r} differs"
    # Groups: the same task, the same start.
    for key, value in full.obs.items():
        assert torch.equal(value[0, 0::2], value[0, 1::2]), f"{key!r} of a group differs at its start"
    assert not torch.equal(full.obs["state"][0, 0], full.obs["state"][0, 2])


def test_resumed_rollouts_are_those_of_an_uninterrupted_run(tmp_path, monkeypatch):
    """2N steps, and N + resume + N: the same episodes, the same weights."""
    pytest.importorskip("mujoco")
    words = [
        "algo=grpo",
        "env=arm_reach",
        "env.num_envs=4",
        "env.max_steps=5",
        "policy.horizon=3",
        "policy.hidden=[8]",
    ]
    words += ["policy.bins=8", "algo.group=2", "algo.episodes=2", "algo.outcome=return", "algo.batch_size=8"]
    words += [
        "loop.eval_episodes=1",
        "loop.checkpoint_every=8",
        "track.tensorboard=false",
        "track.console=false",
    ]
    from robopost.algos.vla.grpo import GRPO

    seen, real = [], GRPO.update
    monkeypatch.setattr(GRPO, "update", lambda self, batch: seen.append(batch) or real(self, batch))
    train(compose([*words, "loop.steps=32", f"out={tmp_path}/straight"]))
    straight, seen[:] = list(seen), []
    train(compose([*words, "loop.steps=16", f"out={tmp_path}/resumed"]))
    assert len(seen) == 2
    train(compose([*words, "loop.steps=32", f"resume={tmp_path}/resumed"]))
    assert len(straight) == len(seen) == 4
    for one, other in zip(straight, seen, strict=True):
        assert one.reward.shape == (2, 8)
        assert_equal(one, other)
    a, b = (latest(tmp_path / name) for name in ("straight", "resumed"))
    for name in ("model.safetensors", "policy.safetensors"):
        left, right = load_tensors(a / name), load_tensors(b / name)
        assert all(torch.equal(left[key], right[key]) for key in left)
    left, right = (load_arrays(path / "env.safetensors") for path in (a, b))
    assert all(np.array_equal(left[key], right[key]) for key in left)
    assert load_json(a / "state.json") == load_json(b / "state.json")
    starts = [batch.obs["state"][0] for batch in straight]
    assert all(torch.equal(item[0::2], item[1::2]) for item in starts), "groups start alike"
    assert not torch.equal(starts[0], starts[1])


def assert_equal(one: Batch, other: Batch):
    for name in ("action", "reward", "chain", "chunk_mask", "terminated", "truncated"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("obs", "next_obs", "extra"):
        left, right = getattr(one, name), getattr(other, name)
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_environments_that_are_no_multiple_of_the_group_are_refused(tmp_path):
    pytest.importorskip("mujoco")
    words = ["algo=grpo", "env=arm_reach", "env.num_envs=6", "algo.group=4", f"out={tmp_path}/run"]
    with pytest.raises(
        ConfigError, match=r"env\.num_envs=6 must be a multiple of the 4 .* Fix: env\.num_envs=4"
    ):
        train(compose(words))
    assert not (tmp_path / "run").exists()
