# SPDX-License-Identifier: Apache-2.0
"""`seeds=N` trained at once is what N separate runs write: weights, metrics, random streams, folders."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from robopost.accel import CudaGraph, leaves
from robopost.algos import stack as stack_module
from robopost.algos.stack import Stack, obstacle
from robopost.artefacts.checkpoint import latest, load_json, load_policy, load_tensors
from robopost.cli import main
from robopost.compose import compose
from robopost.data.dataset import Dataset
from robopost.errors import ConfigError, RobopostError
from robopost.loops import train
from robopost.loops.offline import batch_at
from robopost.loops.run import Run
from robopost.registry import ALGOS

spec = importlib.util.spec_from_file_location("resume_contract", Path(__file__).parent / "test_resume.py")
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)
store = contract.store

N = 3
OFFLINE = sorted(entry.name for entry in ALGOS if entry.target.regime == "offline")
# Batched matrix products may round differently; Adam divides by the gradient's size and so keeps the difference.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SHORT = ["loop.steps=24", "loop.log_every=8", "loop.checkpoint_every=8", "loop.keep_checkpoints=9"]
STACK = ["accel.stack_seeds=on", f"seeds={N}"]


def words(algo, store, *more):
    return [*contract.words(algo, store), *SHORT, "track.console=false", *more]


def separate(base, out, seeds=range(N)):
    for seed in seeds:
        train(compose([*base, f"seed={seed}", f"out={out}/seed_{seed}"]))
    return out


def stacked(base, out, *more):
    return train(compose([*base, *STACK, f"out={out}", *more]))


def assert_close(a, b, what=""):
    assert a.keys() == b.keys()
    for key in a:
        if key.startswith("rng/"):
            assert torch.equal(a[key], b[key]), f"{what}: the stream {key} differs"
        else:
            torch.testing.assert_close(
                a[key], b[key], **TOLERANCE, msg=lambda text, key=key: f"{what} {key}: {text}"
            )


def files(folder):
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return {str(path) for path in paths if path.parts[0] != "tensorboard"}  # event files bear the time


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_runs(first, second, seeds=range(N)):
    for seed in seeds:
        a, b = first / f"seed_{seed}", second / f"seed_{seed}"
        saved = sorted(path.name for path in (a / "checkpoints").glob("step_*"))
        assert saved == sorted(path.name for path in (b / "checkpoints").glob("step_*"))
        for name in saved:
            one, two = a / "checkpoints" / name, b / "checkpoints" / name
            for file in ("model.safetensors", "policy.safetensors"):
                assert_close(load_tensors(one / file), load_tensors(two / file), f"seed {seed} {name}")
            for file in ("state.json", "policy.json"):
                assert load_json(one / file) == load_json(two / file)
        assert len(lines(a)) == len(lines(b))
        for left, right in zip(lines(a), lines(b), strict=True):
            assert left.keys() == right.keys()
            for key in (key for key in left if not key.startswith("time")):
                assert left[key] == pytest.approx(right[key], rel=1e-4, abs=1e-5), f"seed {seed} {key}"


@pytest.mark.parametrize("algo", OFFLINE)
def test_stacked_seeds_equal_separate_runs(algo, store, tmp_path):
    base = words(algo, store)
    alone, together = separate(base, tmp_path / "alone"), stacked(base, tmp_path / "together")
    assert_same_runs(alone, together)
    # The folder of a seed is that of a run of its own.
    for seed in range(N):
        a, b = alone / f"seed_{seed}", together / f"seed_{seed}"
        assert files(a) == files(b)
        one, two = load_json(a / "config.json"), load_json(b / "config.json")
        assert one.pop("out") != two.pop("out")
        assert (one["accel"].pop("stack_seeds"), two["accel"].pop("stack_seeds")) == ("auto", "on")
        assert one == two
        assert load_json(b / "provenance.json")["seed"] == seed
        load_policy(b)
    weights = [load_tensors(latest(together / f"seed_{s}") / "policy.safetensors") for s in range(N)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_other_policies_and_settings(store, tmp_path):
    cases = {
        "clone": (
            "bc",
            "policy=deterministic",
            "policy.horizon=2",
            "policy.hidden=[16]",
            "algo.grad_clip=0.05",
        ),
        "decay": (
            "bc",
            "policy=gaussian",
            "policy.hidden=[16,16]",
            "policy.layernorm=true",
            "algo.decay_steps=20",
        ),
        "subset": ("td3_bc", "algo.num_critics=4", "algo.target_subset=2", "algo.critic_layernorm=true"),
        "corl": ("iql", "algo.variant=corl", "algo.n_step=3", "policy.state_std=false", "policy.history=2"),
    }
    for name, (algo, *more) in cases.items():
        base = [*words(algo, store)[:1], *words(algo, store, "algo.batch_size=16")[1:], *more]
        if algo == "bc":
            base = [
                word for word in base if not word.startswith(("policy.width", "policy.depth", "policy=flow"))
            ]
            base = [word for word in base if word != "policy.horizon=4"]
        one, two = separate(base, tmp_path / name, range(2)), stacked(base, tmp_path / f"{name}-2", "seeds=2")
        assert_same_runs(one, two, range(2))


def test_checkpoints_are_interchangeable(store, tmp_path):
    base = words("td3_bc", store)
    straight = separate(base, tmp_path / "straight")
    half = [*base, "loop.steps=16"]
    # Stacked first, then each seed by itself, and the other way round.
    folder = stacked(half, tmp_path / "stacked")
    for seed in range(N):
        train(compose([*base, f"seed={seed}", f"resume={folder}/seed_{seed}"]))
    assert_same_runs(straight, folder)
    folder = separate(half, tmp_path / "separate")
    train(compose([*base, *STACK, f"resume={folder}"]))
    assert_same_runs(straight, folder)


def test_stacked_resume_is_exact(store, tmp_path):
    base = words("iql", store)
    straight = stacked(base, tmp_path / "straight")
    resumed = stacked([*base, "loop.steps=16"], tmp_path / "resumed")
    train(compose([*base, *STACK, f"resume={resumed}"]))
    for seed in range(N):
        contract.assert_same_run(straight / f"seed_{seed}", resumed / f"seed_{seed}")


def test_command_line_resumes_all_seeds(store, tmp_path):
    base = words("td3_bc", store)
    out = tmp_path / "run"
    assert main(["train", *base, *STACK, "loop.steps=8", f"out={out}"]) == 0
    shutil.rmtree(out / "seed_2")  # killed before its first checkpoint was written
    assert main(["train", f"resume={out}", "loop.steps=24"]) == 0
    alone = separate(base, tmp_path / "alone")
    for seed in range(N):
        a, b = (load_tensors(latest(f / f"seed_{seed}") / "model.safetensors") for f in (alone, out))
        assert_close(a, b)


def test_seeds_at_different_steps_meet(store, tmp_path):
    """A run over seeds that was killed: one seed is done, one half-way, one fresh."""
    base = words("a2pr", store, "seeds=4")
    straight = separate(words("a2pr", store), tmp_path / "straight", range(4))
    folder = tmp_path / "run"
    for seed, steps in {0: 24, 1: 16, 2: 8}.items():
        train(
            compose(
                [*words("a2pr", store), f"seed={seed}", f"loop.steps={steps}", f"out={folder}/seed_{seed}"]
            )
        )
    train(compose([*base, "accel.stack_seeds=on", f"resume={folder}"]))
    assert_same_runs(straight, folder, range(4))


def test_every_seed_is_evaluated_on_its_own(store, tmp_path):
    base = words("td3_bc", store, "env=Pendulum-v1", "loop.eval_every=12", "loop.eval_episodes=2")
    alone, together = separate(base, tmp_path / "alone"), stacked(base, tmp_path / "together")
    assert_same_runs(alone, together)
    returns = []
    for seed in range(N):
        for step in (12, 24):
            a, b = (
                load_json(f / f"seed_{seed}" / "eval" / f"step_{step:09d}.json") for f in (alone, together)
            )
            assert a.keys() == b.keys()
            assert (a["seed"], a["env"]) == (b["seed"], b["env"])
            assert a["raw"]["returns"] == pytest.approx(b["raw"]["returns"], rel=1e-4)
        returns.append(b["raw"]["returns"][0])
    assert len(set(returns)) == N


def test_online_phase_follows_seed_by_seed(store, tmp_path):
    base = words("td3_bc", store, "env=Pendulum-v1", "env.num_envs=1", "loop.eval_episodes=1")
    base += ["loop.online_steps=12", "loop.buffer_size=100"]
    assert_same_runs(separate(base, tmp_path / "alone"), stacked(base, tmp_path / "together"))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["accel.mode=compile"], "accel.mode=compile compiles one seed's update"),
        (["track.also=[trackio]"], r"track.also=\['trackio'\] follows one run at a time"),
        (["algo=sac", "env=Pendulum-v1", "data.path="], "algo=sac learns in an environment"),
    ],
)
def test_what_cannot_be_stacked_is_named(store, tmp_path, more, reason):
    base = words("td3_bc", store, *STACK, f"out={tmp_path / 'run'}", *more)
    base = [word for word in base if "algo=sac" not in more or not word.startswith(("policy=", "algo=td3"))]
    with pytest.raises(ConfigError, match=f"accel.stack_seeds=on: {reason}. Fix: accel.stack_seeds=off"):
        train(compose(base))
    assert not (tmp_path / "run").exists()


def test_auto_stacks_where_it_is_faster_and_says_why_not(store, tmp_path, caplog):
    base = words("td3_bc", store, "loop.steps=8", "algo.hidden=[16]", "device=cpu")

    def said(*more):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="robopost"):
            train(compose([*base, *more]))
        return caplog.text

    text = said("seeds=3", f"out={tmp_path / 'few'}")
    assert "seeds one after another: 3 of " in text
    assert "(from 4 seeds, up to 50,000 parameters); accel.stack_seeds=on stacks them" in text
    assert "seeds one after another" in said("seeds=4", "algo.hidden=[256,256]", f"out={tmp_path / 'large'}")
    assert "seed_3: 4 seeds at once from step 0" in said("seeds=4", f"out={tmp_path / 'small'}")
    assert "seeds at once" not in said("seeds=4", "accel.stack_seeds=off", f"out={tmp_path / 'off'}")
    assert "seed_0, seed_1: 2 seeds at once" in said(
        "seeds=2", "accel.stack_seeds=on", f"out={tmp_path / 'on'}"
    )
    with pytest.raises(ConfigError, match=r"accel.stack_seeds.*Did you mean 'auto'"):
        train(compose([*base, "seeds=2", f"out={tmp_path / 'typo'}", "accel.stack_seeds=atuo"]))


def built(name, store, *more, mode="eager"):
    """An algorithm of every seed, as `train` builds them, and batches as it draws them."""
    config = compose(words(name, store, *more))
    dataset = Dataset.load(config.data, device="cuda" if mode != "eager" else "cpu")
    runs = [Run(compose([*words(name, store, *more), f"seed={seed}"]), Path("none")) for seed in range(N)]
    algos = [run.build(dataset.spec, dataset.stats, dataset.dataset_id) for run in runs]
    dataset = dataset.normalise(algos[0].policy.normaliser)
    for algo in algos:
        algo.attach(dataset)
    return algos, dataset


def test_obstacles(store):
    (algo, *_), _ = built("td3_bc", store)
    assert obstacle(algo) == ""
    algo.policy.add_module("extra", torch.nn.Dropout(0.5))
    assert obstacle(algo) == "policy has a layer Dropout"
    (algo, *_), _ = built("td3_bc", store)
    algo.other = torch.optim.Adam(list(algo.critic.parameters()))
    assert obstacle(algo) == "other owns parameters outside `Flat`"
    del algo.other
    algo.parts = [algo._actor_flat]
    assert obstacle(algo) == "parts holds state in a list"
    del algo.parts
    algo.critic_optimizer = torch.optim.LBFGS([algo._critic_flat.param])
    assert "LBFGS" in obstacle(algo)
    (algo, *_), _ = built("bc", store)
    type(algo).stackable = False
    try:
        assert obstacle(algo) == "algo=bc can't run under torch.vmap"
        with pytest.raises(ConfigError, match="seeds can't be stacked"):
            Stack([algo])
    finally:
        del type(algo).stackable


def test_algorithms_keep_their_memory_until_stored(store):
    algos, dataset = built("td3_bc", store)
    before = [algo.state_dict()["tensors"]["policy/net.0.weight"].clone() for algo in algos]
    stack = Stack(algos)
    g = torch.Generator().manual_seed(0)
    batch = dataset.sample(N * 8, g).map(lambda tensor: tensor.unflatten(0, (N, -1)))
    for _ in range(2):
        metrics = stack.update(batch)
    assert all(value.shape == (N,) for value in metrics.values())
    for algo, weight in zip(algos, before, strict=True):
        assert torch.equal(algo.policy.net[0].weight, weight)
        assert type(algo.policy.net[0].weight) is torch.nn.Parameter  # nothing of vmap is left behind
        assert algo.updates == 0
    stack.store()
    for algo, weight in zip(algos, before, strict=True):
        assert not torch.equal(algo.policy.net[0].weight, weight)
        assert algo.updates == 2
    other = built("td3_bc", store)[0][0]
    with pytest.raises(ConfigError, match="different numbers of updates"):
        Stack([algos[0], other])


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("algo", [name for name in OFFLINE if name != "prdc"])  # its search is float32
def test_in_double_precision_nothing_but_rounding_differs(algo, store, monkeypatch):
    """The way through a CUDA graph, with an eager stand-in for the graph, against separate seeds.

    In float32, Adam makes visible differences of rounding where a gradient is almost 0; here they stay tiny.
    """
    calls = []

    def fake(fn, mode, *, device, generators):
        assert (mode, len(generators)) == ("cudagraph", N)

        def replay(*args):
            calls.append({tensor.shape[0] for tensor in leaves(args).values()})
            out = fn(*args)
            packed = torch.stack([value.detach().squeeze() for value in out.values()])
            return dict(zip(out, packed.clone().unbind(), strict=True))

        return replay

    monkeypatch.setattr(stack_module, "resolve", lambda mode, device: mode)
    monkeypatch.setattr(stack_module, "accelerate", fake)
    (apart, dataset), (together, _) = built(algo, store), built(algo, store)
    stack = Stack(together, "cudagraph")
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        batch = batch_at(dataset, apart[0], dataset.draw(N * 8, g, chunks=apart[0].needs.chunks))
        batch = batch.map(lambda t: (t.double() if t.is_floating_point() else t).unflatten(0, (N, -1)))
        metrics = stack.update(batch)
        for seed, own in enumerate(apart):
            alone = own.update(batch.map(lambda tensor, seed=seed: tensor[seed]))
            assert alone.keys() == metrics.keys()
            for key, value in alone.items():
                assert metrics[key][seed].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-9)
    assert len(calls) >= 6
    assert all(sizes == {N} for sizes in calls)
    stack.store()
    for a, b in zip(apart, together, strict=True):
        one, two = a.state_dict(), b.state_dict()
        assert one["json"] == two["json"]
        for key, value in one["tensors"].items():
            torch.testing.assert_close(two["tensors"][key], value, rtol=1e-9, atol=1e-9)


def test_methods_kept_as_attributes_see_all_seeds(store):
    """A bound method belongs to one seed's algorithm; in the stack it must not stay with the first."""
    algos, dataset = built("td3_bc", store)
    for algo in algos:
        algo.policy_loss = algo.actor_loss
    kept = type(algos[0]).actor_step
    type(algos[0]).actor_step = _step_by_attribute
    try:
        stack = Stack(algos)
        batch = dataset.sample(N * 8, torch.Generator().manual_seed(0))
        for _ in range(2):
            stack.update(batch.map(lambda tensor: tensor.unflatten(0, (N, -1))))
    finally:
        type(algos[0]).actor_step = kept
    assert seen == [stack._template]


seen = []


def _step_by_attribute(self, batch):
    loss, metrics = self.policy_loss(batch)
    seen.append(self.policy_loss.__self__)
    self._actor_flat.backward(loss)
    return metrics


def test_an_error_leaves_the_algorithms_whole(store):
    algos, dataset = built("td3_bc", store)
    stack = Stack(algos)
    with pytest.raises(Exception):  # noqa: B017 - whatever torch makes of a batch without seeds
        stack.update(dataset.sample(8, torch.Generator().manual_seed(0)))
    assert type(algos[0].policy.net[0].weight) is torch.nn.Parameter
    algos[0].policy.act({"state": torch.zeros(1, 3)})


def test_divergence_names_the_seed(store, tmp_path):
    base = words("td3_bc", store, "algo.critic_lr=1e38", "algo.actor_lr=1e38")
    with pytest.raises(RobopostError, match=r"^seed_0: loss/\w+ is (nan|inf)"):
        stacked(base, tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("algo", OFFLINE)
def test_captured_stack_equals_separate_eager_runs(algo, store, tmp_path):
    base = words(algo, store, "device=cuda")
    alone = separate([*base, "accel.mode=eager"], tmp_path / "alone")
    together = stacked([*base, "accel.mode=cudagraph"], tmp_path / "together")
    for seed in range(N):
        a, b = (load_tensors(latest(f / f"seed_{seed}") / "model.safetensors") for f in (alone, together))
        assert a.keys() == b.keys()
        for key in a.keys() - {"rng/torch"}:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_of_a_stack_are_captured(store):
    algos, dataset = built("td3_bc", store, "device=cuda", mode="cudagraph")
    stack = Stack(algos, "cudagraph")
    g = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(10):
        stack.update(dataset.sample(N * 8, g).map(lambda tensor: tensor.unflatten(0, (N, -1))))
    assert all(graph.captured for graph in stack.graphs)
    assert all(isinstance(graph, CudaGraph) for graph in stack.graphs)
