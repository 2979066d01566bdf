# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from robopost.config import DataConfig
from robopost.data.batch import Spec
from robopost.data.dataset import Dataset, returns_to_go
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError, DataError
from robopost.nets.norm import Normaliser

GAMMA = 0.5


@pytest.fixture
def episodes(make_episode):
    """Steps 0-3 terminate, 4-6 are truncated, 7-9 are truncated without a final observation, 10-11 terminate
    without one."""
    return [
        make_episode(0, 4, terminated=True),
        make_episode(1, 3),
        make_episode(2, 3, final=False),
        make_episode(3, 2, terminated=True, final=False),
    ]


@pytest.fixture
def dataset(episodes, spec):
    return Dataset.from_episodes(episodes, spec)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_which_steps_are_transitions(dataset):
    assert (dataset.num_steps, dataset.num_episodes, dataset.num_transitions) == (12, 4, 11)
    batch = dataset.sample(4000, generator())
    seen = {(int(t), int(e)) for t, e in batch.action.tolist()}
    everything = {(t, e) for e, steps in enumerate((4, 3, 3, 2)) for t in range(steps)}
    assert everything - seen == {(2, 2)}  # truncated, and its next observation was not recorded


def test_sampling_is_uniform(dataset):
    steps = dataset.sample(22_000, generator(1)).obs["state"][:, 0]
    counts = torch.unique(steps, return_counts=True)[1]
    assert len(counts) == 11
    assert abs(counts.float() - 2000).max() < 5 * 2000**0.5


# step: next observation, terminated, truncated
ONE_STEP = {
    0: (1, False, False),
    3: (4, True, False),  # the true final observation, not the next episode's first
    4: (101, False, False),
    6: (103, False, True),
    7: (201, False, False),
    8: (202, False, False),
    10: (301, False, False),
    11: (301, True, False),  # none recorded: its own, with a discount of 0
}


@pytest.mark.parametrize("step", ONE_STEP)
def test_one_step(dataset, step):
    following, terminated, truncated = ONE_STEP[step]
    batch = dataset.transitions_at(torch.tensor([step]), gamma=0.9)
    assert batch.next_obs["state"][0, 0] == following
    assert (bool(batch.terminated), bool(batch.truncated)) == (terminated, truncated)
    assert batch.discount[0] == pytest.approx(0.0 if terminated else 0.9)
    assert batch.reward[0] == batch.action[0, 0] + 1 + 10 * batch.action[0, 1]
    assert batch.obs["state"][0, 1] == batch.action[0, 0]


# step -> (reward, next observation, terminated, truncated, discount) for three steps at gamma 0.5
THREE_STEP = {
    0: (1 + 2 / 2 + 3 / 4, 3, False, False, 0.125),
    1: (2 + 3 / 2 + 4 / 4, 4, True, False, 0.0),
    2: (3 + 4 / 2, 4, True, False, 0.0),
    3: (4, 4, True, False, 0.0),
    4: (11 + 12 / 2 + 13 / 4, 103, False, True, 0.125),
    5: (12 + 13 / 2, 103, False, True, 0.25),
    6: (13, 103, False, True, 0.5),
    7: (21 + 22 / 2, 202, False, False, 0.25),  # stops where the last known observation is
    8: (22, 202, False, False, 0.5),
    10: (31 + 32 / 2, 301, True, False, 0.0),
    11: (32, 301, True, False, 0.0),
}


@pytest.mark.parametrize("step", THREE_STEP)
def test_n_step_at_every_position(dataset, step):
    batch = dataset.transitions_at(torch.tensor([step]), n_step=3, gamma=GAMMA)
    got = (
        batch.reward.item(),
        batch.next_obs["state"][0, 0].item(),
        bool(batch.terminated),
        bool(batch.truncated),
        batch.discount.item(),
    )
    assert got == THREE_STEP[step]


@pytest.mark.parametrize("n_step", [1, 2, 3, 7])
def test_n_step_against_a_loop(make_episode, spec, n_step):
    rng = np.random.default_rng(n_step)
    episodes = [
        make_episode(
            i, int(rng.integers(1, 9)), terminated=bool(rng.integers(2)), final=bool(rng.integers(2))
        )
        for i in range(30)
    ]
    for episode in episodes:
        episode.reward = rng.normal(size=len(episode)).astype(np.float32)
    dataset = Dataset.from_episodes(episodes, spec)
    batch = dataset.sample(500, generator(), n_step=n_step, gamma=0.9)
    for i in range(500):
        t, e = (int(v) for v in batch.action[i].tolist())
        episode = episodes[e]
        known = episode.has_final_obs or episode.terminated
        k = min(n_step, len(episode) - (0 if known else 1) - t)
        last = t + k - 1
        terminated = episode.terminated and last == len(episode) - 1
        assert k >= 1
        assert batch.reward[i].item() == pytest.approx(
            sum(0.9**j * episode.reward[t + j] for j in range(k)), abs=1e-5
        )
        assert batch.discount[i].item() == pytest.approx(0.0 if terminated else 0.9**k)
        assert bool(batch.terminated[i]) == terminated
        following = min(t + k, len(episode.obs["state"]) - 1)
        assert batch.next_obs["state"][i].tolist() == episode.obs["state"][following].tolist()


def test_return_to_go_and_next_action(dataset):
    steps = torch.tensor([0, 3, 4, 6, 7, 8, 10, 11])
    extra = dataset.transitions_at(steps, gamma=GAMMA, extra=("return_to_go", "next_action")).extra
    expected = [1 + 1 + 0.75 + 0.5, 4, 11 + 6 + 3.25, 13, 21 + 11 + 5.75, 22 + 11.5, 31 + 16, 32]
    assert extra["return_to_go"].tolist() == expected
    assert extra["next_action_mask"].tolist() == [True, False, True, False, True, True, True, False]
    assert extra["next_action"].tolist()[:2] == [[1, 0], [3, 0]]
    assert extra["next_action"].tolist()[4:6] == [[1, 2], [2, 2]]
    longer = dataset.transitions_at(steps, n_step=3, gamma=GAMMA, extra=("next_action",)).extra
    assert longer["next_action"][0].tolist() == [3, 0]  # the action at the n-step next observation
    with pytest.raises(DataError, match="Did you mean 'return_to_go'"):
        dataset.sample(1, generator(), extra=("return_togo",))


def test_returns_to_go_of_many_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, size=50)
    reward = rng.normal(size=lengths.sum()).astype(np.float32)
    expected, start = [], 0
    for length in lengths:
        value, part = 0.0, []
        for r in reward[start : start + length][::-1]:
            value = float(r) + 0.97 * value
            part.append(value)
        expected += part[::-1]
        start += length
    np.testing.assert_allclose(returns_to_go(reward, lengths, 0.97), expected, rtol=1e-5, atol=1e-6)


def test_chunks_mask_and_repeat(dataset):
    batch = dataset.chunks_at(torch.tensor([1, 6, 9, 11]), 4)
    assert batch.action[:, :, 0].tolist() == [[1, 2, 3, 3], [2, 2, 2, 2], [2, 2, 2, 2], [1, 1, 1, 1]]
    assert batch.action[:, :, 1].tolist() == [[0] * 4, [1] * 4, [2] * 4, [3] * 4]
    assert batch.chunk_mask.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.obs["state"][:, 0].tolist() == [1, 102, 202, 301]
    assert batch.next_obs == {}


def test_history_repeats_the_first_observation(dataset):
    batch = dataset.chunks_at(torch.tensor([0, 3, 5, 7, 9]), 2, history=3)
    assert batch.obs["state"].shape == (5, 3, 3)
    assert batch.obs["state"][:, :, 0].tolist() == [
        [0, 0, 0],
        [1, 2, 3],
        [100, 100, 101],
        [200, 200, 200],
        [200, 201, 202],
    ]
    pair = dataset.transitions_at(torch.tensor([0, 3, 6]), history=2)
    assert pair.obs["state"][:, :, 0].tolist() == [[0, 0], [2, 3], [101, 102]]
    assert pair.next_obs["state"][:, :, 0].tolist() == [[0, 1], [3, 4], [102, 103]]


def test_chunks_use_every_step(dataset):
    batch = dataset.sample_chunks(4000, 3, generator())
    assert len({tuple(row) for row in batch.action[:, 0].tolist()}) == 12


def test_same_generator_same_batch(dataset):
    for draw in (
        lambda g: dataset.sample(64, g, n_step=3),
        lambda g: dataset.sample_chunks(64, 5, g, history=2),
    ):
        a, b, c = draw(generator(3)), draw(generator(3)), draw(generator(4))
        assert torch.equal(a.obs["state"], b.obs["state"])
        assert torch.equal(a.action, b.action)
        assert not torch.equal(a.action, c.action)


def test_only_unfinished_steps(make_episode, spec):
    dataset = Dataset.from_episodes([make_episode(steps=1, final=False)], spec)
    assert dataset.num_transitions == 0
    with pytest.raises(DataError, match="no transition with a next observation"):
        dataset.sample(1, generator())
    assert dataset.sample_chunks(2, 2, generator()).chunk_mask.tolist() == [[True, False]] * 2


@pytest.fixture
def saved(episodes, spec, tmp_path):
    with EpisodeStore.create(tmp_path / "d.zarr", spec=spec, fps=20, source="test") as store:
        for episode in episodes:
            store.append(episode)
    return tmp_path / "d.zarr"


def test_loaded_equals_in_memory(saved, dataset):
    loaded = Dataset.load(DataConfig(path=str(saved)), device="cpu")
    a, b = (d.sample(256, generator(), n_step=2, extra=("return_to_go",)) for d in (loaded, dataset))
    for name in ("action", "reward", "discount", "terminated", "truncated"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(a.next_obs["state"], b.next_obs["state"])
    assert torch.equal(a.extra["return_to_go"], b.extra["return_to_go"])
    assert loaded.stats["state"]["source"] == loaded.dataset_id
    for key in loaded.stats:
        np.testing.assert_allclose(loaded.stats[key]["std"], dataset.stats[key]["std"], rtol=1e-12)


def test_first_episodes_and_reward_map(saved):
    config = DataConfig(path=str(saved), episodes=2, reward_scale=2.0, reward_shift=-1.0)
    dataset = Dataset.load(config, device="cpu")
    assert (dataset.num_steps, dataset.num_episodes) == (7, 2)
    assert dataset.dataset_id.endswith("[:2]")
    assert dataset.transitions_at(torch.tensor([0, 6])).reward.tolist() == [1.0, 25.0]
    assert dataset.stats["action"]["count"] == 7
    assert dataset.stats["state"]["max"][0] == 102
    assert dataset.stats["state"]["source"] == dataset.dataset_id
    whole = Dataset.load(DataConfig(path=str(saved), episodes=4), device="cpu")
    assert "[:" not in whole.dataset_id
    with pytest.raises(ConfigError, match=r"data\.episodes=5 must lie in 1\.\.4"):
        Dataset.load(DataConfig(path=str(saved), episodes=5), device="cpu")


def test_normalise(dataset, spec):
    norm = Normaliser(spec)
    norm.fit(dataset.stats, obs="meanstd", action="bounds")
    scaled = dataset.normalise(norm)
    raw, unit = dataset.sample(64, generator(), n_step=2), scaled.sample(64, generator(), n_step=2)
    assert torch.allclose(unit.obs["state"], norm.obs(raw.obs)["state"])
    assert torch.allclose(unit.next_obs["state"], norm.obs(raw.next_obs)["state"])
    assert torch.allclose(unit.action, norm.action(raw.action))
    assert torch.equal(unit.reward, raw.reward)
    assert raw.obs["state"].max() > 100  # the original is untouched
    chunk = scaled.sample_chunks(8, 2, generator(), history=2)
    assert torch.allclose(
        chunk.obs["state"], norm.obs(dataset.sample_chunks(8, 2, generator(), history=2).obs)["state"]
    )


def test_loading_leaves_the_cache_untouched(saved):
    first = Dataset.load(DataConfig(path=str(saved)), device="cpu")
    first.obs["state"].zero_()  # copy-on-write: never reaches the file
    second = Dataset.load(DataConfig(path=str(saved)), device="cpu")
    assert second.obs["state"][1].tolist() == [1, 1, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_never_reaches_training(make_episode, spec, tmp_path, value):
    bad = make_episode(1)
    bad.obs["state"][2, 1] = value
    with EpisodeStore.create(tmp_path / "n.zarr", spec=spec, fps=20, source="test") as store:
        store.append(make_episode(0))
        store.append(bad)
    with pytest.raises(DataError, match=r"NaN or inf in 'state'.*robopost data verify"):
        Dataset.load(DataConfig(path=str(tmp_path / "n.zarr")), device="cpu")
    Dataset.load(DataConfig(path=str(tmp_path / "n.zarr"), episodes=1), device="cpu")


def test_extras_are_sampled(make_episode, spec):
    episodes = [
        make_episode(i, 3, extras={"cost": np.arange(3, dtype=np.float32) + 10 * i}) for i in range(2)
    ]
    batch = Dataset.from_episodes(episodes, spec).sample(32, generator(), extra=("cost",))
    assert torch.equal(batch.extra["cost"], batch.action[:, 0] + 10 * batch.action[:, 1])


def test_load_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        Dataset.load(DataConfig(), device="cpu")
    with pytest.raises(DataError, match="no data at"):
        Dataset.load(DataConfig(path=str(tmp_path / "absent")), device="cpu")
    spec = Spec({"state": ((1,), "float32")}, 1, (-1.0,), (1.0,))
    EpisodeStore.create(tmp_path / "e.zarr", spec=spec, fps=1, source="x").close()
    with pytest.raises(DataError, match="holds no episodes"):
        Dataset.load(DataConfig(path=str(tmp_path / "e.zarr")), device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampling_never_waits_for_the_gpu(episodes, spec):
    dataset = Dataset.from_episodes(episodes, spec, device="cuda")
    gen = torch.Generator("cuda").manual_seed(0)
    draws = (
        lambda: dataset.sample(64, gen, n_step=3, extra=("next_action",)),
        lambda: dataset.sample_chunks(64, 4, gen, history=2),
    )
    for draw in draws:
        draw()
        torch.cuda.set_sync_debug_mode("error")
        try:
            draw()
        finally:
            torch.cuda.set_sync_debug_mode("default")
