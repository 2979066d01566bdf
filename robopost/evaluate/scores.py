# SPDX-License-Identifier: Apache-2.0
"""Normalised scores: 0 for uniform actions, 100 for the expert of a named suite.

    score = 100 * (return - random) / (expert - random)

Reference returns lie in `references/<suite>.json`. Suites are never mixed: `mujoco_v5` belongs to today's
Gymnasium tasks, `d4rl_v2` to the mujoco-py tasks of D4RL, whose physics differ. A task is found by the id of
its environment, which tells them apart, and a score carries the name and version of its suite.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robopost.config import EnvConfig
from robopost.errors import unknown
from robopost.evaluate.statistics import Interval

FOLDER = Path(__file__).with_name("references")


@dataclass(frozen=True)
class References:
    """Returns of one task that scores are relative to.

    Attributes:
        suite, version: scores of other suites or versions don't compare.
        task: name within the suite, e.g. `hopper`.
        env: environment id, e.g. `Hopper-v5`.
        random, expert: mean undiscounted returns of an episode.
    """

    suite: str
    version: int
    task: str
    env: str
    random: float
    expert: float

    def score(self, value: float) -> float:
        """Normalised score of a return."""
        return 100.0 * (value - self.random) / (self.expert - self.random)

    def interval(self, returns: Interval) -> Interval:
        """Normalised scores of a mean return and its interval."""
        return Interval(
            self.score(returns.value),
            self.score(returns.low),
            self.score(returns.high),
            returns.n,
            returns.level,
        )

    @property
    def label(self) -> str:
        """`mujoco_v5 version 1`."""
        return f"{self.suite} version {self.version}"


def suites() -> list[str]:
    """Names of the suites that have references."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def load_references(suite: str) -> dict[str, References]:
    """Task name -> references of a suite.

    Raises:
        ConfigError: no such suite.
    """
    if suite not in suites():
        raise unknown("suite", suite, suites())
    data = json.loads((FOLDER / f"{suite}.json").read_text())
    return {
        task: References(
            suite, int(data["version"]), task, item["env"], item["random"]["mean"], item["expert"]["mean"]
        )
        for task, item in data["tasks"].items()
    }


def find_references(env: EnvConfig) -> References | None:
    """References of the task that `env` is, None where no suite has it or `env` changes the task."""
    name = str(getattr(env, "id", "") or env.name)
    found = [item for suite in suites() for item in load_references(suite).values() if item.env == name]
    return found[0] if found and _unchanged(env) else None


def _unchanged(env: EnvConfig) -> bool:
    """Whether everything that decides returns is as the environment ships it."""
    plain: Any = type(env)()
    # A score compares returns: what is observed or drawn, and how fast, doesn't matter; all else does.
    free = {"id", "name", "num_envs", "threads", "fast", "fast_render", "obs_keys", "obs"}
    changed = {key for key in vars(env) if key not in free and getattr(env, key) != getattr(plain, key)}
    return not changed
