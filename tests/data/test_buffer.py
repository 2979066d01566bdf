# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from robopost.data.batch import Batch, Spec
from robopost.data.buffer import ReplayBuffer
from robopost.errors import CheckpointError, ConfigError, DataError

SPEC = Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class World:
    """N environments whose observation is [environment, time since the run began]; episodes end at random.

    A reset observation is time + 0.5, so that a final observation can't be mistaken for the next first one.
    """

    def __init__(self, num_envs: int, seed: int = 0, p_end: float = 0.2):
        self.n = num_envs
        self.rng = np.random.default_rng(seed)
        self.p_end = p_end
        self.time = 0
        self.obs = self._obs(np.full(num_envs, 0.5))
        self.log: list[dict] = []

    def _obs(self, value):
        return np.stack([np.arange(self.n), value], 1).astype(np.float32)

    def step(self, buffer: ReplayBuffer) -> None:
        self.time += 1
        end = self.rng.random(self.n) < self.p_end
        kind = self.rng.random(self.n) < 0.5
        terminated, truncated = end & kind, end & ~kind
        following = self._obs(np.full(self.n, float(self.time)))
        row = {
            "obs": self.obs,
            "action": np.full((self.n, 1), self.time, np.float32),
            "reward": self.rng.normal(size=self.n).astype(np.float32),
            "next_obs": following,
            "terminated": terminated,
            "truncated": truncated,
        }
        self.log.append(row)
        buffer.add(
            {"state": row["obs"]}, row["action"], row["reward"], {"state": following}, terminated, truncated
        )
        self.obs = np.where(end[:, None], self._obs(np.full(self.n, self.time + 0.5)), following)


def check(batch: Batch, world: World, n_step: int, gamma: float, kept: int) -> set[tuple[int, int]]:
    """Compare every sample with a loop over the log; returns the (step, environment) pairs seen."""
    seen = set()
    for i in range(len(batch)):
        env, step = int(batch.obs["state"][i, 0]), int(batch.action[i, 0]) - 1
        assert step >= len(world.log) - kept
        seen.add((step, env))
        assert batch.obs["state"][i].tolist() == world.log[step]["obs"][env].tolist()
        total, k = 0.0, 0
        while True:
            row = world.log[step + k]
            total += gamma**k * float(row["reward"][env])
            k += 1
            ended = row["terminated"][env] or row["truncated"][env]
            if k == n_step or ended or step + k == len(world.log):
                break
        assert batch.reward[i].item() == pytest.approx(total, abs=1e-5)
        assert batch.next_obs["state"][i].tolist() == row["next_obs"][env].tolist()
        assert bool(batch.terminated[i]) == row["terminated"][env]
        assert bool(batch.truncated[i]) == row["truncated"][env]
        assert batch.discount[i].item() == pytest.approx(0.0 if row["terminated"][env] else gamma**k)
    return seen


@pytest.mark.parametrize("storage", ["ram", "mmap"])
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize(
    ("num_envs", "length", "steps"), [(1, 7, 5), (1, 7, 23), (3, 5, 5), (3, 5, 5 * 4 + 2), (4, 50, 120)]
)
def test_every_sample_is_right_across_the_wrap(num_envs, length, steps, n_step, storage):
    buffer = ReplayBuffer(SPEC, length * num_envs + num_envs - 1, num_envs, storage=storage)
    world = World(num_envs, seed=steps)
    for _ in range(steps):
        world.step(buffer)
    assert len(buffer) == min(steps, length) * num_envs
    rows = torch.arange(len(buffer))
    kept = min(steps, length)
    seen = check(buffer.transitions_at(rows, n_step=n_step, gamma=0.9), world, n_step, 0.9, kept)
    assert len(seen) == kept * num_envs
    assert check(buffer.sample(64, generator(), n_step=n_step, gamma=0.9), world, n_step, 0.9, kept) <= seen


def test_right_after_every_single_add():
    """The side table of final observations is reused for a long time without mixing anything up."""
    buffer, world = ReplayBuffer(SPEC, 12, 2), World(2, seed=3, p_end=0.6)
    for step in range(1, 60):
        world.step(buffer)
        rows = torch.arange(len(buffer))
        check(buffer.transitions_at(rows, n_step=2, gamma=0.5), world, 2, 0.5, min(step, 6))


def test_every_step_ends_an_episode():
    for storage in ("ram", "mmap"):
        buffer, world = ReplayBuffer(SPEC, 300, 3, storage=storage), World(3, p_end=1.0)
        for _ in range(150):
            world.step(buffer)
        check(buffer.transitions_at(torch.arange(300)), world, 1, 0.99, 100)


def test_observations_are_stored_once():
    spec = Spec({"image": ((64, 64, 3), "uint8")}, 1, (-1.0,), (1.0,))
    buffer = ReplayBuffer(spec, 1000, 2)
    assert buffer.obs["image"].nbytes < 1.05 * 1000 * 64 * 64 * 3


def test_next_action():
    buffer, world = ReplayBuffer(SPEC, 20, 2), World(2, seed=1, p_end=0.4)
    for _ in range(14):
        world.step(buffer)
    batch = buffer.transitions_at(torch.arange(20), n_step=2, extra=("next_action",))
    for i in range(20):
        env, step = int(batch.obs["state"][i, 0]), int(batch.action[i, 0]) - 1
        ended = lambda s, e=env: world.log[s]["terminated"][e] or world.log[s]["truncated"][e]  # noqa: E731
        last = step if step == 13 or ended(step) else step + 1
        known = last < 13 and not ended(last)
        assert bool(batch.extra["next_action_mask"][i]) == known
        if known:
            assert batch.extra["next_action"][i, 0] == last + 2
    with pytest.raises(DataError, match=r"unknown extra of a replay buffer 'next_acton'.*next_action"):
        buffer.sample(1, generator(), extra=("next_acton",))


def test_history_shape_and_tensors():
    buffer = ReplayBuffer(SPEC, 4, 1, history=2)
    obs = torch.arange(4.0).reshape(1, 2, 2)
    flag = torch.zeros(1, dtype=torch.bool)
    buffer.add({"state": obs}, torch.ones(1, 1), torch.ones(1), {"state": obs + 4}, flag, ~flag)
    batch = buffer.sample(3, generator())
    assert batch.obs["state"].shape == (3, 2, 2)
    assert batch.next_obs["state"][0].tolist() == [[4, 5], [6, 7]]
    assert batch.discount.tolist() == pytest.approx([0.99] * 3)


def same(a: Batch, b: Batch) -> bool:
    names = ("action", "reward", "terminated", "truncated", "discount")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and all(
        torch.equal(getattr(a, n)["state"], getattr(b, n)["state"]) for n in ("obs", "next_obs")
    )


@pytest.mark.parametrize(("before", "after"), [(3, 4), (9, 0), (10, 3), (17, 12), (31, 25)])
@pytest.mark.parametrize("storage", ["ram", "mmap"])
def test_restore_is_bitwise(tmp_path, before, after, storage):
    """Interrupted and uninterrupted runs sample the same bits, now and later, before and after the wrap."""
    whole, world = ReplayBuffer(SPEC, 20, 2, storage=storage), World(2, seed=before)
    cursor = 0
    for step in range(before):
        world.step(whole)
        if step % 4 == 3 or step == before - 1:
            cursor = whole.journal(tmp_path)
    assert cursor == before
    whole.prune(tmp_path, cursor)
    other = ReplayBuffer(SPEC, 20, 2, storage=storage)
    other.restore(tmp_path, cursor)
    rest = World(2, seed=99)
    rest.time, rest.obs, rest.log = world.time, world.obs, list(world.log)
    world.rng = np.random.default_rng(5)
    rest.rng = np.random.default_rng(5)
    for step in range(after + 1):
        for n_step in (1, 3):
            a, b = (x.sample(128, generator(step), n_step=n_step, gamma=0.9) for x in (whole, other))
            assert same(a, b)
        assert whole.journal(tmp_path / "a") == other.journal(tmp_path / "b") == before + step
        world.step(whole)
        rest.step(other)
    check(other.sample(64, generator(), n_step=3, gamma=0.9), rest, 3, 0.9, 10)


def test_segments_of_an_uncommitted_checkpoint_are_dropped(tmp_path):
    buffer, world = ReplayBuffer(SPEC, 100, 1), World(1)
    for _ in range(8):
        world.step(buffer)
    committed = buffer.journal(tmp_path)
    expected = buffer.sample(64, generator(), n_step=3)
    for _ in range(5):
        world.step(buffer)
    buffer.journal(tmp_path)  # killed before its checkpoint was complete
    resumed = ReplayBuffer(SPEC, 100, 1)
    resumed.restore(tmp_path, committed)
    assert same(resumed.sample(64, generator(), n_step=3), expected)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "segment_000000000000_000000000008.safetensors"
    ]
    for _ in range(7):
        world.step(resumed)
    again = ReplayBuffer(SPEC, 100, 1)
    again.restore(tmp_path, resumed.journal(tmp_path))
    assert same(again.sample(64, generator()), resumed.sample(64, generator()))


def test_prune_keeps_what_the_ring_needs(tmp_path):
    buffer, world = ReplayBuffer(SPEC, 10, 1), World(1)
    for step in range(25):
        world.step(buffer)
        if step % 3 == 2:
            buffer.prune(tmp_path, buffer.journal(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "segment_000000000012_000000000015.safetensors"  # the ring at 24 begins at 14
    other = ReplayBuffer(SPEC, 10, 1)
    other.restore(tmp_path, 24)
    assert other.total == 24
    assert int(other.action.min()) == 15


def test_more_steps_than_capacity_between_checkpoints(tmp_path):
    buffer, world = ReplayBuffer(SPEC, 10, 2), World(2)
    for _ in range(33):
        world.step(buffer)
    cursor = buffer.journal(tmp_path)
    other = ReplayBuffer(SPEC, 10, 2)
    other.restore(tmp_path, cursor)
    assert same(other.sample(64, generator(), n_step=3), buffer.sample(64, generator(), n_step=3))


def test_journal_errors(tmp_path):
    buffer, world = ReplayBuffer(SPEC, 100, 1), World(1)
    for _ in range(8):
        world.step(buffer)
        buffer.journal(tmp_path)
    (tmp_path / "segment_000000000003_000000000004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ends at step 3, the checkpoint needs 0\.\.8"):
        ReplayBuffer(SPEC, 100, 1).restore(tmp_path, 8)
    with pytest.raises(CheckpointError, match="already holds 8 steps"):
        buffer.restore(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"'action' of shape \(1, 1\), this run needs \(1, 2\)"):
        ReplayBuffer(Spec(SPEC.obs, 2, (-1.0,) * 2, (1.0,) * 2), 100, 1).restore(tmp_path, 3)
    first = tmp_path / "segment_000000000000_000000000001.safetensors"
    first.write_bytes(first.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="can't be read"):
        ReplayBuffer(SPEC, 100, 1).restore(tmp_path, 3)


def test_journal_on_a_full_disk(tmp_path):
    spec = Spec({"state": ((1000,), "float32")}, 1, (-1.0,), (1.0,))
    buffer = ReplayBuffer(spec, 100, 1)
    obs = {"state": np.zeros((1, 1000), np.float32)}
    for _ in range(50):
        buffer.add(obs, np.zeros((1, 1)), np.zeros(1), obs, np.zeros(1, bool), np.zeros(1, bool))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            DataError, match=r"can't write the replay journal.*file size limit.*Fix: free space"
        ):
            buffer.journal(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert buffer.journal(tmp_path) == 50


def test_bad_use_is_one_line():
    with pytest.raises(ConfigError, match=r"loop\.buffer_size=3 must be at least 4 with 2 environments"):
        ReplayBuffer(SPEC, 3, 2)
    with pytest.raises(ConfigError, match="Did you mean 'mmap'"):
        ReplayBuffer(SPEC, 10, storage="mmapp")
    buffer = ReplayBuffer(SPEC, 10, 2)
    with pytest.raises(DataError, match="empty"):
        buffer.sample(1, generator())
    obs, flag = {"state": np.zeros((2, 2))}, np.zeros(2, bool)
    with pytest.raises(DataError, match=r"'action' of shape \(1, 1\), the buffer holds \(2, 1\)"):
        buffer.add(obs, np.zeros((1, 1)), np.zeros(2), obs, flag, flag)
    with pytest.raises(DataError, match="lacks the observation key 'state'"):
        buffer.add({"image": flag}, np.zeros((2, 1)), np.zeros(2), obs, flag, flag)
    with pytest.raises(DataError, match="the buffer has 2 environments"):
        buffer.add(obs, np.zeros((2, 1)), np.zeros(2), obs, flag[:1], flag[:1])
