# SPDX-License-Identifier: Apache-2.0
"""Offline updates, then the same algorithm in an environment: one run, one counter, resumable anywhere."""

import json

import numpy as np
import pytest
import torch

from robopost.accel import CudaGraph
from robopost.algos.base import Algorithm, Needs
from robopost.algos.offline.iql import IQL
from robopost.artefacts.checkpoint import latest, load_json, load_tensors
from robopost.cli import main
from robopost.compose import compose
from robopost.data.batch import Spec
from robopost.data.store import Episode, EpisodeStore
from robopost.errors import CheckpointError, ConfigError, DataError
from robopost.loops import train
from robopost.registry import ALGOS

STEPS, ONLINE = 12, 16  # offline updates, then environment steps
WORDS = {  # beside the algorithm's own policy
    "iql": ["policy.squash=false", "policy.mean_tanh=true", "algo.actor_decay_updates=20"],
    "td3_bc": [],
    "cql": ["algo.num_actions=2"],
    "cal_ql": ["algo.num_actions=2"],
    "rebrac": [],
    "famo2o_iql": ["policy.balance_hidden=[8]"],
    "famo2o_cql": ["policy.balance_hidden=[8]", "algo.num_actions=2"],
    "famo2o_cal_ql": ["policy.balance_hidden=[8]", "algo.num_actions=2"],
}
ABLE = sorted(entry.name for entry in ALGOS if entry.target.can_go_online)
QUIET = ["track.console=false", "track.tensorboard=false"]
ENV = {"saves": "env=InvertedPendulum-v5", "cut": "env=Pendulum-v1"}  # its state; episodes at checkpoints
SHAPE = {"saves": (4, 3.0), "cut": (3, 2.0)}
CASES = [(algo, "symmetric", "saves") for algo in ABLE] + [
    ("iql", "uniform", "cut"),
    ("cal_ql", "uniform", "cut"),
]


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
                made.append(
                    Episode({"state": state}, action, action[:, 0], terminated=ends, truncated=not ends)
                )
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
    assert {"iql", "td3_bc", "cal_ql"} <= set(ABLE)
    assert set(ABLE) <= set(WORDS), "add the new algorithm to WORDS"


@pytest.mark.parametrize(("algo", "sampling", "kind"), CASES)
def test_cut_anywhere_and_resumed_is_the_same_run(algo, sampling, kind, stores, tmp_path):
    """Cut while offline, at the switch and online: bitwise the uncut run."""
    base = words(algo, stores, kind, sampling)
    run(base, tmp_path / "straight")
    run(base, tmp_path / "cut", steps=6, online=0)
    resume(base, tmp_path / "cut", online=0)  # to the switch
    resume(base, tmp_path / "cut", online=6)  # from the switch into the online phase
    resume(base, tmp_path / "cut")
    assert latest(tmp_path / "cut").name == f"step_{STEPS + ONLINE:09d}"
    assert_same_run(tmp_path / "straight", tmp_path / "cut")


@pytest.fixture
def watched(monkeypatch):
    """Every update of IQL: (object, batch, updates before it, online, learning rate of the actor after it)."""
    seen = []
    update = IQL.update

    def watch(self, batch):
        before = self.updates
        out = update(self, batch)
        seen.append((self, batch, before, self.online, self.actor_optimizer.param_groups[0]["lr"]))
        return out

    monkeypatch.setattr(IQL, "update", watch)
    return seen


def test_one_algorithm_goes_on_with_half_of_each_batch_new(watched, stores, tmp_path):
    base = words("iql", stores)
    run([*base, "data.reward_scale=2", "data.reward_shift=5"], tmp_path / "run")
    assert len(watched) == STEPS + ONLINE  # one update per environment step
    assert len({id(item[0]) for item in watched}) == 1
    assert [item[2] for item in watched] == list(range(STEPS + ONLINE))
    assert [item[3] for item in watched] == [False] * STEPS + [True] * ONLINE
    for _, batch, _, online, _ in watched:
        # A step of the environment is worth 1, its fall 0: both in the dataset's scale.
        new = (batch.reward == 7) | (batch.reward == 5)
        assert int(new.sum()) == (4 if online else 0)
        assert not new[: 4 if online else 8].any()
    rates = [item[4] for item in watched]
    assert rates[STEPS - 1] < 0.6 * rates[0]  # the offline cosine
    assert rates[STEPS:] == [3e-4] * ONLINE


def test_uniform_batches_have_the_share_of_the_sizes(watched, stores, tmp_path):
    base = [*words("iql", stores, sampling="uniform"), "algo.batch_size=512", "data.reward_shift=5"]
    folder = run(base, tmp_path / "run")
    for count, item in enumerate(watched[STEPS:]):
        held = 2 * (count // 2 + 1)  # two environments add together, then there are two updates
        share = held / (held + 40)
        new = (item[1].reward == 6) | (item[1].reward == 5)
        spread = (share * (1 - share) / 512) ** 0.5
        assert abs(float(new.float().mean()) - share) < 5 * spread
    logged = [line["data/online_fraction"] for line in metrics(folder) if "data/online_fraction" in line]
    assert logged[-1] == pytest.approx(np.mean([14 / 54, 16 / 56]))


def test_both_phases_are_logged_and_evaluated_on_one_counter(stores, tmp_path):
    base = [*words("td3_bc", stores), "loop.checkpoint_every=4", "loop.keep_checkpoints=1"]
    folder = run(base, tmp_path / "run")
    lines = metrics(folder)
    assert [line["step"] for line in lines if "eval/return" in line] == [STEPS, STEPS + ONLINE]
    steps = [line["step"] for line in lines if "loss/critic" in line]
    assert steps == [4, 8, 12, 16, 20, 24, 28]
    online = [line["step"] for line in lines if "data/online_fraction" in line]
    assert online == [16, 20, 24, 28]
    assert [path.name for path in sorted((folder / "eval").iterdir())] == [
        "step_000000012.json",
        "step_000000028.json",
    ]
    # The offline policy stays, whatever keep_checkpoints says.
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_000000012", "step_000000028"]


def test_resume_on_the_command_line_starts_the_online_phase(stores, tmp_path):
    """A finished offline run goes online; so does one that was trained without an environment."""
    base = [word for word in words("td3_bc", stores, sampling="uniform") if not word.startswith("env")]
    env = [ENV["saves"], "env.num_envs=2"]
    base = [word for word in base if "sampling" not in word]
    straight = [*base, *env, "loop.online_sampling=uniform", f"loop.online_steps={ONLINE}"]
    assert main(["train", *straight, f"steps={STEPS}", f"out={tmp_path / 'straight'}"]) == 0
    for name, given, later in (("a", env[:1], ["env.num_envs=2"]), ("b", ["env=null"], env)):
        folder = tmp_path / name
        assert main(["train", *base, *given, f"steps={STEPS}", f"out={folder}"]) == 0
        more = [f"resume={folder}", "loop.online_sampling=uniform", *later]
        assert main(["train", *more, f"loop.online_steps={ONLINE}"]) == 0
        assert_same_run(tmp_path / "straight", folder)


def test_what_the_online_phase_began_with_stays(stores, tmp_path, capsys):
    folder = run(words("td3_bc", stores), tmp_path / "run", online=6)
    before = (folder / "config.json").read_bytes()
    for word in ("loop.online_sampling=uniform", "loop.buffer_size=99", "env.num_envs=1"):
        assert main(["train", f"resume={folder}", word]) == 2
        assert "can't change here" in capsys.readouterr().err
    assert main(["train", f"resume={folder}", "loop.steps=20", "loop.online_steps=30"]) == 2
    assert "went online after 12 offline updates, loop.steps=20 doesn't fit. Fix: loop.steps=12" in (
        capsys.readouterr().err
    )
    assert (folder / "config.json").read_bytes() == before


def test_a_run_that_is_past_the_switch_is_not_taken_back(stores, tmp_path):
    base = words("td3_bc", stores)
    folder = run(base, tmp_path / "run", online=0)
    with pytest.raises(CheckpointError, match=r"has done 12 offline updates, loop.steps=8 doesn't fit"):
        resume(base, folder, steps=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["algo=bc", "policy=deterministic"],
            "online_steps=16: algo=bc only learns from recorded data. Algorithms that go on online: .*iql, .*td3_bc",
        ),
        (["algo=td3", "policy=deterministic"], "algo=td3 learns online from its first step"),
        (["env=null"], "loop.online_steps=16 needs an environment"),
        (["loop.online_sampling=unform"], "Did you mean 'uniform'"),
        (["loop.online_steps=-1"], r"loop.online_steps=-1 must be 0 \(stay offline\) or more"),
        (["loop.buffer_size=1"], "loop.buffer_size=1 must be at least 4 with 2 environments"),
        (["env=Pendulum-v1"], "can't be evaluated here"),
    ],
)
def test_what_can_not_go_online_is_said_before_the_first_update(changes, message, stores, tmp_path):
    base = [f"data.path={stores['saves']}", *QUIET, f"loop.online_steps={ONLINE}"]
    if "env=null" not in changes:
        base += [ENV["saves"], "env.num_envs=2"]
    with pytest.raises(ConfigError, match=message):
        train(compose(["algo=td3_bc", "policy=deterministic", *base, *changes, f"out={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_new_experience_has_no_dataset_step(stores, tmp_path, monkeypatch):
    """Neighbour methods ask for it; a plugin that forgets so learns it before the first update."""
    needs = Needs(batch_size=8, extra=("step",))
    monkeypatch.setattr(IQL, "needs", property(lambda self: needs))
    with pytest.raises(DataError, match="can't learn online: new experience has none"):
        run(words("iql", stores), tmp_path / "run")


def test_captured_graphs_are_dropped_at_the_switch():
    """A graph has the offline branch of its step inside."""

    class Toy(Algorithm):
        needs = Needs()

        def update(self, batch):
            return {}

    generator, spec = torch.Generator(), Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,), 20)
    algo = Toy(None, None, spec, device=torch.device("cpu"), generator=generator)
    algo.train_step = CudaGraph(lambda: {})
    algo.train_step._graph = object()
    algo.begin_online()
    assert algo.online
    assert not algo.train_step.captured
    again = Toy(None, None, spec, device=torch.device("cpu"), generator=generator)
    again.load_state_dict(algo.state_dict())
    assert again.online


@pytest.mark.parametrize("together", ["on", "off"])
def test_every_seed_goes_online(together, stores, tmp_path):
    """Also after offline updates of all seeds at once, and also resumed."""
    base = [*words("td3_bc", stores), "seeds=2", f"accel.stack_seeds={together}"]
    folder = run(base, tmp_path / "run", online=4)
    resume(base, folder)
    for seed in (0, 1):
        one = folder / f"seed_{seed}"
        assert latest(one).name == f"step_{STEPS + ONLINE:09d}"
        logged = [line["step"] for line in metrics(one) if "data/online_fraction" in line]
        assert logged == [16, 20, 24, 28]
    if together == "off":
        run([*base[: base.index("seeds=2")], "seed=1"], tmp_path / "alone")
        assert_same_run(folder / "seed_1", tmp_path / "alone")
