# SPDX-License-Identifier: Apache-2.0
"""Random batches/s of a Dataset against the same data read from plain zarr and from LeRobotDataset.

A batch is 256 random slices, each with the 16 observations up to a step (state, 32 numbers) and the 16
actions from it on (6 numbers), padded inside the episode, delivered as torch tensors; or 256 random
transitions. Both sides of a cell draw from the same store, and one batch of the same indices has to be equal,
bit for bit, before any timing.

- `slices/zarr`: each slice read from the store's own zarr arrays, as a dataset without a cache would.
- `slices/zarr, one selection`: all 256 x 16 rows of a key by one orthogonal selection, so that every chunk is
  decoded once per batch: the fastest plain zarr we know of. Informative.
- `transitions/zarr`: each row read from the zarr arrays. Informative.
- `slices/lerobot`: LeRobotDataset v3 with `delta_timestamps`, items stacked, on the store exported through
  lerobot.
- `slices/lerobot, 2 workers`: the same through a torch DataLoader with two worker processes. Informative, not
  in the smoke tier.

robopost runs on one torch thread; zarr uses its own thread pool; LeRobotDataset runs in the environment whose
interpreter is named by ROBOPOST_LEROBOT_PYTHON (default: .venv-lerobot of the checkout, see `make lerobot`).
Without it that cell says so and the figure stays empty.
"""

import json
import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from robopost.bench import Bench
from robopost.config import DataConfig
from robopost.data.batch import Spec
from robopost.data.convert import export_store
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore
from robopost.interleave import interleave

ROOT = Path(__file__).resolve().parents[1]
OBS, ACT, BATCH, HORIZON, EPISODE, FPS = 32, 6, 256, 16, 1000, 50


def make_store(path, steps):
    """Episodes of random walks, which compress about as well as recorded joints."""
    spec = Spec({"state": ((OBS,), "float32")}, ACT, (-np.inf,) * ACT, (np.inf,) * ACT, EPISODE)
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, spec=spec, fps=FPS, source="benchmarks/store.py") as store:
        for _ in range(steps // EPISODE):
            state = rng.standard_normal((EPISODE + 1, OBS), dtype=np.float32).cumsum(axis=0)
            action = rng.standard_normal((EPISODE, ACT), dtype=np.float32)
            store.append(Episode({"state": state}, action, action[:, 0], False, True))


class Zarr:
    """The same batches straight from the store's arrays."""

    def __init__(self, path):
        self.store = EpisodeStore.open(path)
        self.state, self.action = self.store.array("data/obs.state"), self.store.array("data/action")
        self.reward, self.final = self.store.array("data/reward"), self.store.array("meta/final_obs.state")
        self.ends = self.store.episode_ends

    def bounds(self, step):
        episode = int(np.searchsorted(self.ends, step, side="right"))
        return int(self.ends[episode - 1]) if episode else 0, int(self.ends[episode]), episode

    def slices(self, steps):
        """One read per sample and key."""
        obs = np.empty((len(steps), HORIZON, OBS), np.float32)
        action = np.empty((len(steps), HORIZON, ACT), np.float32)
        mask = np.zeros((len(steps), HORIZON), bool)
        for i, step in enumerate(steps.tolist()):
            first, end, _ = self.bounds(step)
            begin, stop = max(step + 1 - HORIZON, first), min(step + HORIZON, end)
            obs[i, HORIZON - (step + 1 - begin) :] = self.state[begin : step + 1]
            obs[i, : HORIZON - (step + 1 - begin)] = obs[i, HORIZON - (step + 1 - begin)]
            action[i, : stop - step] = self.action[step:stop]
            action[i, stop - step :] = action[i, stop - step - 1]
            mask[i, : stop - step] = True
        return torch.from_numpy(obs), torch.from_numpy(action), torch.from_numpy(mask)

    def selection(self, steps):
        """One read per key: the sorted, distinct rows, then copied into place."""
        episode = np.searchsorted(self.ends, steps, side="right")
        first = np.where(episode > 0, self.ends[episode - 1], 0)
        past = np.maximum(steps[:, None] + np.arange(1 - HORIZON, 1), first[:, None])
        ahead = steps[:, None] + np.arange(HORIZON)
        mask = ahead < self.ends[episode][:, None]
        out = []
        for array, rows in (
            (self.state, past),
            (self.action, np.minimum(ahead, self.ends[episode][:, None] - 1)),
        ):
            distinct, inverse = np.unique(rows, return_inverse=True)
            out.append(torch.from_numpy(array.oindex[distinct][inverse.reshape(rows.shape)]))
        return *out, torch.from_numpy(mask)

    def transitions(self, steps):
        """One read per sample and key."""
        obs, following = (np.empty((len(steps), OBS), np.float32) for _ in range(2))
        action, reward = np.empty((len(steps), ACT), np.float32), np.empty(len(steps), np.float32)
        for i, step in enumerate(steps.tolist()):
            _, end, episode = self.bounds(step)
            if step + 1 < end:
                obs[i], following[i] = self.state[step : step + 2]
            else:
                obs[i], following[i] = self.state[step], self.final[episode]
            action[i], reward[i] = self.action[step], self.reward[step]
        return tuple(torch.from_numpy(v) for v in (obs, action, reward, following))


def slices(batch):
    return batch.obs["state"], batch.action, batch.chunk_mask


def transitions(batch):
    return batch.obs["state"], batch.action, batch.reward, batch.next_obs["state"]


def equal(ours, theirs):
    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise AssertionError("both sides deliver different batches for the same indices")


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounds_of(bench, draw, theirs, count):
    """Interleaved rounds: ours draws `many` batches, theirs `count`."""
    many = bench.scale(smoke=200, small=2000, paper=2000)

    def ours():
        for _ in range(many):
            draw()
        return many

    def other():
        theirs(count)
        return count

    with one_thread():
        return interleave(ours, other, rounds=bench.scale(smoke=3, small=7, paper=7)).row()


def against_zarr(bench, data, kind):
    dataset, plain = data.dataset(), Zarr(data.path)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(1)
    read = {"slices": plain.slices, "selection": plain.selection, "transitions": plain.transitions}[kind]
    # The first and last steps of episodes are always in the compared batch: there padding and ends show.
    steps = np.concatenate(
        [rng.integers(dataset.num_steps, size=BATCH), plain.ends - 1, plain.ends[:-1], [0]]
    )
    if kind == "transitions":
        equal(transitions(dataset.transitions_at(torch.from_numpy(steps))), read(steps))
        draw = lambda: transitions(dataset.sample(BATCH, generator))  # noqa: E731
    else:
        equal(slices(dataset.chunks_at(torch.from_numpy(steps), HORIZON, history=HORIZON)), read(steps))
        draw = lambda: slices(dataset.sample_chunks(BATCH, HORIZON, generator, history=HORIZON))  # noqa: E731

    def theirs(count):
        for _ in range(count):
            read(rng.integers(dataset.num_steps, size=BATCH))

    return rounds_of(bench, draw, theirs, bench.scale(smoke=1, small=5, paper=20))


def lerobot_python():
    """Interpreter of the environment with lerobot, None where there is none."""
    path = Path(os.environ.get("ROBOPOST_LEROBOT_PYTHON", ROOT / ".venv-lerobot/bin/python"))
    return path if path.exists() else None


def against_lerobot(bench, data, workers):
    python = lerobot_python()
    if python is None:
        return {"missing": "no environment with lerobot. Fix: make lerobot"}
    dataset, root = data.dataset(), data.lerobot(python)
    generator = torch.Generator().manual_seed(0)
    process = subprocess.Popen(
        [python, ROOT / "benchmarks/sides/lerobot_reader.py", root, str(HORIZON), str(BATCH), str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=data.environment(),
    )

    def ask(**request):
        if request:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"lerobot's side ended: {process.stderr.read()[-500:]}")
        return json.loads(line)

    try:
        frames = ask()["frames"]
        if frames != dataset.num_steps:
            raise AssertionError(f"LeRobotDataset has {frames} frames, the store {dataset.num_steps}")
        steps = np.random.default_rng(1).integers(frames, size=BATCH)
        steps[:4] = 0, EPISODE - 1, EPISODE, frames - 1
        ask(check=steps.tolist(), out=str(data.folder / "check.npz"))
        with np.load(data.folder / "check.npz") as found:
            theirs = [torch.from_numpy(found[k]) for k in ("observation.state", "action", "action_is_pad")]
        theirs[2] = ~theirs[2]
        equal(slices(dataset.chunks_at(torch.from_numpy(steps), HORIZON, history=HORIZON)), theirs)
        count, seeds = bench.scale(smoke=1, small=8, paper=20), iter(range(1, 1000))

        def draw():
            return slices(dataset.sample_chunks(BATCH, HORIZON, generator, history=HORIZON))

        many = bench.scale(smoke=200, small=2000, paper=2000)

        def ours():
            for _ in range(many):
                draw()
            return many

        def other():
            return ask(batches=count)["batches"]

        ratios = []
        with one_thread():
            for _ in range(bench.scale(smoke=3, small=7, paper=7)):
                ask(seed=next(seeds), prepare=count)
                ratios.append(interleave(ours, other, rounds=1, warmup=0))
        merged = type(ratios[0])(tuple(r.ours[0] for r in ratios), tuple(r.theirs[0] for r in ratios))
        return merged.row()
    finally:
        process.stdin.close()
        if process.wait() and process.returncode > 0:
            raise RuntimeError(f"lerobot's side failed: {process.stderr.read()[-500:]}")


class Data:
    """The data on disk, made when the first cell needs it."""

    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps
        self.path = folder / "store.zarr"
        self._dataset = None

    def dataset(self):
        if self._dataset is None:
            make_store(self.path, self.steps)
            self._dataset = Dataset.load(DataConfig(path=str(self.path)), device="cpu")
        return self._dataset

    def environment(self):
        site = str(ROOT / "tests/lerobot/site")  # declares torchvision's operators where it has no binaries
        home = str(self.folder / "hf")
        return {**os.environ, "PYTHONPATH": site, "HF_HUB_OFFLINE": "1", "HF_HOME": home}

    def lerobot(self, python):
        root = self.folder / "lerobot"
        if not root.exists():
            self.dataset()
            before = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = self.environment()["PYTHONPATH"]
            try:
                with EpisodeStore.open(self.path) as store:
                    export_store(store, root, "lerobot", {"python": str(python)})
            finally:
                os.environ.pop("PYTHONPATH")
                if before is not None:
                    os.environ["PYTHONPATH"] = before
        return root


def run(bench: Bench) -> None:
    bench.packages("zarr", "torch")
    steps = bench.scale(smoke=5_000, small=200_000, paper=200_000)
    params = {"steps": steps, "batch": BATCH, "horizon": HORIZON, "obs": OBS, "act": ACT}
    present = lerobot_python() is not None
    with tempfile.TemporaryDirectory(prefix="robopost-bench-") as folder:
        data = Data(Path(folder), steps)
        rows = {}
        for key, kind in (
            ("slices/zarr", "slices"),
            ("slices/zarr, one selection", "selection"),
            ("transitions/zarr", "transitions"),
        ):
            rows[key] = bench.cell(key, lambda kind=kind: against_zarr(bench, data, kind), params=params)
        sides = [("slices/lerobot", 0), ("slices/lerobot, 2 workers", 2)]
        for key, workers in sides[: bench.scale(smoke=1, small=2, paper=2)]:
            rows[key] = bench.cell(
                key,
                lambda workers=workers: against_lerobot(bench, data, workers),
                params={**params, "lerobot": present},
            )
    for name, key, target in (
        ("store_batches_vs_zarr", "slices/zarr", 100),
        ("store_batches_vs_lerobot", "slices/lerobot", 10),
    ):
        row = rows[key]
        missing = row.get("missing", "")
        value, interval = (None, None) if missing else (row["median"], (row["min"], row["max"]))
        bench.figure(name, value, interval=interval, unit="x", target=target, note=missing)
    bench.table(
        "Random batches of 256",
        [
            {
                "read as / from": key,
                "robopost batches/s": row.get("ours_per_s"),
                "other batches/s": row.get("theirs_per_s"),
                "ratio": row.get("median"),
                "min": row.get("min"),
                "max": row.get("max"),
            }
            for key, row in rows.items()
        ],
        caption=f"{steps} steps of {OBS} + {ACT} float32, slices of {HORIZON} steps, one torch thread.",
    )
