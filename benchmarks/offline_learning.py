# SPDX-License-Identifier: Apache-2.0
"""Normalised scores of offline algorithms on suite mujoco_v5, and of IQL and FamO2O after an online phase.

Sets: hopper and walker2d x medium, medium-replay, medium-expert, recorded by `robopost collect
suite=mujoco_v5` (docs/suite.md). Every algorithm gets the same number of updates and batches of 256; the score
is that of the last policy, deterministic, over 30 episodes from seeds that no data was recorded with. IQL and
FamO2O then go on for 50k environment steps, one update per step, batches drawn uniformly over recorded and new
experience, on the medium-replay sets.

Networks and settings are each paper's: see the table `settings`. Known departures at the small tier: 10k
updates instead of 1M; with so few, targets that move by 0.005 per update don't reach the values they are after
(one time constant is 1 / (0.005 (1 - gamma)) = 20k updates), so that tau is 0.02 for every algorithm; ReBRAC
learns in batches of 256 instead of 1024. halfcheetah joins in the paper tier: PRDC and A2PR are published with
alpha=40 there, sixteen times TD3+BC's, which needs a critic that has converged (in a trial of 10k updates on
halfcheetah-medium-replay TD3+BC itself scored 4 points with it and 33 without); at equal alpha the comparison
is of the regularisers alone.

Table `longer` says what five times the updates with the published tau change, on one set with one seed.

One cell per set, algorithm and seed, so that the table can be filled over several sittings and by several
processes:

    robopost collect suite=mujoco_v5
    robopost bench offline_learning --tier small --cells '*/td3_bc/*'

Runs stay in runs/offline_learning/: the online cells go on from them.
"""

import json
import math
import shutil
import time
from dataclasses import replace

import numpy as np
from sides.settings import IQL_POLICY, reward_scale

from robopost.bench import Bench, find_checkout
from robopost.compose import compose
from robopost.data.convert import describe
from robopost.errors import ConfigError
from robopost.loops import train
from robopost.suite import load_set

SUITE = "offline"
DATA = find_checkout() / "data" / "mujoco_v5"
RUNS = find_checkout() / "runs" / "offline_learning"
TASKS = ("hopper", "walker2d")
KINDS = ("medium", "medium-replay", "medium-expert")
ONLINE_KINDS = ("medium-replay",)
SETTINGS = {
    "bc": (["algo=bc", "policy=deterministic"], "256-256"),
    "td3_bc": (["algo=td3_bc"], "256-256"),
    "iql": (["algo=iql", *IQL_POLICY], "256-256"),
    "rebrac": (["recipe=rebrac/{set}", "algo.batch_size=256"], "256-256-256, LayerNorm in critics"),
    "prdc": (["algo=prdc"], "256-256"),
    "a2pr": (["recipe=a2pr/{set}"], "actor 256x3, critics and V 256x4, VAE 750-750"),
    "famo2o_iql": (
        [
            "algo=famo2o_iql",
            "algo.balance_every=5",
            "policy.coefficient_low=1",
            "policy.coefficient_high=5",
            "policy.normalise_obs=identity",
        ],
        "256-256, balance model 256-256",
    ),
}
# Weights that the papers tune per task and that no recipe holds.
PER_TASK = {
    ("prdc", "halfcheetah"): ["algo.alpha=40"],
}
SCALED = ("iql", "famo2o_iql")  # rewards times 1000 / (largest - smallest return of an episode)
ONLINE = ("iql", "famo2o_iql")
# Whether a difference at the small tier is one of few updates and fast targets: five times the updates and the
# published tau, one seed.
LONG = ("td3_bc", "prdc", "a2pr")
LONG_TAU = 0.005


def words_of(name, algo, tau):
    """Overrides of one algorithm on one set, without what every run shares."""
    task = name.split("-")[0]
    words = [word.format(set=name) for word in SETTINGS[algo][0]]
    return [
        *words,
        *PER_TASK.get((algo, task), []),
        *([] if algo == "bc" else [f"algo.tau={tau}"]),
        f"env={task}",
    ]


def config_of(name, algo, seed, updates, episodes, tau, evaluations=1):
    """The run of one cell."""
    words = words_of(name, algo, tau)
    store = DATA / f"{name}.zarr"
    if not store.exists():
        raise ConfigError(f"{store} is absent. Fix: robopost collect suite=mujoco_v5/{name}")
    if algo in SCALED:
        returns = describe(store)["return"]
        words.append(f"data.reward_scale={reward_scale((returns['min'], returns['max'])):.6g}")
    words += [
        f"data.path={store}",
        f"seed={seed}",
        f"loop.steps={updates}",
        f"out={folder_of(name, algo, seed)}",
        f"loop.eval_every={updates // evaluations if evaluations > 1 else 0}",
    ]
    words += [
        "loop.checkpoint_every=0",
        f"loop.eval_episodes={episodes}",
        f"loop.log_every={max(1, updates // 5)}",
        "accel.threads=1",
    ]
    return compose([*words, "device=cpu", "track.tensorboard=false", "track.console=false"])


def folder_of(name, algo, seed):
    """Run folder of the offline phase."""
    return RUNS / f"{name}-{algo}-seed{seed}"


def offline(name, algo, seed, updates, episodes, tau):
    """Train on a set and score the last policy."""
    config = config_of(name, algo, seed, updates, episodes, tau)
    shutil.rmtree(config.out, ignore_errors=True)
    began = time.perf_counter()
    train(config)
    return outcome(folder_of(name, algo, seed), updates, time.perf_counter() - began)


def online(name, algo, seed, updates, episodes, tau, steps):
    """Go on from the offline cell's run for `steps` environment steps and score the last policy."""
    source = folder_of(name, algo, seed)
    if not (source / "eval" / f"step_{updates:09d}.json").exists():
        offline(name, algo, seed, updates, episodes, tau)
    folder = source.with_name(f"{source.name}-online")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    config = config_of(name, algo, seed, updates, episodes, tau)
    loop = replace(config.loop, online_steps=steps, online_sampling="uniform", log_every=max(1, steps // 5))
    began = time.perf_counter()
    train(replace(config, loop=loop, out=str(folder), resume=str(folder)))
    return outcome(folder, updates + steps, time.perf_counter() - began)


def longer(name, algo, updates, episodes):
    """Scores along a longer run with the published tau."""
    config = config_of(name, algo, 0, updates, episodes, LONG_TAU, evaluations=5)
    folder = folder_of(name, algo, 0).with_name(f"{name}-{algo}-seed0-long")
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    train(replace(config, out=str(folder)))
    steps = [updates * part // 5 for part in range(1, 6)]
    curve = [outcome(folder, step, 0.0)["score"] for step in steps]
    return outcome(folder, updates, time.perf_counter() - began) | {"steps": steps, "curve": curve}


def outcome(folder, step, seconds):
    """What the evaluation after the last step says."""
    data = json.loads((folder / "eval" / f"step_{step:09d}.json").read_text())
    score = data["normalised_score"]
    return {
        "score": score["value"],
        "references": f"{score['suite']} version {score['version']}",
        "return": data["return"]["value"],
        "returns": data["raw"]["returns"],
        "train_seconds": seconds,
    }


def resampled(samples, stream, draws=4000):
    """(draws,) means over sets of seed means, seeds drawn with replacement within each set.

    Args:
        samples: (sets, seeds).
        stream: random stream; independent for the two sides of a difference.
        draws: how many.
    """
    samples = np.asarray(samples, float)
    picked = np.random.default_rng(stream).integers(samples.shape[1], size=(draws, *samples.shape))
    return np.take_along_axis(np.broadcast_to(samples, picked.shape), picked, axis=2).mean((1, 2))


def interval(draws):
    """95 % bootstrap interval."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def difference(bench, name, table, ours, theirs, over, note):
    """Figure: mean difference of scores over the sets on which every seed of both was run."""
    pairs = [np.asarray(table(algo, over), float) for algo in (ours, theirs)]
    run = np.isfinite(np.concatenate(pairs, axis=1)).all(1)
    missing = [name for name, there in zip(over, run, strict=True) if not there]
    note += f"; {int(run.sum())} of {len(over)} sets" + (
        f", not run: {', '.join(missing)}" if missing else ""
    )
    mine, base = (values[run] for values in pairs)
    value = float(mine.mean() - base.mean()) if run.any() else math.nan
    bounds = interval(resampled(mine, 0) - resampled(base, 1)) if run.any() else (math.nan, math.nan)
    bench.figure(name, value, interval=bounds, unit="points", target=0.0, note=note)


def run(bench: Bench) -> None:
    """All cells, the table of scores and the figures of the comparisons."""
    bench.packages("gymnasium", "mujoco")
    updates = bench.scale(smoke=200, small=10_000, paper=1_000_000)
    long = bench.scale(smoke=200, small=50_000, paper=1_000_000)
    steps = bench.scale(smoke=200, small=50_000, paper=1_000_000)
    tau = bench.scale(smoke=0.02, small=0.02, paper=0.005)
    episodes = bench.scale(smoke=2, small=30, paper=100)
    seeds = range(bench.scale(smoke=1, small=3, paper=5))
    tasks = bench.scale(smoke=TASKS[:1], small=TASKS, paper=(*TASKS, "halfcheetah"))
    sets = [f"{task}-{kind}" for task in tasks for kind in KINDS]
    versions = {name: load_set(f"mujoco_v5/{name}").version for name in sets}
    gaining = [name for name in sets if name.split("-", 1)[1] in ONLINE_KINDS]
    scores = {}
    for algo in SETTINGS:
        for name in sets:
            for seed in seeds:

                def measure(name=name, algo=algo, seed=seed):
                    return offline(name, algo, seed, updates, episodes, tau)

                params = {"updates": updates, "episodes": episodes, "words": words_of(name, algo, tau)}
                params |= {"version": versions[name]}
                row = bench.cell(f"{name}/{algo}/seed{seed}", measure, params=params, seed=seed)
                scores[name, algo, seed] = row["score"]
    for algo in ONLINE:
        for name in gaining:
            for seed in seeds:

                def measure(name=name, algo=algo, seed=seed):
                    return online(name, algo, seed, updates, episodes, tau, steps)

                params = {"updates": updates, "online_steps": steps, "episodes": episodes}
                params |= {"words": words_of(name, algo, tau), "version": versions[name]}
                row = bench.cell(f"{name}/{algo}_online/seed{seed}", measure, params=params, seed=seed)
                scores[name, f"{algo}_online", seed] = row["score"]

    curves = long_runs(bench, sets[0], long, episodes, versions)
    table = lambda algo, over: [[scores[name, algo, seed] for seed in seeds] for name in over]  # noqa: E731
    report(bench, table, sets, gaining)
    caption = f"Scores along a longer run on {sets[0]} with tau={LONG_TAU} (published), by update; one seed."
    bench.table("longer", curves, caption=caption)
    note = f"{len(seeds)} seeds, {updates} updates, mujoco_v5"
    for algo in ("prdc", "a2pr"):
        difference(bench, f"{algo}_score_minus_td3bc", table, algo, "td3_bc", sets, note)
    note = f"after {steps} online steps, {len(seeds)} seeds, mujoco_v5"
    names = ("famo2o_iql_online", "iql_online")
    difference(bench, "famo2o_online_minus_base", table, *names, gaining, note)


def long_runs(bench, name, updates, episodes, versions):
    """Rows of the table of longer runs."""
    rows = []
    for algo in LONG:

        def measure(algo=algo):
            return longer(name, algo, updates, episodes)

        params = {"updates": updates, "episodes": episodes, "words": words_of(name, algo, LONG_TAU)}
        params |= {"version": versions[name]}
        cell = bench.cell(f"{name}/{algo}/long", measure, params=params, seed=0)
        at = [updates * part // 5 for part in range(1, 6)]
        scores = cell["curve"] if isinstance(cell["curve"], list) else [math.nan] * 5  # not run
        rows.append(
            {"algorithm": algo} | {f"{step:,}": score for step, score in zip(at, scores, strict=True)}
        )
    return rows


def report(bench, table, sets, gaining):
    """Tables: scores by set with the range over seeds, and the settings behind them."""
    rows = []
    names = [(algo, sets) for algo in SETTINGS] + [(f"{algo}_online", gaining) for algo in ONLINE]
    for algo, over in names:
        row = {"algorithm": algo}
        values = np.asarray(table(algo, over), float)
        for name in sets:
            mine = values[over.index(name)] if name in over else np.array([np.nan])
            row[name] = f"{mine.mean():.1f} ± {mine.std():.1f}" if np.isfinite(mine).all() else ""
        complete = bool(np.isfinite(values).all())
        row["mean"] = f"{values.mean():.1f}" if complete else ""
        low, high = interval(resampled(values, 0)) if complete else (np.nan, np.nan)
        row["95 % interval"] = f"{low:.1f} to {high:.1f}" if complete else ""
        rows.append(row)
    bench.table(
        "scores",
        rows,
        caption="Normalised score (mujoco_v5) of the last policy, mean and deviation of seeds.",
    )
    lines = []
    for algo, (words, networks) in SETTINGS.items():
        special = [f"{task}: {' '.join(more)}" for (own, task), more in PER_TASK.items() if own == algo]
        lines.append(
            {
                "algorithm": algo,
                "networks": networks,
                "settings": " ".join(words),
                "per task": "; ".join(special),
            }
        )
    bench.table(
        "settings", lines, caption="Settings; networks are those of each paper and not of equal size."
    )
