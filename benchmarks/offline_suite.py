# SPDX-License-Identifier: Apache-2.0
"""What the sets of suite mujoco_v5 hold: sources, transitions, returns and scores of their episodes.

Reads the stores that `robopost collect suite=mujoco_v5` has recorded into data/mujoco_v5/ and the reference
returns in robopost/evaluate/references/mujoco_v5.json; nothing is trained.
"""

import json

import numpy as np

from robopost.bench import Bench, find_checkout
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError
from robopost.evaluate.scores import FOLDER, load_references
from robopost.suite import load_set, set_names

SUITE = "offline"
DATA = find_checkout() / "data" / "mujoco_v5"


def describe(name):
    """Composition and returns of one set, by source."""
    wanted = load_set(name)
    path = DATA / f"{wanted.name}.zarr"
    if not path.exists():
        raise ConfigError(f"{path} is absent. Fix: robopost collect suite={name}")
    references = load_references(wanted.suite)[wanted.name.split("-")[0]]
    with EpisodeStore.open(path) as store:
        rewards = store.rows("data/reward", 0, store.num_steps).astype(np.float64)
        returns = np.array([part.sum() for part in np.split(rewards, store.episode_ends[:-1])])
        lengths = np.array([info["length"] for info in store.episode_info])
        origin = np.array([info["metadata"]["source"] for info in store.episode_info])
        identity = store.dataset_id
    parts = []
    for index, source in enumerate(wanted.sources):
        mine = origin == index
        how = [f"noise {source.noise:g}"] if source.noise else []
        how += [f"quality {source.quality:g}"] if source.kind == "script" else []
        how += ["sampled"] if not source.deterministic else []
        parts.append(
            {
                "source": source.origin,
                "how": ", ".join(how),
                "episodes": int(mine.sum()),
                "transitions": int(lengths[mine].sum()),
                "return": [float(returns[mine].mean()), float(returns[mine].std())],
            }
        )
    return {
        "dataset_id": identity,
        "version": wanted.version,
        "episodes": len(returns),
        "transitions": int(lengths.sum()),
        "return_quantiles": np.quantile(returns, [0, 0.1, 0.5, 0.9, 1]).tolist(),
        "score_mean": references.score(float(returns.mean())),
        "score_by_transition": references.score(float(np.average(returns, weights=lengths))),
        "score_best": references.score(float(returns.max())),
        "sources": parts,
    }


def run(bench: Bench) -> None:
    """One cell per set, and the references."""
    sets, sources = [], []
    for name in set_names("mujoco_v5"):
        row = bench.cell(name, lambda name=name: describe(name), params={"version": load_set(name).version})
        quantiles = row["return_quantiles"] if row else [np.nan] * 5
        own = name.split("/")[1]
        sets.append(
            {
                "set": own,
                "episodes": row["episodes"],
                "transitions": row["transitions"],
                **dict(zip(("lowest return", "10 %", "median", "90 %", "highest"), quantiles, strict=True)),
                "mean score": row["score_mean"],
                "by transition": row["score_by_transition"],
                "best": row["score_best"],
                "id": row["dataset_id"] if row else "",
            }
        )
        for part in row["sources"] if row else []:
            mean, std = part["return"]
            shown = {key: part[key] for key in ("source", "how", "episodes", "transitions")}
            sources.append({"set": own, **shown, "return": f"{mean:.0f} ± {std:.0f}"})
    bench.table("sets", sets, caption="Sets of mujoco_v5: returns of their episodes, and normalised scores.")
    bench.table("sources", sources, caption="Where the transitions come from.")
    data = json.loads((FOLDER / "mujoco_v5.json").read_text())
    rows = []
    for task, item in data["tasks"].items():
        row = {"task": task, "environment": item["env"]}
        for role in ("random", "expert"):
            one = item[role]
            row |= {
                f"{role} policy": one["policy"],
                f"{role} return": f"{one['mean']:.1f} ± {one['std']:.1f}",
            }
        rows.append(row)
    caption = f"Reference returns, version {data['version']}: mean and deviation of 100 episodes."
    bench.table("references", rows, caption=caption)
