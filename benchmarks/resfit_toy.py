# SPDX-License-Identifier: Apache-2.0
"""ResFiT on a point that has to reach a goal: success by environment steps, with two controls.

The base policy (chunks of 10, executed without looking, a constant bias) solves about one episode in twenty. Three
seeds of the paper's design (10 LayerNorm heads of 2 x 128, 3-step returns, four critic updates and one of the actor per
step, half of each batch from 50 demonstrations, correction up to 0.5), then seed 0 without demonstrations and with a
correction of at most 0.1, which cannot cancel the bias of 0.25. Success is over 100 episodes from the same start
states.
"""

import torch
from sides.point_reach import learn

from robopost.bench import Bench

SUITE = "generative"
VARIANTS = {"resfit": {}, "no demonstrations": {"demo_fraction": 0.0}, "scale 0.1": {"scale": 0.1}}


def run(bench: Bench) -> None:
    """One cell per variant and seed."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    steps = bench.scale(smoke=400, small=2000, paper=2000)
    seeds = bench.scale(smoke=1, small=3, paper=10)
    rows, ends = [], {name: [] for name in VARIANTS}
    for name, options in VARIANTS.items():
        for seed in range(seeds if name == "resfit" else 1):

            def cell(options=options, seed=seed):
                curve = learn(seed, steps, every=steps // 4, **options)
                return {"steps": list(curve)[1:], "success": list(curve.values())[1:], "base": curve["base"]}

            params = {"steps": steps, "options": options}
            row = bench.cell(f"{name}/seed{seed}", cell, params=params, seed=seed)
            if row:
                at = {
                    f"after {step}": value for step, value in zip(row["steps"], row["success"], strict=True)
                }
                rows.append({"variant": name, "seed": seed, "base": row["base"], **at})
                ends[name].append(row["success"][-1])
    bench.table("success", rows, caption="Share of 100 episodes solved, after environment steps.")
    low = lambda values, pick: pick(values) if values else None  # noqa: E731
    bench.figure(
        "resfit_toy_success",
        low(ends["resfit"], min),
        interval=(min(ends["resfit"]), max(ends["resfit"])) if ends["resfit"] else None,
        unit="fraction",
        target=0.75,
        note=f"worst of {len(ends['resfit'])} seeds after {steps} environment steps",
    )
    controls = [*ends["no demonstrations"], *ends["scale 0.1"]]
    bench.figure(
        "resfit_toy_controls_success",
        low(controls, max),
        unit="fraction",
        target=0.25,
        better="lower",
        note="the better of: no demonstrations, correction of at most 0.1",
    )
