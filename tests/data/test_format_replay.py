# SPDX-License-Identifier: Apache-2.0
"""Replay journals as data: what went into the buffer comes out as whole episodes, in every cut."""

import json

import numpy as np
import pytest
import torch

from robopost.config import DataConfig
from robopost.data.batch import Spec
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.formats import find_format, open_source
from robopost.errors import DataError

SPEC = Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,), 9)
LENGTHS = ((3, 4, 9), (5, 2, 9))  # of each environment's episodes; the last ones are running at the end
STEPS, EVERY = 10, 4  # steps per environment, steps per segment


def run(folder, *, history=1, steps=STEPS):
    """A run folder of two environments: observation [100 env + episode, t]; even episodes terminate."""
    buffer = ReplayBuffer(SPEC, 100, 2, history=history)
    episode, time = [0, 0], [0, 0]

    def observe(env, t):
        row = np.array([100 * env + episode[env], t], np.float32)
        return row if history == 1 else np.stack([row - [0, 1], row])

    for step in range(steps):
        obs = np.stack([observe(env, time[env]) for env in range(2)])
        after = np.stack([observe(env, time[env] + 1) for env in range(2)])
        done = np.array([time[env] + 1 == LENGTHS[env][episode[env]] for env in range(2)])
        over = done & np.array([episode[env] % 2 == 0 for env in range(2)])
        action = np.array([[time[env] / 10] for env in range(2)], np.float32)
        reward = torch.tensor([float(step), -float(step)])
        buffer.add(
            {"state": torch.from_numpy(obs)},
            action,
            reward,
            {"state": torch.from_numpy(after)},
            over,
            done & ~over,
        )
        for env in range(2):
            episode[env], time[env] = (episode[env] + 1, 0) if done[env] else (episode[env], time[env] + 1)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            buffer.journal(folder / "buffer")
    config = {
        "env": {"num_envs": 2, "id": "Toy-v0"},
        "policy": {"history": history},
        "algo": {"name": "td3"},
        "seed": 4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoints" / "step_000000020").mkdir(parents=True)
    (folder / "checkpoints" / "step_000000020" / "policy.json").write_text(
        json.dumps({"spec": SPEC.to_json()})
    )
    return folder


def facts(episode):
    """(environment, episode, steps, terminated); checks everything else on the way."""
    steps, state = len(episode), episode.obs["state"]
    np.testing.assert_array_equal(state[:, 0], np.full(steps + 1, state[0, 0]))
    np.testing.assert_array_equal(state[:, 1], np.arange(steps + 1))  # the final observation is there
    np.testing.assert_allclose(episode.action[:, 0], np.arange(steps) / 10, rtol=1e-6)
    assert (np.diff(np.abs(episode.reward)) == 1).all()
    assert episode.truncated != episode.terminated
    return int(state[0, 0]) // 100, int(state[0, 0]) % 100, steps, episode.terminated


@pytest.mark.parametrize("history", [1, 2])
def test_episodes_come_out_whole_across_segments(tmp_path, history):
    folder = run(tmp_path, history=history)
    assert len(list((folder / "buffer").iterdir())) == 3
    assert find_format(folder).name == "replay"
    source = open_source(folder)
    assert source.source == "replay of td3 in Toy-v0"
    assert source.metadata == {"run_seed": 4, "env_steps": 20}
    # In the order in which they ended; what was running at the end is cut there.
    assert [facts(item) for item in source.episodes] == [
        (0, 0, 3, True),
        (1, 0, 5, True),
        (0, 1, 4, False),
        (1, 1, 2, False),
        (0, 2, 3, False),
        (1, 2, 3, False),
    ]


@pytest.mark.parametrize("steps", range(2, 20, 2))
def test_every_cut_is_a_prefix(tmp_path, steps):
    source = open_source(run(tmp_path), "replay", {"steps": steps})
    episodes = [facts(item) for item in source.episodes]
    assert sum(item[2] for item in episodes) == steps
    for env in range(2):
        mine = [item for item in episodes if item[0] == env]
        lengths, left = [], steps // 2
        for length in LENGTHS[env]:
            lengths += [min(length, left)] if left else []
            left -= min(length, left)
        assert [item[2] for item in mine] == lengths
        # Cut short: truncated, also where the whole episode terminated.
        assert [item[3] for item in mine] == [
            got == whole and index % 2 == 0
            for index, (got, whole) in enumerate(zip(lengths, LENGTHS[env], strict=False))
        ]


def test_training_reads_a_run_folder(tmp_path):
    dataset = Dataset.load(DataConfig(path=str(run(tmp_path / "run"))), device="cpu")
    assert len(dataset) == 20


def run_without(folder, *names):
    run(folder)
    for name in names:
        next(folder.glob(name)).unlink()
    return folder


@pytest.mark.parametrize(
    ("names", "options", "text"),
    [
        (("buffer/segment_000000000004*",), {}, "begins at step 8, the one before ends at 4: one is missing"),
        (("checkpoints/*/policy.json",), {}, "has a replay journal and no checkpoint"),
        ((), {"steps": 21}, r"steps=21 must lie in 0\.\.20"),
        (("buffer/segment_000000000000*",), {"steps": 6}, "begins at 8"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, names, options, text):
    with pytest.raises(DataError, match=text):
        list(open_source(run_without(tmp_path, *names), "replay", options).episodes)


def test_a_torn_segment(tmp_path):
    path = next((run(tmp_path) / "buffer").glob("segment_000000000004*"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="can't be read"):
        list(open_source(tmp_path).episodes)
