# SPDX-License-Identifier: Apache-2.0
"""RETAIN on a small VLA: pretrained, fine-tuned and merged on old tasks, the new task and its variations.

Policy and backbone are those of `vla_opd`. Pretrained on touching cubes and putting the green one into zones (7
instructions), fine-tuned on 40 demonstrations of a new skill, putting the red cube into zones (4 instructions), in
which cubes lie in the near half of the table and zones in the near half of theirs. Its variation: cubes and zones in
the far halves, which no demonstration of the new skill shows. Merged: (1 - alpha) pretrained + alpha fine-tuned
(RETAIN, arXiv 2512.08333) by `robopost merge`.

alpha is chosen on the variation over start states of its own (`validation`); everything that is reported was measured
on others. Modules: the language model pulled back alone (projector and action head fine-tuned), and the action head
alone. Continual: lifting, the red and then the blue cube into zones are learnt one after another, each from the last
merged policy with the alpha chosen for the first; beside it the same without merging. Intervals are Student's t over
seeds.

    robopost bench vla_retain --tier small --cells 'merge/*'
"""

import functools

import numpy as np
import torch
from sides.vla_tasks import FOLDER, backbone, clone, demos, figure, score, shown

from robopost.bench import Bench
from robopost.merging.config import MergeConfig
from robopost.merging.merge import merge

SUITE = "vla"
ALL = ["env.split=all"]
OLD = [*ALL, "env.only=[touch,put the green]"]
NEAR = ["env.object_range=[0.34,0.40,-0.20,0.20]", "env.goal_range=[0.54,0.57,-0.26,0.26]"]
FAR = ["env.object_range=[0.40,0.46,-0.20,0.20]", "env.goal_range=[0.57,0.60,-0.26,0.26]"]
RED = [*ALL, "env.only=[put the red]"]
TASKS = {"old": OLD, "new": [*RED, *NEAR], "variation": [*RED, *FAR]}
INSTRUCTIONS = {"old": 7, "new": 4, "variation": 4}
ALPHAS = (0.25, 0.5, 0.75, 0.9)
MODULES = {
    "language pulled back": lambda alpha: {"vision": 1.0, "language": alpha, "action": 1.0},
    "action head pulled back": lambda alpha: {"vision": 1.0, "language": 1.0, "action": alpha},
}
SKILLS = {"lift": [*ALL, "env.only=[lift]"], "red": RED, "blue": [*ALL, "env.only=[put the blue]"]}
VALIDATION = 500_000  # added to the seeds of start states


def pretrained(seed, size):
    """A policy that knows the old tasks."""
    data = demos("retain-old", OLD, size["old_demos"], seed)
    return clone("retain-old", backbone(*size["backbone"])[0], data, size["old_updates"], seed)


def finetuned(seed, size):
    """It after cloning the new skill, which was shown in a part of the workspace."""
    data = demos("retain-new", TASKS["new"], size["new_demos"], seed)
    return clone("retain-new", pretrained(seed, size), data, size["new_updates"], seed)


def merged(base, tuned, name, alpha, modules=None):
    """Folder of a merged policy."""
    out = FOLDER / "merged" / name
    merge(
        MergeConfig(
            base=str(base),
            finetuned=[str(tuned)],
            alpha=[] if modules else [alpha],
            modules=modules or {},
            out=str(out),
            overwrite=True,
        )
    )
    return out


def judged(policy, size, tasks=TASKS, offset=0):
    """Success of every greedy episode per task."""
    return {
        name: score(
            policy, words, size["trials"] * INSTRUCTIONS.get(name, 3 if name == "lift" else 4), offset
        )
        for name, words in tasks.items()
    }


def parents(seed, size):
    """Both parents on all tasks."""
    return {
        "pretrained": judged(pretrained(seed, size), size),
        "finetuned": judged(finetuned(seed, size), size),
    }


def merge_cell(seed, alpha, size, modules=None):
    """A merged policy: validation on the variation, test on everything."""
    coefficients = MODULES[modules](alpha) if modules else None
    name = f"{(modules or 'all').replace(' ', '-')}-{alpha:g}-{seed}"
    policy = merged(pretrained(seed, size), finetuned(seed, size), name, alpha, coefficients)
    validation = judged(policy, size, {"variation": TASKS["variation"]}, VALIDATION)
    return judged(policy, size) | {"validation": validation["variation"]}


def continual(seed, size, alpha):
    """Skills one after another, merged after each (alpha < 1) or not (alpha 1); old tasks and all skills at the end."""
    current = pretrained(seed, size)
    stages = []
    for number, (skill, words) in enumerate(SKILLS.items()):
        data = demos(f"retain-{skill}", words, size["new_demos"], seed)
        tuned = clone(f"retain-chain-{alpha:g}-{skill}", current, data, size["new_updates"], seed)
        current = tuned if alpha == 1 else merged(current, tuned, f"chain-{number}-{seed}", alpha)
        stages.append(
            {task: float(np.mean(values)) for task, values in judged(current, size, {"old": OLD}).items()}
        )
    return {"stages": stages} | judged(current, size, {"old": OLD, **SKILLS})


def run(bench: Bench) -> None:
    bench.packages("transformers", "mujoco")
    torch.set_num_threads(1)
    size = {
        "backbone": bench.scale(smoke=(5, 5, 100), small=(1500, 3500, 1500), paper=(3000, 10_000, 5000)),
        "old_demos": bench.scale(smoke=10, small=600, paper=3000),
        "old_updates": bench.scale(smoke=3, small=1200, paper=5000),
        "new_demos": bench.scale(smoke=10, small=40, paper=40),
        "new_updates": bench.scale(smoke=3, small=300, paper=300),
        "trials": bench.scale(smoke=1, small=50, paper=50),
    }
    seeds = list(range(bench.scale(smoke=1, small=3, paper=5)))
    alphas = bench.scale(smoke=ALPHAS[2:3], small=ALPHAS, paper=ALPHAS)
    cells = {}

    def cell(key, fn, seed, **params):
        params |= {"seed": seed}
        cells[key, seed] = bench.cell(
            f"{key}/seed{seed}",
            functools.partial(fn, size=size, **params),
            params={"size": size, **params},
            seed=seed,
        )

    for seed in seeds:
        cell("parents", parents, seed)
        for alpha in alphas:
            cell(f"merge/all/{alpha:g}", merge_cell, seed, alpha=alpha)
        for modules in MODULES:
            for alpha in alphas:
                cell(f"merge/{modules}/{alpha:g}", merge_cell, seed, alpha=alpha, modules=modules)
    chosen = best_alpha(cells, "all", alphas, seeds)
    for seed in seeds:
        if chosen is not None:
            cell("continual/merged", continual, seed, alpha=chosen)
        cell("continual/plain", continual, seed, alpha=1.0)
    report(bench, cells, alphas, seeds, chosen)


def best_alpha(cells, modules, alphas, seeds):
    """The alpha with the highest success on the validation states, over all seeds; None while some are missing."""
    found = {}
    for alpha in alphas:
        done = [cell for seed in seeds if (cell := cells[f"merge/{modules}/{alpha:g}", seed])]
        if len(done) < len(seeds):
            return None
        found[alpha] = np.mean([np.mean(cell["validation"]) for cell in done])
    return max(found, key=found.__getitem__)


def report(bench, cells, alphas, seeds, chosen):
    """Tables and figures."""

    def values(key, *path):
        out = []
        for seed in seeds:
            found = cells.get((key, seed))
            for part in path:
                found = found[part] if found else None
            if found:
                out.append(float(np.mean(found)))
        return out

    lines = {"pretrained": ("parents", "pretrained"), "fine-tuned": ("parents", "finetuned")}
    lines |= {f"merged, alpha {alpha:g}": (f"merge/all/{alpha:g}",) for alpha in alphas}
    lines |= {f"{name}, {alpha:g}": (f"merge/{name}/{alpha:g}",) for name in MODULES for alpha in alphas}
    rows = [
        {"policy": name} | {f"{task}": shown(values(*path, task), seeds) for task in TASKS}
        for name, path in lines.items()
    ]
    bench.table(
        "retain",
        rows,
        caption="Greedy success on old tasks, the new skill where it was shown, and its variation; 50 episodes per "
        "instruction, 95 % intervals over seeds."
        + (f" Chosen on validation states: alpha {chosen:g}." if chosen is not None else ""),
    )
    rows = [
        {"method": name} | {task: shown(values(f"continual/{key}", task), seeds) for task in ("old", *SKILLS)}
        for name, key in (("merged after each skill", "merged"), ("fine-tuned on", "plain"))
    ]
    bench.table("continual", rows, caption="After three skills learnt one after another: success on each.")

    key = f"merge/all/{chosen:g}" if chosen is not None else ""
    best = [
        max(pair)
        for pair in zip(
            values("parents", "pretrained", "variation"),
            values("parents", "finetuned", "variation"),
            strict=True,
        )
    ]
    figure(
        bench,
        "merge_variation_minus_best_parent",
        [a - b for a, b in zip(values(key, "variation"), best, strict=False)],
        seeds,
        0.0,
        f"alpha {chosen}, success on the variation minus the better parent's",
    )
    figure(
        bench,
        "merge_old_skill_retained",
        [a / b for a, b in zip(values(key, "old"), values("parents", "pretrained", "old"), strict=False)],
        seeds,
        0.95,
        f"alpha {chosen}, merged / pretrained success on old tasks",
    )
