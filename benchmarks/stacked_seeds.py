# SPDX-License-Identifier: Apache-2.0
"""Updates/s of several seeds trained at once against the same seeds one after another.

TD3+BC and IQL at HalfCheetah sizes (17 observations, 6 actions, batch 256) with 256-256 and with 64-64 networks,
3 and 8 seeds, sampling and the sums of metrics included on both sides, interleaved. A unit is one update of one seed:
the ratio is how much sooner the last seed is done, and also how the stacked rate compares with one seed on its own.
Before any timing the stacked seeds have to agree with separate ones over 24 updates, to 1e-4 of each tensor's
largest entry; the largest difference is recorded.

On a GPU, captured against captured and eager against eager.
"""

import torch

from robopost import accel
from robopost.algos.stack import Stack
from robopost.bench import Bench
from robopost.compose import compose
from robopost.config import AccelConfig
from robopost.data.batch import Spec
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.interleave import interleave
from robopost.loops.offline import batch_at
from robopost.nets import fused
from robopost.policies.base import build_policy
from robopost.registry import ALGOS

SUITE = "offline"
OBS, ACT, LENGTH, PARITY_UPDATES = 17, 6, 1000, 24
SPEC = Spec({"state": ((OBS,), "float32")}, ACT, (-1.0,) * ACT, (1.0,) * ACT, LENGTH)
ALGORITHMS, WIDTHS, SEEDS = ("td3_bc", "iql"), (64, 256), (3, 8)


def experience(steps, device):
    """Random transitions in episodes of 1000 steps, on the device."""
    g = torch.Generator().manual_seed(0)
    episodes = [
        Episode(
            obs={"state": torch.randn(LENGTH + 1, OBS, generator=g).numpy()},
            action=(torch.rand(LENGTH, ACT, generator=g) * 2 - 1).numpy(),
            reward=torch.randn(LENGTH, generator=g).numpy(),
            terminated=False,
            truncated=True,
        )
        for _ in range(steps // LENGTH)
    ]
    return Dataset.from_episodes(episodes, SPEC, device=device)


class Side:
    """Seeds with their own weights, noise and samples; trained one after another, or stacked."""

    def __init__(self, name, width, seeds, dataset, mode="eager"):
        config = compose(
            [f"algo={name}", f"policy.hidden=[{width},{width}]", f"algo.hidden=[{width},{width}]"]
        )
        self.dataset, self.algos, self.generators = dataset, [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            policy = build_policy(config.policy, SPEC).to(dataset.device)
            make = lambda base, seed=seed: torch.Generator(dataset.device).manual_seed(base + seed)  # noqa: E731
            algo = ALGOS.get(name).target(
                config.algo, policy, SPEC, device=dataset.device, generator=make(100)
            )
            algo.accelerate(mode)
            self.algos.append(algo)
            self.generators.append(make(200))
        self.mode, self.stack, self.sums = mode, None, [{} for _ in range(seeds)]

    def draw(self, generator):
        return self.dataset.draw(self.algos[0].needs.batch_size, generator)

    def record(self, metrics, index=0):
        """As `Run.record`: sums on the device."""
        sums = self.sums[index]
        for key, value in metrics.items():
            sums[key] = sums[key] + value if key in sums else value.clone()

    def apart(self, updates):
        """All updates of one seed, then of the next."""
        for index, (algo, generator) in enumerate(zip(self.algos, self.generators, strict=True)):
            for _ in range(updates):
                self.record(algo.update(batch_at(self.dataset, algo, self.draw(generator))), index)
        return updates * len(self.algos)

    def together(self, updates):
        """Every update of all seeds at once."""
        if self.stack is None:
            self.stack = Stack(self.algos, self.mode)
        for _ in range(updates):
            steps = torch.cat([self.draw(generator) for generator in self.generators])
            batch = batch_at(self.dataset, self.algos[0], steps)
            self.record(self.stack.update(batch.map(lambda t: t.unflatten(0, (len(self.algos), -1)))))
        return updates * len(self.algos)


def parity(name, width, seeds, dataset, mode):
    """Largest difference of any tensor of the state, relative to its largest entry, after some updates."""
    apart, together = (Side(name, width, seeds, dataset, mode) for _ in range(2))
    apart.apart(PARITY_UPDATES)
    together.together(PARITY_UPDATES)
    together.stack.store()
    worst = 0.0
    for a, b in zip(apart.algos, together.algos, strict=True):
        ours, theirs = b.state_dict()["tensors"], a.state_dict()["tensors"]
        for key, value in theirs.items():
            scale = max(1.0, value.float().abs().max().item())
            worst = max(worst, (ours[key] - value).abs().max().item() / scale)
    return worst


def compare(bench, key, name, width, seeds, dataset, mode, threads):
    """One cell: parity, then the interleaved ratio."""
    count = bench.scale(smoke=4, small=40, paper=200) // (1 if threads == 1 else 4)
    rounds = bench.scale(smoke=2, small=9, paper=15)
    on_gpu = dataset.device.type == "cuda"

    def measure():
        worst = parity(name, width, seeds, dataset, mode)
        if not worst < 1e-4:
            raise AssertionError(
                f"stacked and separate seeds differ by {worst:.2g}: not the same computation"
            )
        apart, together = (Side(name, width, seeds, dataset, mode) for _ in range(2))
        sync = torch.cuda.synchronize if on_gpu else None
        row = interleave(
            lambda: together.together(count), lambda: apart.apart(count), rounds, sync=sync
        ).row()
        return row | {"largest_difference": worst, "fused": fused.preferred() and not on_gpu}

    params = {"threads": threads, "updates": count, "rounds": rounds, "mode": mode}
    row = bench.cell(key, measure, params=params)
    where = "GPU, " + mode if on_gpu else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return row, {
        "device": where,
        "algorithm": name,
        "networks": f"{width}-{width}",
        "seeds": seeds,
        "stacked (1/s)": row["ours_per_s"],
        "one after another (1/s)": row["theirs_per_s"],
        "ratio": row["median"],
        "min": row["min"],
        "max": row["max"],
        "largest difference": row["largest_difference"],
    }


def run(bench: Bench) -> None:
    """CPU with one and two threads, and a GPU where there is one."""
    bench.packages("torch")
    before, rows = torch.get_num_threads(), []
    cpu = experience(bench.scale(smoke=20_000, small=200_000, paper=1_000_000), "cpu")
    places = [("cpu", 1, "eager", cpu), ("cpu", 2, "eager", cpu)]
    if torch.cuda.is_available():
        gpu = experience(bench.scale(smoke=20_000, small=200_000, paper=1_000_000), "cuda")
        places += [("gpu", 1, mode, gpu) for mode in ("cudagraph", "eager")]
    seeds_of = bench.scale(smoke=SEEDS[:1], small=SEEDS, paper=SEEDS)
    try:
        for place, threads, mode, dataset in places:
            accel.configure(AccelConfig(threads=threads))
            for name in ALGORITHMS:
                for width in WIDTHS:
                    for seeds in seeds_of:
                        kind = f"{threads} threads" if place == "cpu" else mode
                        key = f"{place}/{kind}/{name}/{width}/{seeds} seeds"
                        row, line = compare(bench, key, name, width, seeds, dataset, mode, threads)
                        rows.append(line)
                        if (place, threads) == ("cpu", 1) or mode == "cudagraph":
                            figure = f"stacked_{seeds}_seeds_{name}_{width}_{place}"
                            span = (row["min"], row["max"])
                            bench.figure(figure, row["median"], interval=span, unit="x", note=line["device"])
    finally:
        torch.set_num_threads(before)
    caption = "Updates of single seeds per second, all seeds at once and one after another, interleaved."
    bench.table("stacked_seeds", rows, caption=caption)
