# SPDX-License-Identifier: Apache-2.0
"""Recorded and new experience in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robopost.data.batch import Spec
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.data.mixture import MixedSampler, UniformSampler
from robopost.errors import ConfigError, DataError

SPEC = Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def marked(make_episode, spec, counts=(5, 4)):
    """A dataset whose second episode has no final observation, and a buffer of 8 steps, told apart by state[2]."""
    episodes = [make_episode(index + 1, steps, final=index == 0) for index, steps in enumerate(counts)]
    buffer = ReplayBuffer(spec, 30, 2, return_gamma=0.9)
    for step in range(4):
        state = {"state": np.array([[step, env, -1] for env in range(2)], np.float32)}
        done = np.full(2, step == 3)
        buffer.add(state, np.full((2, 2), step, np.float32), np.full(2, step), state, done, np.zeros(2, bool))
    return Dataset.from_episodes(episodes, spec), buffer


@pytest.mark.parametrize("sampler", [MixedSampler, UniformSampler])
def test_mixed_samples_are_whole(make_episode, spec, sampler):
    """Every field of a sample comes from one transition of one source."""
    recorded, buffer = marked(make_episode, spec)
    mixed = sampler(buffer, recorded, 0.5) if sampler is MixedSampler else sampler(buffer, recorded)
    extra = ("return_to_go", "next_action")
    batch = mixed.sample(400, generator(), n_step=2, gamma=0.9, extra=extra)
    everything = [
        recorded.transitions_at(recorded.transition_steps(torch.arange(8)), n_step=2, gamma=0.9, extra=extra),
        buffer.transitions_at(torch.arange(8), n_step=2, gamma=0.9, extra=extra),
    ]

    def rows(one):
        fields = [
            one.obs["state"],
            one.action,
            one.reward,
            one.next_obs["state"],
            one.terminated,
            one.truncated,
        ]
        fields += [one.discount, *one.extra.values()]
        return torch.cat([field.float().reshape(len(one), -1) for field in fields], 1)

    known = torch.cat([rows(one) for one in everything])
    hits = (rows(batch)[:, None] == known).all(-1)
    assert (hits.sum(1) == 1).all()
    assert hits.any(0).all()  # all 16 were drawn


def test_uniform_draws_every_transition_equally_often(make_episode, spec):
    recorded, buffer = marked(make_episode, spec)
    assert recorded.num_transitions == 8
    sampler = UniformSampler(buffer, recorded)
    assert sampler.online_fraction == 0.5
    batch = sampler.sample(64_000, generator())
    keys = batch.obs["state"].long() @ torch.tensor([1, 1000, 100_000])
    counts = keys.unique(return_counts=True)[1]
    assert len(counts) == 16
    # Chi-square with 15 degrees of freedom: above 37.7 once in a thousand.
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 37.7


@pytest.mark.parametrize("sampler", [MixedSampler, UniformSampler])
def test_new_experience_has_no_dataset_step(make_episode, spec, sampler):
    recorded, buffer = marked(make_episode, spec)
    mixed = sampler(buffer, recorded, 0.5) if sampler is MixedSampler else sampler(buffer, recorded)
    with pytest.raises(DataError, match="can't learn online: new experience has none"):
        mixed.sample(4, generator(), extra=("step",))


@pytest.mark.parametrize(("fraction", "demos"), [(0.0, 0), (0.25, 16), (0.5, 32), (1.0, 64)])
def test_mixture_is_exact(make_episode, spec, fraction, demos):
    demonstrations = Dataset.from_episodes([make_episode(0, 10)], spec)
    buffer = ReplayBuffer(spec, 50, 1)
    state = {"state": np.full((1, 3), -7, np.float32)}
    for _ in range(20):
        buffer.add(state, np.zeros((1, 2)), np.zeros(1), state, np.zeros(1, bool), np.zeros(1, bool))
    sampler = MixedSampler(buffer, demonstrations, fraction)
    batch = sampler.sample(64, generator(), n_step=2, extra=("next_action",))
    ours = batch.obs["state"][:, 0] != -7
    assert len(batch) == 64
    assert ours[:demos].all()
    assert not ours[demos:].any()
    assert batch.extra["next_action"].shape == (64, 2)


def test_mixture_checks_the_task():
    buffer = ReplayBuffer(SPEC, 10)
    with pytest.raises(ConfigError, match=r"demo_fraction=1\.5"):
        MixedSampler(buffer, None, 1.5)
    other = Spec({"state": ((5,), "float32")}, 1, (-1.0,), (1.0,))
    columns = np.zeros((3, 5), np.float32)
    demos = Dataset.from_episodes(
        [Episode({"state": columns}, np.zeros((2, 1)), np.zeros(2), False, True)], other
    )
    with pytest.raises(DataError, match="the environment has 'state'"):
        MixedSampler(buffer, demos, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampling_never_waits_for_the_gpu(make_episode, spec):
    recorded = Dataset.from_episodes([make_episode(0, 10, final=False)], spec, device="cuda")
    buffer = ReplayBuffer(spec, 50, 2, device="cuda", return_gamma=0.9)
    state = {"state": np.zeros((2, 3), np.float32)}
    for _ in range(40):
        buffer.add(state, np.zeros((2, 2)), np.zeros(2), state, np.zeros(2, bool), np.zeros(2, bool))
    gen = torch.Generator("cuda").manual_seed(0)
    wanted = {"n_step": 3, "gamma": 0.9, "extra": ("next_action", "return_to_go")}
    samplers = [buffer, MixedSampler(buffer, recorded, 0.5), UniformSampler(buffer, recorded)]
    for sampler in samplers:
        sampler.sample(64, gen, **wanted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sampler in samplers:
            sampler.sample(64, gen, **wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
