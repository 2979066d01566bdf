# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation on a point that reaches its goal: estimators and divergences at equal episodes.

Observations are 28 x 28 images (smoke: states), a chunk is 8 tokens of 256 bins. Two policies: a convolutional encoder
with an MLP (0.36M parameters), and a vision-language model (SigLIP and Llama classes, 0.22M, all slots in one pass;
cells `vla/*`, where robopost has `token_vla`). A teacher is cloned from 600 episodes of a controller, one student per
seed from 30. Every method starts from the same student and plays 32 episodes per iteration, in two minibatches (AdamW,
5e-4): exact and sampled reverse KL, the sampled one with its control variate, forward KL, hard cross-entropy, and GRPO
in groups of 8. Success is over 100 greedy episodes from the same starts. The task has one mode and hardly any noise: no
ranking of divergences is to be expected from it.
"""

import tempfile
from functools import cache
from pathlib import Path

import torch
from sides.token_reach import build, clone, demonstrations, iterate, save, success

from robopost.algos.vla.grpo import GRPO, GRPOConfig
from robopost.algos.vla.opd import VLAOPD, VLAOPDConfig
from robopost.bench import Bench
from robopost.policies.pretrained import load_pretrained
from robopost.policies.tokens import TokenMLPConfig
from robopost.registry import POLICIES

SUITE = "vla"
HORIZON = 4
VARIANTS = {
    "exact": {},
    "sampled": {"kl_estimator": "sample"},
    "control_variate": {"kl_estimator": "sample", "control_variate": True},
    "forward": {"divergence": "forward"},
    "hard_ce": {"divergence": "hard_ce"},
    "grpo": {},
}


def policy_config(kind):
    """The policy that learns: `conv` (an MLP on states) or `vla`."""
    if kind == "conv":
        return TokenMLPConfig(horizon=HORIZON, hidden=[128, 128])
    from robopost.nets.vla.language import LanguageConfig
    from robopost.nets.vla.towers import TowerConfig
    from robopost.policies.token_vla import TokenVLAConfig

    sizes = {"width": 64, "layers": 2, "heads": 2, "mlp": 128}
    tower, language = TowerConfig(patch=7, **sizes), LanguageConfig(**sizes)
    return TokenVLAConfig(horizon=HORIZON, siglip=tower, language=language, image_shift=0)


def cloned(kind, keys, episodes, noise, updates, seed):
    """A policy cloned from the controller."""
    demos = demonstrations(episodes, HORIZON, keys, seed, noise=noise)
    return clone(policy_config(kind), demos, updates, seed)


def curve(name, keys, iterations, seed, teacher, student):
    """Success by iteration, greedy and of the episodes played, and seconds per iteration by kind of work."""
    policy = load_pretrained(student)
    options = {"lr": 5e-4, "batch_size": 100}
    if name == "grpo":
        algo = build(GRPO, GRPOConfig(group=8, **options), policy, seed)
    else:
        algo = build(VLAOPD, VLAOPDConfig(teacher=teacher, **options, **VARIANTS[name]), policy, seed)
    every = max(1, iterations // 6)
    at, greedy, played, seconds = [0], [success(policy, keys)], [], []
    for number, batch, spent in iterate(algo, keys, iterations, seed):
        played.append(float(batch.extra["success"][0].mean()))
        seconds.append(spent)
        if number % every == 0:
            at.append(number)
            greedy.append(success(policy, keys))
    mean = torch.tensor(seconds).mean(0).tolist()
    found = {"iteration": at, "greedy": greedy, "played": played}
    return found | dict(zip(("collect_s", "teacher_s", "learn_s"), mean, strict=True))


def run(bench: Bench) -> None:
    """One cell per method and seed."""
    torch.set_num_threads(1)
    keys = bench.scale(smoke=["state"], small=["image"], paper=["image"])
    iterations = bench.scale(smoke=6, small=60, paper=240)
    seeds = range(bench.scale(smoke=1, small=3, paper=3))
    teaching = bench.scale(smoke=150, small=1500, paper=1500)
    kinds = ["conv", *(["vla"] if "token_vla" in POLICIES and keys == ["image"] else [])]
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def teacher(kind):
            return save(cloned(kind, keys, 600, 0.5, teaching, 1), Path(folder) / f"teacher_{kind}")

        @cache
        def student(kind, seed):
            policy = cloned(kind, keys, 30, 0.0, 200, 100 + seed)
            return save(policy, Path(folder) / f"student_{kind}{seed}")

        for kind in kinds:
            place = "" if kind == "conv" else f"{kind}/"
            found: dict[str, list] = {name: [] for name in VARIANTS}
            for name in VARIANTS:
                for seed in seeds:

                    def cell(kind=kind, name=name, seed=seed):
                        return curve(name, keys, iterations, seed, teacher(kind), student(kind, seed))

                    params = {"keys": keys, "iterations": iterations, "teaching": teaching}
                    row = bench.cell(f"{place}{name}/seed{seed}", cell, params=params, seed=seed)
                    if row:
                        found[name].append(row)

            def taught(kind=kind):
                return {"success": success(load_pretrained(teacher(kind)), keys)}

            row = bench.cell(f"{place}teacher", taught, params={"updates": teaching})
            report(bench, kind, found, row["success"], iterations)


def report(bench, kind, found, teacher, iterations):
    """Tables and figures of one policy."""
    mean = lambda values: sum(values) / len(values) if values else float("nan")  # noqa: E731
    ends = {name: [row["greedy"][-1] for row in rows] for name, rows in found.items()}
    starts = [row["greedy"][0] for row in found["exact"]]
    table = []
    for name, rows in found.items():
        if not rows:
            continue
        at = rows[0]["iteration"]
        by = {f"after {n}": mean([row["greedy"][i] for row in rows]) for i, n in enumerate(at)}
        last = mean([mean(row["played"][-10:]) for row in rows])
        table.append({"method": name, "seeds": len(rows), **by, "last 10, sampled": last})
    caption = f"Policy {kind}: greedy success after iterations of 32 episodes, mean over seeds"
    caption += f"; its teacher {teacher:.2f}."
    bench.table(f"success_{kind}", table, caption=caption)

    def figure(name, values, note, target=None):
        bounds = (min(values), max(values)) if values else None
        name = name if kind == "conv" else name.replace("opd_toy", f"opd_toy_{kind}")
        bench.figure(name, mean(values), interval=bounds, unit="fraction", target=target, note=note)

    note = f"greedy success after {iterations} iterations, min to max over seeds"
    figure("opd_toy_exact", ends["exact"], f"{note}; students begin at {mean(starts):.2f}", target=0.3)
    for other in ("sampled", "grpo"):
        pairs = [a - b for a, b in zip(ends["exact"], ends[other], strict=False)]
        figure(f"opd_toy_exact_minus_{other}", pairs, f"{note}, seed by seed", target=0.0)
    played = [
        mean(a["played"][-10:]) - mean(b["played"][-10:])
        for a, b in zip(found["exact"], found["sampled"], strict=False)
    ]
    figure(
        "opd_toy_exact_minus_sampled_played",
        played,
        "success of the last 10 iterations' episodes",
        target=0.0,
    )
