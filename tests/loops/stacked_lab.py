# SPDX-License-Identifier: Apache-2.0
"""What the tests of stacked seeds share: runs apart and together, and how their results compare."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from robopost.artefacts.checkpoint import load_json, load_tensors
from robopost.compose import compose
from robopost.data.dataset import Dataset
from robopost.loops import train
from robopost.loops.run import Run
from robopost.registry import ALGOS

spec = importlib.util.spec_from_file_location("resume_contract", Path(__file__).parent / "test_resume.py")
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)
store = contract.store

N = 3
# A test of its own holds that one which is not stackable is refused or trained seed by seed.
OFFLINE = sorted(e.name for e in ALGOS if e.target.regime == "offline" and e.target.stackable)
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
