# SPDX-License-Identifier: Apache-2.0
"""Updates/s of FamO2O over IQL against the original JAX learner, side by side on the same cores.

HalfCheetah sizes (17 observations, 6 actions, 256-256 networks, batch 256, 100k transitions), offline phase, the
balance model updated every time on both sides, settings of the original's one published config. The original is
read at run time from a clone and runs in an environment of its own, because it needs an old stack:

    git clone https://github.com/LeapLabTHU/FamO2O $ROBOPOST_REFERENCE_DIR/FamO2O
    python3.11 -m venv <folder>
    <folder>/bin/pip install jax==0.4.13 jaxlib==0.4.13 flax==0.6.11 optax==0.1.5 \
        tensorflow-probability==0.20.1 chex==0.1.7 "orbax-checkpoint<0.4" "numpy<2" "scipy<1.13" tqdm
    export ROBOPOST_FAMO2O_PYTHON=<folder>/bin/python

Both processes are pinned to the same cores (the first of those this one may use) and get as many threads as cores:
torch by `set_num_threads`, XLA by its own choice from the cores it is pinned to, OMP_NUM_THREADS for what remains.
They take turns, so one of them is always idle. Sampling a batch and reading metrics now and then are included
on both sides. CPU time per update is recorded beside, because it hardly depends on what else runs on the machine; with
two threads, waiting for one another on a busy machine costs torch's far more than XLA's.

Before any timing both sides get the same weights, batch and noise, and the losses of V, Q, policy, balance model and
temperature have to agree to 1e-5 (of max(1, |loss|)) in the first update of either phase. One difference is named:
the original multiplies advantages (B,) by coefficients (B, 1), so that the weights of its policy loss form a (B, B)
matrix and every sample is weighted with the mean over all coefficients of the batch, not with its own. For the
comparison ours is given those weights; the difference that its own weights make is recorded beside.

Rows without a target: our locomotion recipe, which updates the balance model every 5 updates (less work than the
original, whose code has no such interval), two threads, and, where torch's oneDNN kernels are used
(robopost/nets/fused.py), what is left without them.
"""

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sides.originals import Recorder, reference, repeat

from robopost import accel
from robopost.algos.offline import famo2o_iql
from robopost.algos.offline.famo2o_iql import FamO2OIQL, FamO2OIQLConfig
from robopost.bench import Bench
from robopost.config import AccelConfig
from robopost.data.batch import Batch, Spec
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.errors import ConfigError
from robopost.interleave import interleave
from robopost.nets import fused
from robopost.policies.family import Family, FamilyConfig

SUITE = "offline"
SIZES = "offline phase, 17+6 dimensions, N = 100k, batch 256, sampling included"
OBS, ACT, BATCH, STEPS, EPISODE = 17, 6, 256, 100_000, 1000
SPEC = Spec({"state": ((OBS,), "float32")}, ACT, (-1.0,) * ACT, (1.0,) * ACT, EPISODE)
WORKER = Path(__file__).parent / "sides" / "famo2o_learner.py"
LOSSES = {
    "value_loss": "loss/value",
    "critic_loss": "loss/critic",
    "actor_loss": "loss/actor",
    "hierarchical_loss": "loss/balance",
    "temp_loss": "loss/temperature",
}


def experience(seed=0):
    """Random transitions in episodes that end without a terminal, in the original's fields."""
    rng = np.random.default_rng(seed)
    episodes = STEPS // EPISODE
    obs = rng.standard_normal((episodes, EPISODE + 1, OBS), dtype=np.float32)
    return {
        "observations": obs[:, :-1].reshape(-1, OBS),
        "actions": rng.uniform(-0.99, 0.99, (STEPS, ACT)).astype(np.float32),
        "rewards": rng.standard_normal(STEPS, dtype=np.float32),
        "masks": np.ones(STEPS, np.float32),
        "next_observations": obs[:, 1:].reshape(-1, OBS),
    }


def make(**options):
    """Our algorithm with the original's settings."""
    torch.manual_seed(0)
    policy = Family(FamilyConfig(coefficient_low=8.0, coefficient_high=14.0), SPEC)
    config = FamO2OIQLConfig(expectile=0.9, **options)
    generator = torch.Generator().manual_seed(0)
    return FamO2OIQL(config, policy, SPEC, device=torch.device("cpu"), generator=generator)


def our_updates(data, **options):
    """A function that does one update as the offline loop does."""
    algo = make(**options)
    episodes = [
        Episode(
            obs={
                "state": np.concatenate(
                    [data["observations"][i : i + EPISODE], data["next_observations"][i : i + EPISODE][-1:]]
                )
            },
            action=data["actions"][i : i + EPISODE],
            reward=data["rewards"][i : i + EPISODE] - 1,
            terminated=False,
            truncated=True,
        )
        for i in range(0, STEPS, EPISODE)
    ]
    dataset = Dataset.from_episodes(episodes, SPEC).normalise(algo.policy.normaliser)
    generator, record = torch.Generator().manual_seed(1), Recorder()
    return lambda: record(algo.update(dataset.sample(BATCH, generator)))


class Original:
    """The worker process with the original learner."""

    def __init__(self, data, folder, threads):
        python = os.environ.get("ROBOPOST_FAMO2O_PYTHON", "")
        if not python or not Path(python).exists():
            raise ConfigError(
                f"ROBOPOST_FAMO2O_PYTHON={python!r} names no interpreter. "
                "Fix: make the environment that benchmarks/famo2o_speed.py describes"
            )
        repository = reference("FamO2O", "jax_iql", "family_learner.py").parents[1]
        self.folder = folder
        np.savez(folder / "data.npz", **data)
        extra = {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [python, WORKER, repository, folder / "data.npz", str(BATCH)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | extra,
        )
        self.info = self._answer()

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the original's side ended: {self.process.stderr.read()[-800:]}")
        return json.loads(line)

    def parity(self, rows):
        self.ask(parity=rows, out=str(self.folder / "parity.npz"))
        with np.load(self.folder / "parity.npz") as found:
            return {key: torch.from_numpy(found[key]) for key in found}

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def dense(tensors, *names):
    """Kernel (in, out) and bias of each Dense of a flax tree."""
    return [(tensors[f"{name}/kernel"], tensors[f"{name}/bias"]) for name in names]


def load_weights(algo, tensors):
    """The original's weights into ours."""

    def into(net, layers, member=None):
        linears = [layer for layer in net if hasattr(layer, "weight")]
        for layer, (kernel, bias) in zip(linears, layers, strict=True):
            if member is None:
                layer.weight.copy_(kernel.t())
                layer.bias.copy_(bias)
            else:
                layer.weight[member].copy_(kernel)
                layer.bias[member].copy_(bias[None])

    with torch.no_grad():
        for name, net in (("actor", algo.policy.net), ("hierarchical_actor", algo.policy.balance.net)):
            layers = dense(tensors, f"{name}/MLP_0/Dense_0", f"{name}/MLP_0/Dense_1", f"{name}/Dense_0")
            into(net, layers)
        algo.policy.log_std.copy_(tensors["actor/log_stds"])
        algo.policy.balance.log_std.copy_(tensors["hierarchical_actor/log_stds"])
        algo.temperature.log.copy_(tensors["hierarchical_temp/log_temp"])
        into(algo.value.net, dense(tensors, *(f"value/MLP_0/Dense_{i}" for i in range(3))))
        for ours, theirs in ((algo.critic, "critic"), (algo.critic_target, "target_critic")):
            for member in range(2):
                prefix = f"{theirs}/Critic_{member}/MLP_0/Dense_"
                into(ours.net, dense(tensors, *(f"{prefix}{i}" for i in range(3))), member)


def shared_weights(advantage, coefficient, limit):
    """What the original's policy loss weighs with: its c is (B, 1) and its advantage (B,), so that every sample gets
    the mean over all coefficients of the batch instead of its own."""
    return (coefficient[:, None] * advantage).exp().clamp(max=limit).mean(0)


def first_losses(tensors, data, phase, weights):
    """Losses of our first update, from the original's weights and noise."""
    algo = make()
    load_weights(algo, tensors)
    policy, coefficient, action = (
        tensors[f"{phase}/noise/{key}"] for key in ("policy", "coefficient", "action")
    )
    queue = [coefficient[:, 0], action]
    if phase == "online":
        algo.begin_online()
        queue.insert(0, policy[:, 0])
    algo._noise = lambda like: queue.pop(0)
    algo.policy.uniform_coefficient = lambda *_: policy[:, 0]
    s, a, r, _, s2 = (torch.from_numpy(value[:BATCH]) for value in data.values())
    flags = torch.zeros(BATCH, dtype=torch.bool)
    batch = Batch({"state": s}, a, r, {"state": s2}, flags, flags, torch.full((BATCH,), 0.99))
    with mock.patch.object(famo2o_iql, "advantage_weights", weights):
        return algo.update(batch)


def parity(original, data):
    """Difference of each loss, relative to max(1, |loss|), in the first update of either phase."""
    tensors = original.parity([0, BATCH])
    worst = dict.fromkeys([*LOSSES, "actor_loss with own coefficients"], 0.0)
    for phase in ("offline", "online"):
        got = first_losses(tensors, data, phase, shared_weights)
        own = first_losses(tensors, data, phase, famo2o_iql.advantage_weights)

        def compare(key, loss, value, phase=phase):
            expected = tensors[f"{phase}/loss/{loss}"].item()
            worst[key] = max(worst[key], abs(value.item() - expected) / max(1.0, abs(expected)))

        for theirs, ours in LOSSES.items():
            compare(theirs, theirs, got[ours])
        compare("actor_loss with own coefficients", "actor_loss", own["loss/actor"])
    if not max(worst[key] for key in LOSSES) < 1e-5:
        raise AssertionError(f"losses differ, not the same computation: {worst}")
    return worst


@contextlib.contextmanager
def pinned(count):
    """This process and its children on the first `count` cores it may use, with as many threads."""
    cores, threads, denormal = (
        os.sched_getaffinity(0),
        torch.get_num_threads(),
        torch.set_flush_denormal(True),
    )
    os.sched_setaffinity(0, sorted(cores)[:count])
    accel.configure(AccelConfig(threads=count))
    try:
        yield len(os.sched_getaffinity(0))
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(denormal)


def run(bench: Bench) -> None:
    count = bench.scale(smoke=40, small=200, paper=1000)
    rounds = bench.scale(smoke=3, small=9, paper=15)
    data, rows = experience(), []

    def compare(threads, **options):
        cpu = {"ours": [], "theirs": []}

        def ours():
            start = time.process_time()
            work()
            cpu["ours"].append(1e3 * (time.process_time() - start) / count)
            return count

        def theirs():
            cpu["theirs"].append(1e3 * original.ask(updates=count)["cpu_s"] / count)
            return count

        with pinned(threads) as cores, tempfile.TemporaryDirectory() as folder:
            original = Original(data, Path(folder), threads)
            try:
                worst = parity(original, data)
                work = repeat(our_updates(data, **options), count)
                row = interleave(ours, theirs, rounds, warmup=2).row()
            finally:
                original.close()
        row |= {f"{side}_cpu_ms": statistics.median(values[2:]) for side, values in cpu.items()}
        return row | {
            "loss_differences": worst,
            "fused": fused.preferred(),
            "cores": cores,
            "jax": original.info["jax"],
        }

    def cell(name, threads, **options):
        params = {"threads": threads, "updates": count, "rounds": rounds, **options}
        row = bench.cell(name, lambda: compare(threads, **options), params=params)
        rows.append(
            {
                "variant": name,
                "ours (1/s)": row["ours_per_s"],
                "original (1/s)": row["theirs_per_s"],
                "ratio": row["median"],
                "min": row["min"],
                "max": row["max"],
                "ours (CPU ms)": row["ours_cpu_ms"],
                "original (CPU ms)": row["theirs_cpu_ms"],
            }
        )
        return row

    def figure(name, row, note, **options):
        bench.figure(
            name,
            row["median"],
            interval=(row["min"], row["max"]),
            unit="x",
            note=f"{note}; {SIZES}",
            **options,
        )

    row = cell("1 thread", 1)
    figure("famo2o_iql_updates_vs_original", row, "same work on both sides, the same one core", target=1.5)
    worst = row["loss_differences"]
    largest = max(worst[key] for key in LOSSES) if isinstance(worst, dict) else worst
    note = "V, Q, policy, balance model and temperature; first update of either phase, relative to max(1, |loss|)"
    bench.figure("famo2o_iql_loss_difference", largest, target=1e-5, better="lower", note=note)
    row = cell("1 thread, ours with the balance model every 5", 1, balance_every=5)
    note = "our locomotion recipe, balance model every 5 updates, against the original, which has no interval"
    figure("famo2o_iql_recipe_updates_vs_original", row, note)
    cell("2 threads", 2)
    if fused.preferred():
        fused.force(False)
        try:
            cell("1 thread, without fused kernels", 1)
        finally:
            fused.force(None)
    bench.table(
        "cpu", rows, caption="Updates per second of FamO2O over IQL, ours and the original, interleaved."
    )
