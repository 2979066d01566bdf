# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of one and the same cloned policy by each method, at equal environment steps and at equal time.

Tasks and base policies: see `base_policies`. A seed gives demonstrations, base policy and fine-tuning. ReinFlow,
PolicyFlow, FPO and ResFiT (which also gets the demonstrations) begin with the flow, DPPO with the diffusion policy of
the same demonstrations; Gaussian PPO and SAC learn from scratch. Settings: configs/recipe/<task>/<method>.yaml, and the
table `settings` for what this benchmark changes.

Every run gets the same number of environment steps, save that a last rollout is finished, and saves its policy along
the way. All saved policies are evaluated afterwards over the same start states, so that a run's seconds hold no
evaluation: they begin with the call of `train` and end with a save, on one thread. The time budget of a task is fixed
below, before the runs; a run that has used up its environment steps earlier counts with its last policy. Machines are
shared, so that the budget is in CPU seconds of one core; wall seconds stand beside them, and the plot shows both.

Success in the arms and Push-T, return in Hopper. Flow and diffusion policies are sampled, as they act while they learn
but without the exploration noise: in a trial on arm_pick_place samples of a flow rose from 52 to 70 % under ReinFlow
and its mode (a chain that starts at zero) fell from 30 to 22 %. Gaussian policies and ResFiT act in their mode; ResFiT
corrects its base policy's mode. Intervals of means over seeds are Student's t, for success never narrower than Wilson's
over all episodes.

One cell per task, method and seed, so that several processes can fill the table:

    robopost bench finetune --tier small --cells 'arm_push/reinflow/*'
"""

import functools
import json
import math
import shutil

import numpy as np
import torch
from sides.bases import CLASSES, DEMONSTRATIONS, QUIET, ROOT, TASKS, demos, score, train_base
from sides.clock import timed
from sides.curves import write_plot

from robopost.bench import Bench
from robopost.compose import compose
from robopost.evaluate.statistics import t_interval, wilson
from robopost.loops import train

SUITE = "generative"
RUNS = ROOT / "runs" / "finetune"
TUNED = ("reinflow", "dppo", "policyflow", "fpo")  # of the chain itself
BASE_OF = dict.fromkeys(TUNED, "flow") | {"dppo": "diffusion", "resfit": "flow"}
METHODS = (*BASE_OF, "ppo", "sac")
# Environment steps of every run, CPU seconds of the comparison at equal time, saved policies, episodes.
BUDGET = {
    "arm_push": (201_600, 60, 20, 100),
    "arm_pick_place": (200_000, 60, 20, 100),
    "pusht": (150_400, 90, 10, 100),
    "hopper": (200_000, 60, 10, 50),
}
# Off-policy methods take several copies of the environment and fewer updates per step than their recipes, ResFiT also
# the smaller critics of its arm recipes, or 200,000 steps would take hours.
OFF_POLICY = ["env.num_envs=8", "algo.updates_per_step=0.25"]
CHANGES = {(task, method): OFF_POLICY for task in BUDGET for method in ("resfit", "sac")}
CHANGES |= {
    (task, "resfit"): [*OFF_POLICY, "algo.batch_size=64", "algo.hidden=[96,96]"]
    for task in ("pusht", "hopper")
}
CHANGES["pusht", "resfit"] += ["data.reward_shift=-1"]  # as the other methods
TARGETS = {"reinflow": 0.1, "dppo": 0.1, "policyflow": 0.1, "fpo": 0.05}


def words_of(task, method, steps, points):
    """Overrides of a run, without what depends on its seed."""
    words = [f"recipe={task}/{method}", *TASKS[task].env[1:], *CHANGES.get((task, method), [])]
    every = max(1, steps // points)
    words += [f"loop.steps={steps}", f"loop.log_every={every}", f"loop.checkpoint_every={every}"]
    # Evaluated afterwards; the loop itself can't do without a last episode.
    return [*words, "loop.eval_every=0", "loop.eval_episodes=1", f"loop.keep_checkpoints={2 * points}"]


def start_words(task, method, seed, base, size):
    """What a run begins with: base policy and recorded data."""
    words = [f"policy.path={base}"] if method in TUNED else []
    words += [f"policy.base={base}"] if method == "resfit" else []
    # In Push-T data also brings the shift of the reward by -1 in the recipes: an episode ends in success, and a policy
    # that is paid for coverage would rather hover before it.
    if method == "resfit" or task == "pusht":
        words.append(f"data.path={demos(task, seed, size['demos'])}")
    return words


def measured(task, policy, episodes, sampled):
    """Success or return of each episode."""
    result = score(task, policy, episodes, sampled=sampled)
    values = result.returns if TASKS[task].metric == "return" else result.successes
    assert values is not None, f"{task} has a success predicate"
    return [float(value) for value in values]


def base_of(task, kind, seed, size):
    """Folder of a base policy."""
    return train_base(task, kind, "mlp", seed, updates=size["updates"], episodes=size["demos"])[0]


def base(task, seed, size):
    """Both base policies, each in its mode and sampled."""
    row = {}
    for kind in CLASSES:
        folder = base_of(task, kind, seed, size)
        for way, sampled in (("mode", False), ("sampled", True)):
            row[f"{kind}/{way}"] = measured(task, folder, size["episodes"], sampled)
    return row


def finetune(task, method, seed, size):
    """Train, then evaluate every saved policy."""
    start = base_of(task, BASE_OF[method], seed, size) if method in BASE_OF else None
    folder = RUNS / f"{task}-{method}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    words = [
        *words_of(task, method, size["steps"], size["points"]),
        *start_words(task, method, seed, start, size),
    ]
    config = compose([*words, *QUIET, f"seed={seed}", f"out={folder}", "track.also=[clock]"])
    with timed() as seconds:
        train(config)
    judge = functools.partial(measured, task, episodes=size["episodes"], sampled=method in TUNED)
    curve = []
    if start is not None:
        curve.append({"step": 0, "wall": 0.0, "cpu": 0.0, "values": judge(start)})
    saved = sorted((folder / "checkpoints").glob("step_*"))
    for checkpoint in saved:
        step = int(checkpoint.name.removeprefix("step_"))
        wall, cpu = seconds[step]
        curve.append({"step": step, "wall": wall, "cpu": cpu, "values": judge(checkpoint)})
    for checkpoint in saved[:-1]:
        shutil.rmtree(checkpoint)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spent = {part: sum(line.get(f"time/{part}", 0.0) for line in lines) for part in ("collect", "update")}
    return {"curve": curve, "wall": curve[-1]["wall"], "cpu": curve[-1]["cpu"], "wall_spent": spent}


def within(cell, key, limit):
    """Values of the last policy that was saved within `limit` steps or seconds; None before the first."""
    found = [entry["values"] for entry in cell["curve"] if entry[key] <= limit]
    return found[-1] if found else None


def last(cell):
    """Values of the last policy."""
    return cell["curve"][-1]["values"]


def interval(task, values):
    """(mean, low, high) over seeds of the mean over episodes, 95 %."""
    means = t_interval([float(np.mean(episodes)) for episodes in values])
    low, high = means.low, means.high
    if TASKS[task].metric == "success":
        pooled = wilson(int(np.sum(values)), int(np.size(values)))
        low, high = max(0.0, min(low, pooled.low)), min(1.0, max(high, pooled.high))
    return means.value, low, high


def text(task, values, seeds):
    """`interval` for a table; empty where a seed is missing."""
    values = [episodes for episodes in values if episodes is not None]
    if len(values) < len(seeds):
        return ""
    shown = interval(task, values)
    if TASKS[task].metric == "return":
        return "{:.0f} [{:.0f}, {:.0f}]".format(*shown)
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * value for value in shown))


def run(bench: Bench) -> None:
    bench.packages("gymnasium", "mujoco", "gym-pusht", "diffusers")
    torch.set_num_threads(1)
    tasks = bench.scale(smoke=("arm_push",), small=tuple(BUDGET), paper=tuple(BUDGET))
    seeds = range(bench.scale(smoke=1, small=3, paper=5))
    cells = {}
    # Seeds outermost: an interrupted table has every method before it has more seeds.
    for seed in seeds:
        for task in tasks:
            steps, _, points, episodes = BUDGET[task]
            size = {
                "steps": bench.scale(smoke=8000, small=steps, paper=10 * steps),
                "points": bench.scale(smoke=2, small=points, paper=points),
                "episodes": bench.scale(smoke=4, small=episodes, paper=2 * episodes),
                "updates": bench.scale(smoke=50, small=0, paper=0),  # of cloning, 0 = the recipe's
                "demos": bench.scale(smoke=10, small=DEMONSTRATIONS, paper=DEMONSTRATIONS),
            }
            for method in ("base", *METHODS):
                work = base if method == "base" else functools.partial(finetune, method=method)
                params = size | {"quality": TASKS[task].quality, "changes": CHANGES.get((task, method), [])}
                cells[task, method, seed] = bench.cell(
                    f"{task}/{method}/seed{seed}",
                    functools.partial(work, task=task, seed=seed, size=size),
                    params=params,
                    seed=seed,
                )
    report(bench, cells, tasks, seeds)


def report(bench, cells, tasks, seeds):
    """Tables, figures and plots."""
    for task in tasks:
        steps, budget, _, episodes = BUDGET[task]
        of = {
            method: [cells[task, method, seed] for seed in seeds if cells[task, method, seed]]
            for method in ("base", *METHODS)
        }
        rows = []
        for name in [f"{kind}/{way}" for kind in CLASSES for way in ("mode", "sampled")]:
            values = text(task, [cell[name] for cell in of["base"]], seeds)
            rows.append({"method": f"base, {name.replace('/', ', ')}", "at all steps": values})
        for method in METHODS:
            done = of[method]
            mean = lambda key: float(np.mean([cell[key] for cell in done])) if done else math.nan  # noqa: B023, E731
            rows.append(
                {
                    "method": method,
                    "at a tenth of the steps": text(
                        task, [within(cell, "step", steps / 10) for cell in done], seeds
                    ),
                    "at all steps": text(task, [last(cell) for cell in done], seeds),
                    f"within {budget} CPU s": text(
                        task, [within(cell, "cpu", budget) for cell in done], seeds
                    ),
                    "CPU s of all steps": mean("cpu"),
                    "wall s of all steps": mean("wall"),
                }
            )
        unit = "Return" if TASKS[task].metric == "return" else "Success"
        caption = (
            f"{unit} on {task}, {len(seeds)} seeds x {episodes} episodes, {steps:,} steps; 95 % intervals."
        )
        bench.table(task, rows, caption=caption)
        if bench.tier != "smoke" and any(of[method] for method in METHODS):
            write_plot(task, {method: of[method] for method in METHODS if of[method]}, TASKS[task].metric)
    rows = [
        {"method": method, "differs from its recipe": " ".join(words)} for method, words in CHANGES.items()
    ]
    bench.table(
        "settings", rows, caption="What this benchmark changes in recipes, beside steps and evaluations."
    )
    gains(bench, cells, seeds)


def widened(first, second):
    """(low, high) that holds both intervals: three seeds may agree by chance."""
    return min(first.low, second.low), max(first.high, second.high)


def gains(bench, cells, seeds):
    """Figures: success after minus before on the pushing arm, over the same start states."""
    task = "arm_push"
    for method, target in TARGETS.items():
        done = [cell for seed in seeds if (cell := cells[task, method, seed])]
        # (seeds, episodes): before and after begin in the same states.
        paired = np.array([np.subtract(last(cell), cell["curve"][0]["values"]) for cell in done])
        whole = len(done) == len(seeds)
        found = t_interval(paired.mean(1)) if whole else None
        before = float(np.mean([np.mean(cell["curve"][0]["values"]) for cell in done])) if whole else math.nan
        bench.figure(
            f"{method}_gain_{task}",
            found.value if found else None,
            interval=widened(found, t_interval(paired.ravel())) if found else None,
            unit="fraction",
            target=target,
            note=f"after {BUDGET[task][0]:,} environment steps, from {before:.2f}; {len(seeds)} seeds x "
            f"{BUDGET[task][3]} episodes, 95 % t interval over seeds, at least that over episodes",
        )
