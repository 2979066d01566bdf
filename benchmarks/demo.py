# SPDX-License-Identifier: Apache-2.0
"""`robopost demo` over three seeds: success before and after fine-tuning, and its wall time.

Each seed collects its own demonstrations, clones a flow policy, fine-tunes it and evaluates both on the same 100 start
states. The gain is the mean of after minus before; the interval is the smallest and largest gain of a seed. Wall time
is the slowest seed's, after set-up, with two threads.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from robopost.bench import Bench
from robopost.config import DemoConfig
from robopost.demo import run_demo


def run(bench: Bench) -> None:
    config = bench.scale(
        smoke=DemoConfig(
            demonstrations=10, eval_episodes=10, video_episodes=0, clone_updates=50, finetune_steps=2200
        ),
        small=DemoConfig(),
        paper=DemoConfig(),
    )
    torch.set_num_threads(2)
    rows = []
    for seed in bench.scale(smoke=range(1), small=range(3), paper=range(10)):

        def measure(seed=seed):
            with tempfile.TemporaryDirectory() as folder:
                return run_demo(replace(config, out=str(Path(folder) / "demo"), seed=seed))

        params = {key: value for key, value in vars(config).items() if key not in ("out", "seed")}
        row = bench.cell(f"seed{seed}", measure, params=params, seed=seed)
        if not row:
            continue
        before, after = row["before"]["success"], row["after"]["success"]
        rows.append(
            {
                "seed": seed,
                "success before": before["value"],
                "before, 95 % low": before["low"],
                "before, 95 % high": before["high"],
                "success after": after["value"],
                "after, 95 % low": after["low"],
                "after, 95 % high": after["high"],
                "intervals apart": "yes" if row["intervals_apart"] else "no",
                "gain": row["gain"],
                "wall s": row["wall_seconds"],
            }
        )
    bench.table("demo", rows, caption="robopost demo, 100 evaluation episodes per seed, Wilson intervals.")
    gains = [row["gain"] for row in rows]
    apart = sum(row["intervals apart"] == "yes" for row in rows)
    bench.figure(
        "demo_success_gain",
        sum(gains) / len(gains) if gains else None,
        interval=(min(gains), max(gains)) if gains else None,
        unit="fraction",
        target=0.2,
        note=f"95 % intervals of before and after apart in {apart} of {len(rows)} seeds",
    )
    wall = [row["wall s"] for row in rows]
    bench.figure(
        "demo_wall_s",
        max(wall) if wall else None,
        interval=(min(wall), max(wall)) if wall else None,
        unit="s",
        target=360,
        better="lower",
        note="slowest seed, two threads, after set-up",
    )
