# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours: every answer against brute force in float64, certificates, and the stored index."""

import fcntl
import functools
import json

import pytest
import torch

from robopost.data import neighbour_search
from robopost.data.neighbour_cells import compact, first_copies
from robopost.data.neighbours import Neighbours
from robopost.errors import ConfigError, DataError

ROWS = 2000  # several groups of the index; building it is what takes the time here


def pairs(rows, state=5, action=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, state, generator=g), torch.rand(rows, action, generator=g) * 2 - 1


def gait(rows, seed=0, state=6, action=3):
    """States on a closed curve with noise, actions of two behaviours: dense, as locomotion data is."""
    g = torch.Generator().manual_seed(seed)
    phase = torch.rand(rows, 1, generator=g) * 6.28
    waves = torch.cat([(phase * (1 + i // 2) + i % 2 * 1.57).sin() for i in range(state)], 1)
    sign = (torch.rand(rows, 1, generator=g) < 0.3).float() * 2 - 1
    mean = torch.tanh(waves[:, :action] * 2) * sign
    noise = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return waves + 0.05 * noise(rows, state), (mean + 0.1 * noise(rows, action)).clamp(-1, 1)


def queries(action, count, seed=1, noise=0.5):
    g = torch.Generator().manual_seed(seed)
    steps = torch.randint(len(action), (count,), generator=g)
    far = torch.randn(count, action.shape[1], generator=g) * noise
    return steps, (action[steps] + far).clamp(-1, 1)


def truth(state, action, steps, query, beta, k=1):
    """Distances and steps (B, k) in float64, ties to the earlier step."""
    x = torch.cat([state.double() * beta, action.double()], 1)
    q = torch.cat([state[steps].double() * beta, query.double()], 1)
    distance = torch.stack([(x - row).norm(dim=1) for row in q])
    value, index = distance.sort(dim=1, stable=True)
    return value[:, :k], index[:, :k]


def assert_exact(found, state, action, steps, query, beta, k=1):
    value, index = truth(state, action, steps, query, beta, k)
    assert torch.allclose(found.squared.double().sqrt(), value, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.ids, index)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("beta", [0.0, 2.0, 7.5])
def test_search_is_brute_force_in_float64(beta, k):
    state, action = pairs(5000)
    steps, query = queries(action, 200)
    index = Neighbours.open(state, action, beta=beta, k=k)
    assert_exact(index.search(steps, query), state, action, steps, query, beta, k)
    found = index.brute(steps, query)
    assert_exact(found, state, action, steps, query, beta, k)
    assert found.certified.all()


@functools.cache
def dense(list_bytes, rows, k=1):
    return Neighbours.open(*gait(rows), beta=2.0, k=k, list_bytes=list_bytes)


@pytest.mark.parametrize("noise", [0.2, 3.0])
@pytest.mark.parametrize("list_bytes", [0, 8, 40, 16384])
def test_lists_of_any_length_give_the_exact_answer(list_bytes, noise):
    state, action = gait(ROWS)
    steps, query = queries(action, 100, noise=noise)
    index = dense(list_bytes, ROWS)
    found = index.search(steps, query)
    assert_exact(found, state, action, steps, query, 2.0)
    assert torch.equal(found.asked, ~found.certified)
    rough = index.search(steps, query, exact=False)
    assert torch.equal(rough.certified, found.certified)
    assert not rough.asked.any()
    assert torch.equal(rough.ids[rough.certified], found.ids[rough.certified])
    assert (rough.squared >= found.squared - 1e-6).all()
    if list_bytes == 0:
        assert not found.certified.any()
    if list_bytes == 16384:
        assert found.certified.all()


def test_longer_lists_certify_more_and_shorter_ones_ask_the_fallback():
    steps, query = queries(gait(ROWS)[1], 200, noise=0.2)
    rates = [dense(size, ROWS).search(steps, query).certified.float().mean() for size in (8, 40, 16384)]
    assert rates[0] < rates[1] < rates[2] == 1


@pytest.mark.parametrize("k", [1, 2, 5])
def test_lists_hold_the_nearest_of_every_action_of_the_box_and_little_else(k):
    state, action = gait(ROWS)
    cells = dense(16384, ROWS, k).lists.cells
    g = torch.Generator().manual_seed(3)
    inside = torch.rand(300, 3, generator=g) * 2 - 1
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    for step in (0, ROWS // 2, ROWS - 1):
        at, size = int(cells.start[step]), int(cells.count[step])
        listed, near = cells.step[at : at + size].tolist(), cells.near[at : at + size]
        assert (near[1:] >= near[:-1]).all()
        weight = 4 * (state[listed].double() - state[step].double()).square().sum(1)
        assert torch.allclose(near.double(), weight, rtol=1e-5, atol=1e-9)
        asked = torch.cat([inside, corners])
        _, nearest = truth(state, action, torch.full((len(asked),), step), asked, 2.0, k)
        assert set(nearest.flatten().tolist()) <= set(listed)
        assert size < 250 * k
    assert cells.limit.isinf().all()


def test_wide_states_off_the_origin_keep_the_right_pairs():
    """Rounding of a thousand equal columns goes one way; it must not empty a list."""
    g = torch.Generator().manual_seed(0)
    state = torch.full((250, 3000), 1.22097)
    state[:, :3] += 0.003 * torch.randn(250, 3, generator=g)
    action = torch.rand(250, 4, generator=g) * 2 - 1
    steps, query = queries(action, 60, noise=2.0)
    for beta in (100.0, 300.0):
        found = Neighbours.open(state, action, beta=beta).search(steps, query)
        assert_exact(found, state, action, steps, query, beta)


def test_small_beta_is_said_to_be_one(caplog):
    state, action = pairs(1500)
    Neighbours.open(state, action, beta=1e-3, list_bytes=80)
    assert "lists are cut off: beta=0.001 is small" in caplog.text


def test_actions_outside_the_box_ask_the_fallback():
    state, action = gait(ROWS)
    steps, query = queries(action, 64)
    query[::2] *= 3
    outside = (query.abs() > 1).any(1)
    found = dense(16384, ROWS).search(steps, query)
    assert torch.equal(found.asked, outside)
    assert_exact(found, state, action, steps, query, 2.0)


@pytest.mark.parametrize(("k", "beta"), [(1, 0.0), (1, 2.0), (3, 2.0), (3, 1e4)])
def test_fallback_sweeps_all_pairs(monkeypatch, k, beta):
    state, action = pairs(9001)  # neither whole sweeps nor whole blocks
    steps, query = queries(action, 60, noise=3.0)
    index = Neighbours.open(state, action, beta=beta, k=k, list_bytes=0)
    found = index.search(steps, query)
    assert found.asked.all()
    assert_exact(found, state, action, steps, query, beta, k)
    monkeypatch.setattr(neighbour_search, "ROWS", 7)
    parts = index.search(steps, query)
    assert torch.equal(found.ids, parts.ids)
    assert torch.allclose(found.squared, parts.squared)


def test_groups_hold_every_row_once_and_are_close():
    x, _ = gait(3000)
    groups = compact(x, 100, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(3000))
    within = sum((x[group] - x[group].mean(0)).square().sum() for group in groups)
    assert within < 0.2 * (x - x.mean(0)).square().sum()


def test_later_copies_of_a_pair_are_no_candidates():
    state, action = pairs(4)
    state, action = state[[0, 1, 0, 2, 0, 3]], action[[0, 1, 0, 2, 0, 3]]
    assert first_copies(state, action, 1).tolist() == [0, 1, 3, 5]
    assert first_copies(state, action, 2).tolist() == [0, 1, 2, 3, 5]
    assert first_copies(torch.tensor([[0.0], [-0.0]]), torch.zeros(2, 1), 1).tolist() == [0]


def test_a_dataset_of_one_repeated_pair_is_answered_at_once():
    state, action = pairs(1)
    state, action = state.repeat(5000, 1), action.repeat(5000, 1)
    found = Neighbours.open(state, action, beta=2.0).search(torch.tensor([7, 4999]), action[:2] * 0.5)
    assert found.ids.tolist() == [[0], [0]]
    assert found.certified.all()


def test_one_neighbour_by_hand_and_what_lookup_returns():
    state = torch.tensor([[0.0], [1.0], [3.0]])
    action = torch.tensor([[0.0], [0.9], [-1.0]])
    # beta 0.5: d^2 to the three is 0.64, 0.25 + 0.01, 2.25 + 3.24.
    one = Neighbours.open(state, action, beta=0.5)
    out = one.lookup(torch.tensor([0]), torch.tensor([[0.8]]))
    assert torch.allclose(out[:, :3], torch.tensor([[0.9, 0.26**0.5, 0.0]]))
    # k = 2: the mean of 0.9 and the own 0.0; the k-th alone is the own pair at 0.8.
    index = Neighbours.open(state, action, beta=0.5, k=2)
    both = index.lookup(torch.tensor([0]), torch.tensor([[0.8]]))
    assert torch.allclose(both[:, :3], torch.tensor([[0.45, 0.8, 0.5]]))
    kth = index.lookup(torch.tensor([0]), torch.tensor([[0.8]]), kth=True)
    assert torch.allclose(kth[:, :3], torch.tensor([[0.0, 0.8, 1.0]]))


def test_ties_go_to_the_earlier_step():
    state, action = pairs(300)
    state, action = state.repeat(3, 1), action.repeat(3, 1)
    steps = torch.arange(600, 900)
    for beta in (0.0, 2.0):
        index = Neighbours.open(state, action, beta=beta)
        assert (index.search(steps, action[steps]).ids < 300).all()
        assert (index.brute(steps, action[steps]).ids < 300).all()
        three = Neighbours.open(state, action, beta=beta, k=3).search(steps, action[steps]).ids
        assert torch.equal(three, torch.stack([steps - 600, steps - 300, steps], 1))


def test_brute_force_certifies_no_tie_that_went_to_a_later_step():
    state, action = torch.zeros(20_000, 2), torch.zeros(20_000, 1)
    found = Neighbours.open(state, action, beta=0.0).brute(torch.tensor([9000]), action[:1])
    assert found.ids[0, 0] == 0 or not found.certified[0]


def test_constant_and_equal_states():
    state, action = pairs(500)
    state[:, 2] = 0.7
    steps, query = queries(action, 50)
    found = Neighbours.open(state, action, beta=2.0).search(steps, query)
    assert_exact(found, state, action, steps, query, 2.0)
    state[:] = 0.7  # nothing but the action tells pairs apart
    for list_bytes in (8, 4096):
        found = Neighbours.open(state, action, beta=2.0, k=3, list_bytes=list_bytes).search(steps, query)
        assert_exact(found, state, action, steps, query, 2.0, 3)


def test_translating_all_states_changes_nothing():
    state, action = gait(2000)
    steps, query = queries(action, 100)
    here = Neighbours.open(state, action, beta=2.0).search(steps, query)
    moved = Neighbours.open(state + 10.0, action, beta=2.0).search(steps, query)
    assert torch.equal(here.ids, moved.ids)
    assert torch.allclose(here.squared, moved.squared, rtol=1e-3, atol=1e-5)


def test_answers_do_not_depend_on_what_was_asked_before():
    state, action = gait(3000)
    steps, query = queries(action, 64)
    index = Neighbours.open(state, action, beta=2.0, list_bytes=32)
    first = index.lookup(steps, query)
    index.lookup(*queries(action, 64, seed=9))
    assert torch.equal(index.lookup(steps, query), first)
    halves = torch.cat([index.lookup(steps[part], query[part]) for part in (slice(0, 20), slice(20, 64))])
    assert torch.equal(halves, first)


def test_index_is_stored_and_used_again(tmp_path):
    state, action = gait(1000)
    steps, query = queries(action, 64)
    built = Neighbours.open(state, action, beta=2.0, name="d", folder=tmp_path / "index", list_bytes=64)
    assert built.seconds > 0
    again = Neighbours.open(state, action, beta=2.0, name="d", folder=tmp_path / "index", list_bytes=64)
    assert again.seconds == 0
    memory = Neighbours.open(state, action, beta=2.0, name="d", list_bytes=64)
    for other in (again, memory):
        assert torch.equal(other.lookup(steps, query), built.lookup(steps, query))
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    total = sum(p.stat().st_size for p in (tmp_path / "index").iterdir())
    assert total < 1000 * (64 + 8 + 4 + 4) + 1000


def test_cache_keeps_one_index_per_content(tmp_path):
    state, action = gait(500)
    for shift in (0.0, 1.0):
        Neighbours.open(state + shift, action, beta=2.0, name="d", cache=tmp_path)
        assert Neighbours.open(state + shift, action, beta=2.0, name="d", cache=tmp_path).seconds == 0
    assert len(list(tmp_path.glob("neighbours-*"))) == 2


def test_index_of_another_dataset_is_refused(tmp_path):
    state, action = gait(500)
    folder = tmp_path / "index"
    Neighbours.open(state, action, beta=2.0, name="d", folder=folder, list_bytes=64)
    for changed in (
        {"name": "e"},
        {"state": state * 1.01},  # another normaliser
        {"state": state[:, :5]},  # other observation keys
        {"action": -action},
        {"beta": 3.0},
        {"k": 2},
        {"list_bytes": 32},
    ):
        options = {"state": state, "action": action, "beta": 2.0, "name": "d", "list_bytes": 64} | changed
        with pytest.raises(DataError, match=r"index .*belongs to another dataset.*Fix: another algo.index="):
            Neighbours.open(options.pop("state"), options.pop("action"), folder=folder, **options)


def test_torn_index_is_built_again(tmp_path):
    state, action = gait(500)
    folder = tmp_path / "index"
    first = Neighbours.open(state, action, beta=2.0, name="d", folder=folder, list_bytes=64)
    steps, query = queries(action, 20)
    expected = first.lookup(steps, query)
    for name in ("near", "start", "step"):
        (folder / f"{name}.bin").write_bytes((folder / f"{name}.bin").read_bytes()[:-40])
        again = Neighbours.open(state, action, beta=2.0, name="d", folder=folder, list_bytes=64)
        assert again.seconds > 0
        assert torch.equal(again.lookup(steps, query), expected)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    state, action = gait(100)
    (tmp_path / "notes").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes"):
        with pytest.raises(DataError, match=r"is there already and no neighbour index. Fix: algo.index="):
            Neighbours.open(state, action, beta=2.0, folder=folder)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes", "mine")]


@pytest.mark.parametrize("k", [1, 3, 20])
def test_lists_alone_give_k_neighbours_and_the_fallback_only_where_they_are_too_short(k):
    state, action = pairs(2000)
    steps, query = queries(action, 128)
    found = Neighbours.open(state, action, beta=2.0, k=k, list_bytes=16).search(steps, query, exact=False)
    value, _ = truth(state, action, steps, query, 2.0, k)
    assert found.squared.isfinite().all()
    assert (found.squared.double().sqrt() >= value * (1 - 1e-5)).all(), "distances of pairs that exist"
    sure = found.certified | found.asked
    assert torch.allclose(found.squared[sure].double().sqrt(), value[sure], rtol=1e-5, atol=1e-6)
    assert found.asked.any() == (k > 1)


def test_a_killed_build_leaves_nothing_that_counts(tmp_path, monkeypatch):
    state, action = gait(500)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("robopost.data.neighbour_cells._thinned", fail)
    with pytest.raises(KeyboardInterrupt):
        Neighbours.open(state, action, beta=2.0, name="d", folder=tmp_path / "index", list_bytes=64)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed_and_a_living_one_kept(tmp_path):
    state, action = gait(200)
    dead, alive = (tmp_path / f"index.{name}.partial" for name in ("dead", "alive"))
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "step.bin").write_bytes(b"")
    with (alive / "step.bin").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Neighbours.open(state, action, beta=2.0, name="d", folder=tmp_path / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.alive.partial"]


@pytest.mark.parametrize("text", ["[]", "null", '{"version": 2}', "{"])
def test_an_index_file_without_its_contents_is_torn(tmp_path, text):
    state, action = gait(200)
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "index.json").write_text(text)
    assert Neighbours.open(state, action, beta=2.0, name="d", folder=folder).seconds > 0


def test_an_index_of_another_format_is_named(tmp_path):
    state, action = gait(200)
    (tmp_path / "index.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match=r"has format 1, this robopost needs 2. Fix: delete it"):
        Neighbours.open(state, action, beta=2.0, name="d", folder=tmp_path)


def test_meta_names_no_path(tmp_path):
    state, action = gait(100)
    Neighbours.open(state, action, beta=2.0, name="d", folder=tmp_path / "index")
    meta = json.loads((tmp_path / "index" / "index.json").read_text())
    assert meta["dataset"] == "d"
    assert meta["steps"] == 100
    assert str(tmp_path) not in json.dumps(meta)


def test_bad_input():
    state, action = pairs(10)
    with pytest.raises(DataError, match=r"algo.k=10 needs at least 11 dataset steps, memory has 10"):
        Neighbours.open(state, action, beta=2.0, k=10)
    for what, values in (("state", state), ("action", action)):
        broken = values.clone()
        broken[3, 1] = float("nan")
        both = {"state": state, "action": action} | {what: broken}
        with pytest.raises(DataError, match=rf"dataset memory has NaN or inf in {what}"):
            Neighbours.open(both["state"], both["action"], beta=2.0)
    with pytest.raises(DataError, match="has no steps"):
        Neighbours.open(state[:0], action[:0], beta=2.0)
    with pytest.raises(DataError, match="10 states and 9 actions"):
        Neighbours.open(state, action[:9], beta=2.0)
    with pytest.raises(ConfigError, match=r"algo.list_bytes=-1 must be 0"):
        Neighbours.open(state, action, beta=2.0, list_bytes=-1)


def test_float64_input_is_searched_in_float32():
    state, action = gait(300)
    steps, query = queries(action, 10)
    found = Neighbours.open(state.double(), action.double(), beta=2.0).search(steps, query)
    assert found.squared.dtype == torch.float32
    assert torch.equal(found.ids, Neighbours.open(state, action, beta=2.0).search(steps, query).ids)
