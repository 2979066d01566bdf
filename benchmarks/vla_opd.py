# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation of a small VLA on arm_language, beside SFT, GRPO and other divergences at equal rollouts.

The policy is `token_vla` in OpenVLA-OFT's layout: 96-pixel images, instruction and the arm's own state, 1.3M
parameters, chunks of 5 actions as 256-bin tokens. It begins with a backbone that knows what cubes and zones look like
and where they are, not how to move (`sides/vla_backbone.py`).

Old tasks: touch and lift a cube (6 instructions). New task: put a cube into a zone (8 instructions). The student is
cloned from demonstrations of the old tasks, then for a while from as many of all tasks; a seed gives demonstrations,
student and rollouts. The teacher is cloned from many demonstrations of both. Then every method gets the same number of
episodes of the new task, from the same student: distillation and GRPO play them themselves, SFT gets episodes of the
teacher. Success counts greedy episodes from the same start states for every policy; forgetting is the drop of success
on the old tasks. Intervals are Student's t over seeds.

Learning rates of all methods come from one sweep (cells `sweep/*`), on a student of a seed of its own and a quarter of
the episodes; each method takes its best.

    robopost bench vla_opd --tier small --cells 'exact/*'
"""

import functools
import math
import shutil

import numpy as np
import torch
from sides.bases import QUIET
from sides.vla_tasks import ENV, RUNS, backbone, clone, demos, figure, score, shown

from robopost.bench import Bench
from robopost.compose import compose
from robopost.loops import train

SUITE = "vla"
OLD = ["env.split=train", "env.only=[touch,lift]"]
NEW = ["env.split=train", "env.only=[put]"]
BOTH = ["env.split=train"]
INSTRUCTIONS = {"old": 6, "new": 8}
ROLLOUT = 32  # episodes per update
COMMON = ["policy=pretrained", f"env.num_envs={ROLLOUT}", "algo.episodes=1", "algo.batch_size=128"]
METHODS = {
    "exact": ["algo=vla_opd", "algo.group=1"],
    "sampled": ["algo=vla_opd", "algo.group=1", "algo.kl_estimator=sample"],
    "forward": ["algo=vla_opd", "algo.group=1", "algo.divergence=forward"],
    "hard_ce": ["algo=vla_opd", "algo.group=1", "algo.divergence=hard_ce"],
    "exact+grpo": ["algo=vla_opd", "algo.group=8", "algo.lambda_outcome=1.0"],
    "grpo": ["algo=grpo", "algo.group=8", "env.reward=sparse"],
    "sft": ["algo=bc"],
}
RATES = (3e-5, 1e-4, 3e-4, 1e-3)  # that every method tries in the sweep
SWEEP_SEED = 50


POINTS = (0.25, 0.5, 1.0)  # shares of the episodes after which policies are saved and judged


def student(seed, size):
    """A policy that knows the old tasks and something of the new one."""
    start, _ = backbone(*size["backbone"])
    old = demos("old", OLD, size["old_demos"], seed)
    first = clone("old", start, old, size["old_updates"], seed)
    few = demos("few", BOTH, size["few_demos"], seed)
    return clone("student", first, few, size["few_updates"], seed)


def teacher(size):
    """A policy that knows all tasks well."""
    start, _ = backbone(*size["backbone"])
    data = demos("teacher", BOTH, size["teacher_demos"], 80)
    return clone("teacher", start, data, size["teacher_updates"], 80)


def played(size, seed):
    """Successful episodes of the teacher in the new task, as many as the others get rollouts."""
    expert = teacher(size)
    words = [*NEW, f"policy={expert}", "deterministic=true"]
    return demos(f"played-{expert.name}", words, size["episodes"], seed, quality=None)


def judged(policy, size):
    """Success of every greedy episode, on the new task and on the old ones."""
    return {
        name: score(policy, words, size["trials"] * INSTRUCTIONS[name])
        for name, words in (("new", NEW), ("old", OLD))
    }


def tuned(method, seed, size, rate, share=1.0):
    """Saved policies of a run: {share of the episodes: folder}."""
    start = student(seed, size)
    episodes = max(1, round(share * size["episodes"] / ROLLOUT)) * ROLLOUT
    name = f"{method}-{rate:g}-{seed}-{episodes}"
    if method == "sft":
        points = {}
        for point in POINTS:
            count = round(point * episodes)
            updates = max(1, round(size["sft_updates"] * share * point))
            run = clone(
                f"{name}-{count}",
                start,
                played(size, seed),
                updates,
                seed,
                f"data.episodes={count}",
                f"algo.lr={rate}",
            )
            points[point] = run
        return points
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    every = max(ROLLOUT, round(POINTS[0] * episodes))
    words = [
        *METHODS[method],
        *COMMON,
        *ENV,
        *NEW,
        f"policy.path={start}",
        f"algo.lr={rate}",
        f"loop.steps={episodes}",
        f"loop.log_every={ROLLOUT}",
        f"loop.checkpoint_every={every}",
        "loop.keep_checkpoints=20",
        "loop.eval_episodes=1",
        f"seed={seed}",
        f"out={folder}",
    ]
    if METHODS[method][0] == "algo=vla_opd":
        words += [f"algo.teacher={teacher(size)}", "algo.check_teacher=0"]  # its success is a cell of its own
    train(compose([*words, *QUIET]))
    saved = {int(path.name.removeprefix("step_")): path for path in (folder / "checkpoints").glob("step_*")}
    return {point: saved[min(saved, key=lambda step: abs(step - point * episodes))] for point in POINTS}


def sweep(method, rate, size):
    """Success on the new task at a quarter of the episodes, for one learning rate."""
    policy = tuned(method, SWEEP_SEED, size, rate, share=0.25)[1.0]
    return {"new": score(policy, NEW, 12 * INSTRUCTIONS["new"])}


def method_cell(method, seed, size, rate):
    """Train, then judge the last policy on everything and the ones before on the new task."""
    policies = tuned(method, seed, size, rate)
    curve = {
        str(point): score(policies[point], NEW, size["trials"] * INSTRUCTIONS["new"]) for point in POINTS[:-1]
    }
    return judged(policies[1.0], size) | {"curve": curve}


def best_rate(cells, method):
    """The learning rate whose sweep did best; NaN while some are missing."""
    found = {rate: np.mean(cell["new"]) for rate in RATES if (cell := cells["sweep", method, rate])}
    return max(found, key=found.__getitem__) if len(found) == len(RATES) else math.nan


def run(bench: Bench) -> None:
    bench.packages("transformers", "mujoco")
    torch.set_num_threads(1)
    size = {
        "backbone": bench.scale(smoke=(5, 5, 100), small=(1500, 3500, 1500), paper=(3000, 10_000, 5000)),
        "old_demos": bench.scale(smoke=10, small=400, paper=2000),
        "old_updates": bench.scale(smoke=3, small=800, paper=4000),
        "few_demos": bench.scale(smoke=10, small=400, paper=400),
        "few_updates": bench.scale(smoke=3, small=1200, paper=1200),
        "teacher_demos": bench.scale(smoke=10, small=1500, paper=10_000),
        "teacher_updates": bench.scale(smoke=3, small=2500, paper=10_000),
        "episodes": bench.scale(smoke=64, small=768, paper=6144),
        "sft_updates": bench.scale(smoke=4, small=600, paper=5000),
        "trials": bench.scale(smoke=1, small=50, paper=50),
    }
    seeds = range(bench.scale(smoke=1, small=3, paper=5))
    cells = {}

    def cell(key, fn, of, **params):
        name = "/".join(f"seed{part}" if isinstance(part, int) else f"{part}" for part in key)
        work = functools.partial(fn, size=size, **params)
        cells[key] = bench.cell(name, work, params={"size": size, **params}, seed=of)

    cell(("backbone",), lambda size: backbone(*size["backbone"])[1], 0)
    cell(("teacher",), lambda size: judged(teacher(size), size), 0)
    for method in METHODS:
        for rate in RATES:
            cell(("sweep", method, rate), sweep, SWEEP_SEED, method=method, rate=rate)
    for seed in seeds:
        cell(("student", seed), lambda seed, size: judged(student(seed, size), size), seed, seed=seed)
        for method in METHODS:
            rate = best_rate(cells, method)
            if rate == rate:
                cell((method, seed), method_cell, seed, method=method, seed=seed, rate=rate)
    report(bench, cells, list(seeds))


def means(cells, seeds, method, key):
    """Success per seed of what has been measured."""
    found = [cells.get((method, seed)) for seed in seeds]
    return [float(np.mean(cell[key])) for cell in found if cell]


def report(bench, cells, seeds):
    """Tables, figures and the plot."""
    new, old = ({m: means(cells, seeds, m, key) for m in ("student", *METHODS)} for key in ("new", "old"))
    expert = cells["teacher",]
    rows = [
        {
            "method": "teacher",
            "new task": (expert and shown([np.mean(expert["new"])], [0])) or "",
            "old tasks": (expert and shown([np.mean(expert["old"])], [0])) or "",
        }
    ]
    for method in ("student", *METHODS):
        row = {"method": method}
        for point in POINTS[:-1]:
            curves = [cells.get((method, seed)) for seed in seeds]
            values = [float(np.mean(c["curve"][str(point)])) for c in curves if c and "curve" in c]
            row[f"at {point:.0%} of the episodes"] = shown(values, seeds)
        row |= {"new task": shown(new[method], seeds), "old tasks": shown(old[method], seeds)}
        if method != "student":
            dropped = [a - b for a, b in zip(old["student"], old[method], strict=False)]
            row["forgotten"] = f"{100 * np.mean(dropped):.1f} points" if len(dropped) == len(seeds) else ""
            row["learning rate"] = best_rate(cells, method)
        rows.append(row)
    bench.table(
        "success", rows, caption="Greedy success, 50 episodes per instruction; 95 % intervals over seeds."
    )
    bench.table(
        "sweep",
        [
            {"method": method}
            | {
                f"{rate:g}": float(np.mean(cell["new"]))
                if (cell := cells["sweep", method, rate])
                else math.nan
                for rate in RATES
            }
            for method in METHODS
        ],
        caption="Success on the new task after a quarter of the episodes, by learning rate (a seed of its own).",
    )

    top = float(np.mean(expert["new"])) if expert else math.nan
    less = lambda a, b: [x - y for x, y in zip(a, b, strict=False)]  # noqa: E731
    figure(
        bench,
        "opd_share_of_teacher_success",
        [value / top for value in new["exact"]],
        seeds,
        0.9,
        "exact reverse KL",
    )
    figure(
        bench,
        "opd_success_minus_grpo_equal_rollouts",
        less(new["exact"], new["grpo"]),
        seeds,
        0.1,
        "success on the new task",
    )
    figure(
        bench,
        "opd_forgetting_minus_sft",
        less(old["sft"], old["exact"]),
        seeds,
        -0.05,
        "drop on the old tasks, distillation's minus that of SFT on as many episodes of the teacher",
        better="lower",
    )
    figure(
        bench,
        "opd_exact_minus_sampled",
        less(new["exact"], new["sampled"]),
        seeds,
        0.0,
        "success on the new task",
    )
