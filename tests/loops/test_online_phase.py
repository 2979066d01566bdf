# SPDX-License-Identifier: Apache-2.0
"""Offline updates, then the same algorithm in an environment: one run, one counter, resumable anywhere."""

import json

import numpy as np
import pytest
import torch

from robopost.artefacts.checkpoint import latest, load_json, load_tensors
from robopost.cli.train import resolve
from robopost.compose import compose
from robopost.data.batch import Spec
from robopost.data.store import Episode, EpisodeStore
from robopost.errors import CheckpointError, ConfigError
from robopost.loops import train
from robopost.registry import ALGOS

STEPS, ONLINE = 12, 16  # offline updates, then environment steps
WORDS = {
    "iql": ["policy=gaussian", "policy.squash=false", "policy.mean_tanh=true", "algo.actor_decay_updates=20"],
    "td3_bc": ["policy=deterministic"],
    "cql": ["policy=gaussian", "algo.num_actions=2"],
    "cal_ql": ["policy=gaussian", "algo.num_actions=2"],
}
ABLE = sorted(entry.name for entry in ALGOS if entry.target.can_go_online)
QUIET = ["track.console=false", "track.tensorboard=false"]
ENV = {"saves": "env=InvertedPendulum-v5", "cut": "env=Pendulum-v1"}
SHAPE = {"saves": (4, 3.0), "cut": (3, 2.0)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A few random episodes with both kinds of endings, one store per environment."""
    out = {}
    for name, (dim, bound) in SHAPE.items():
        out[name] = tmp_path_factory.mktemp("data") / f"{name}.zarr"
        spec = Spec({"state": ((dim,), "float32")}, 1, (-bound,), (bound,), 20)
        rng = np.random.default_rng(0)
        with EpisodeStore.create(out[name], spec=spec, fps=10.0, source="toy") as made:
            for index in range(5):
                action = rng.uniform(-bound, bound, (8, 1)).astype(np.float32)
                state = rng.normal(size=(9, dim)).astype(np.float32)
                ends = index % 2 == 0
                made.append(Episode({"state": state}, action, action[:, 0], terminated=ends, truncated=not ends))
    return out


def words(algo, stores, kind="saves", sampling="symmetric"):
    out = [f"algo={algo}", *WORDS[algo], "policy.hidden=[8]", "algo.hidden=[8]", "algo.batch_size=8", *QUIET]
    out += [f"data.path={stores[kind]}", ENV[kind], "env.num_envs=2", "loop.eval_episodes=1"]
    return [*out, "loop.log_every=4", "loop.checkpoint_every=6", f"loop.online_sampling={sampling}"]


def run(base, out, steps=STEPS, online=ONLINE):
    return train(compose([*base, f"loop.steps={steps}", f"loop.online_steps={online}", f"out={out}"]))


def resume(base, out, steps=STEPS, online=ONLINE):
    return train(compose([*base, f"loop.steps={steps}", f"loop.online_steps={online}", f"resume={out}"]))


def assert_same_run(first, second):
    a, b = latest(first), latest(second)
    assert a.name == b.name
    for name in ("model.safetensors", "policy.safetensors"):
        left, right = load_tensors(a / name), load_tensors(b / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key} differs"
    assert load_json(a / "state.json") == load_json(b / "state.json")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_algorithm_that_goes_online_is_tested_here():
    assert set(WORDS) >= set(ABLE), "add the new algorithm to WORDS"


@pytest.mark.parametrize("kind", ENV)
@pytest.mark.parametrize("sampling", ["symmetric", "uniform"])
@pytest.mark.parametrize("algo", ABLE)
def test_cut_anywhere_and_resumed_is_the_same_run(algo, sampling, kind, stores, tmp_path):
    """Cut while offline, at the switch and online, and once more each time: bitwise the uncut run."""
    base = words(algo, stores, kind, sampling)
    run(base, tmp_path / "straight")
    run(base, tmp_path / "cut", steps=6, online=0)
    resume(base, tmp_path / "cut", online=0)  # to the switch
    resume(base, tmp_path / "cut", online=6)  # from the switch into the online phase
    resume(base, tmp_path / "cut")
    assert latest(tmp_path / "cut").name == f"step_{STEPS + ONLINE:09d}"
    assert_same_run(tmp_path / "straight", tmp_path / "cut")
