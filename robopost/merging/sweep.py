# SPDX-License-Identifier: Apache-2.0
"""Coefficient sweeps: merge, evaluate, remember; choose on validation episodes, report on test episodes."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from robopost.artefacts.checkpoint import load_policy
from robopost.compose import compose
from robopost.config import EnvConfig
from robopost.errors import ConfigError
from robopost.evaluate.rollout import evaluate
from robopost.merging.config import TASKS, MergeConfig
from robopost.merging.merge import merge
from robopost.merging.operators import greedy_soup
from robopost.merging.plan import load_plan, modules_of
from robopost.merging.shards import file_sha256

logger = logging.getLogger(__name__)
FILE = "sweep.json"
CHOSEN = "chosen"
FIRST = ("language", "vision", "action")  # order of the search: the language part matters most
SEARCHED = (0.0, 0.25, 0.5, 0.75, 1.0)
# What makes cells of one file comparable.
SETTINGS = ("method", "groups", "weights", "keep", "drop", "seed", "fresh", "buffers", "dtype", "episodes")


@dataclass(frozen=True)
class Point:
    """One merged policy of a sweep, or a parent.

    Attributes:
        label: names it in the table, e.g. `alpha 0.5`.
        changes: of the config; None for a parent.
        parent: path of a parent.
        x: position in the plot.
    """

    label: str
    changes: dict[str, Any] | None = None
    parent: str = ""
    x: float | None = None


@dataclass
class Sweep:
    """A running sweep and its file.

    Attributes:
        config: of the whole sweep.
        tasks: name -> environment.
        cells: what has been measured.
        chosen: label of the best point.
        line: points that the plot joins.
    """

    config: MergeConfig
    tasks: dict[str, EnvConfig]
    settings: dict[str, Any]
    cells: list[dict[str, Any]] = field(default_factory=list)
    chosen: str = ""
    line: list[Point] = field(default_factory=list)
    progress: Callable[[int], None] = lambda done: None

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.config.out)

    def cell(self, point: Point, task: str, split: str) -> dict[str, Any] | None:
        """A stored measurement."""
        key = (point.label, task, split)
        return next((c for c in self.cells if (c["point"], c["task"], c["split"]) == key), None)

    def score(self, point: Point, task: str, split: str = "validation") -> float:
        """Mean success (return where the task has no success) of a measured cell."""
        cell = self.cell(point, task, split)
        assert cell is not None, (point.label, task, split)
        return float(cell["value"])

    def measure(self, point: Point, tasks: Sequence[str], split: str) -> None:
        """Evaluate what is missing of a point; every cell is saved when it is done."""
        missing = [task for task in tasks if self.cell(point, task, split) is None]
        if not missing:
            return
        seed = self.config.eval_seed if split == "validation" else self.config.test_seed
        with Temporary(self.folder / ".merged") as scratch:
            policy = load_policy(self.make(point, scratch), self.device)
            for task in missing:
                result = evaluate(policy, self.tasks[task], episodes=self.config.episodes, seed=seed)
                success = result.success()
                interval = result.mean_return() if success is None else success
                self.cells.append(
                    {"point": point.label, "x": point.x, "task": task, "split": split}
                    | {"measure": "return" if success is None else "success", "first_seed": seed}
                    | interval.to_json()
                )
                self.save()
                self.progress(len(self.cells))

    def make(self, point: Point, scratch: Path) -> Path:
        """The folder of a point's policy, merged into `scratch` where it is no parent."""
        if point.changes is None:
            return Path(point.parent)
        merge(self.single(point, scratch, hash=False))
        return scratch

    def single(self, point: Point, out: Path, **changes: Any) -> MergeConfig:
        """The config of one merge of this sweep."""
        plain = dict.fromkeys((*TASKS, "choose", "search"), "") | {"retain": 0.0, "overwrite": True}
        return replace(self.config, out=str(out), **plain, **(point.changes or {}), **changes)

    @property
    def device(self) -> Any:
        """Where policies are evaluated."""
        from robopost.loops.run import resolve_device

        return resolve_device(self.config.device)

    def save(self) -> None:
        """Write the file atomically: a killed sweep goes on with the cell it was in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{FILE}.partial"
        stored = {"settings": self.settings, "chosen": self.chosen, "cells": self.cells}
        partial.write_text(json.dumps(stored, indent=1))
        partial.replace(self.folder / FILE)


class Temporary:
    """A folder that is gone before and after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        shutil.rmtree(self.path, ignore_errors=True)
        return self.path

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def task_env(name: str, text: str) -> EnvConfig:
    """The environment that a task's overrides describe, e.g. `env=arm_language env.split=train`.

    Raises:
        ConfigError: words about anything but the environment, or an unknown one.
    """
    words = shlex.split(text)
    for word in words:
        if word.partition("=")[0].partition(".")[0] != "env":
            raise ConfigError(
                f"{name}={text!r}: {word!r} is not of the environment. Fix: {name}='env=<name> env.<key>=<value>'"
            )
    env = compose(["policy=none", *words], "eval").env
    if env is None:
        raise ConfigError(f"{name}={text!r} names no environment. Fix: {name}='env=<name> env.<key>=<value>'")
    return env


def open_sweep(config: MergeConfig) -> Sweep:
    """Check parents, tasks and an earlier sweep at `out`; nothing is evaluated yet.

    Raises:
        RobopostError: parents that can't be merged, a wrong task, or another sweep at `out`.
    """
    tasks = {name: task_env(name, getattr(config, name)) for name in TASKS if getattr(config, name)}
    probe = Sweep(config, tasks, {})
    first: dict[str, Any] = {"alpha": config.alpha[:1]}
    if config.method == "greedy_soup":
        first = {"method": "soup"}
    elif config.search:
        first = {"modules": probe_modules(config), "alpha": []}
    with load_plan(probe.single(Point("", first), Path(config.out))) as plan:
        for line in plan.warnings:
            logger.warning("%s", line)
        if tasks and plan.base.layout != "robopost":
            raise ConfigError(
                f"base={config.base} is no robopost policy, so the sweep can't evaluate it. "
                "Fix: drop the tasks (one merged folder per coefficient is written) and evaluate those"
            )
        hashes = [[file_sha256(path) for path in parent.files] for parent in plan.parents]
    settings = {name: getattr(config, name) for name in SETTINGS} | {"parents": hashes}
    settings |= {"tasks": {name: getattr(config, name) for name in tasks}}
    settings |= {"eval_seed": config.eval_seed, "test_seed": config.test_seed, "modules": config.modules}
    sweep = Sweep(config, tasks, json.loads(json.dumps(settings)))
    path = sweep.folder / FILE
    if path.exists() and not config.overwrite:
        stored = json.loads(path.read_text())
        changed = [key for key, value in sweep.settings.items() if stored["settings"].get(key) != value]
        if changed:
            raise ConfigError(
                f"{path} is of another sweep ({', '.join(changed)} differ). Fix: another out=, or overwrite=true"
            )
        sweep.cells = stored["cells"]
    elif sweep.folder.exists() and any(sweep.folder.iterdir()):
        if not config.overwrite:
            raise ConfigError(f"out={config.out} exists. Fix: another name, or overwrite=true")
        shutil.rmtree(sweep.folder)
    return sweep


def probe_modules(config: MergeConfig) -> dict[str, float]:
    """Every module of the base at 1: fine-tuned. The search starts there."""
    single = replace(
        config, **dict.fromkeys((*TASKS, "choose", "search"), ""), retain=0.0, alpha=[1.0], modules={}
    )
    with load_plan(single) as plan:
        found = modules_of(plan)
    order = [name for name in FIRST if name in found] + sorted(set(found) - set(FIRST))
    return dict.fromkeys(order, 1.0)


def run_sweep(config: MergeConfig, progress: Callable[[int], None] = lambda done: None) -> Sweep:
    """Sweep, choose, and write `sweep.json`, `sweep.svg` and, with `choose`, the best policy to `out/chosen`.

    Without tasks one merged folder per coefficient is written, and nothing is evaluated.

    Args:
        config: with several alphas, `search` or `method=greedy_soup`.
        progress: called with the number of measured cells.

    Raises:
        RobopostError: see `open_sweep`; no coefficient retains enough of the old skill.
    """
    sweep = open_sweep(config)
    sweep.progress = progress
    tasks = [name for name in sweep.tasks if name != "test"]
    if config.method == "greedy_soup":
        return _finish(sweep, _greedy(sweep))
    if config.search:
        return _finish(sweep, _search(sweep, tasks))
    sweep.line = [Point(f"alpha {value:g}", {"alpha": [value]}, x=value) for value in sorted(config.alpha)]
    for point in sweep.line:
        if not tasks:
            target = sweep.folder / f"alpha_{point.x:g}"
            if not target.exists():
                merge(sweep.single(point, target))
        else:
            sweep.measure(point, tasks, "validation")
    return _finish(sweep, best(sweep, sweep.line) if config.choose else None)


def best(sweep: Sweep, points: Sequence[Point]) -> Point:
    """The point with the highest validation score on `choose`; ties go to the sum of all tasks, then to smaller x.

    Raises:
        ConfigError: none has `retain` of the base's score on `old`.
    """
    config = sweep.config
    allowed = list(points)
    if config.retain:
        base = Point("base", parent=config.base)
        sweep.measure(base, ["old"], "validation")
        least = config.retain * sweep.score(base, "old")
        allowed = [point for point in points if sweep.score(point, "old") >= least]
        if not allowed:
            raise ConfigError(
                f"retain={config.retain:g}: no coefficient reaches {least:.3g} on old. Fix: smaller alphas in the "
                "sweep, or a smaller retain"
            )
    tasks = [name for name in sweep.tasks if name != "test"]
    # max keeps the first of equals, and points are in ascending order: closest to the base.
    return max(
        allowed,
        key=lambda point: (sweep.score(point, config.choose), sum(sweep.score(point, t) for t in tasks)),
    )


def _search(sweep: Sweep, tasks: Sequence[str]) -> Point:
    """Coordinate search: each module's coefficient in turn, language first, the others as found so far."""
    values = sorted(sweep.config.alpha or SEARCHED)
    found = probe_modules(sweep.config)
    point = _module_point(found)
    for position, module in enumerate(list(found)):
        points = [_module_point(found | {module: value}, value) for value in values]
        for item in points:
            sweep.measure(item, tasks, "validation")
        if position == 0:
            sweep.line = points
        point = best(sweep, points)
        assert point.changes is not None
        found = point.changes["modules"]
    return point


def _module_point(modules: dict[str, float], x: float | None = None) -> Point:
    label = ",".join(f"{name}:{value:g}" for name, value in modules.items())
    return Point(label, {"modules": dict(modules), "alpha": []}, x=x)


def _greedy(sweep: Sweep) -> Point:
    """Greedy soup on the validation episodes of `variation`."""
    tuned = sweep.config.finetuned

    def point(members: Sequence[int]) -> Point:
        changes = {"method": "soup", "finetuned": [tuned[i] for i in sorted(members)], "alpha": []}
        return Point("soup of " + " + ".join(str(i + 1) for i in sorted(members)), changes)

    def score(members: Sequence[int]) -> float:
        sweep.measure(point(members), ["variation"], "validation")
        return sweep.score(point(members), "variation")

    chosen, _ = greedy_soup([score([i]) for i in range(len(tuned))], score)
    return point(chosen)


def _finish(sweep: Sweep, chosen: Point | None) -> Sweep:
    """Test the chosen one and the parents on fresh episodes, write it and the plot."""
    config = sweep.config
    if chosen is not None:
        parents = [Point("base", parent=config.base)]
        parents += [Point(f"finetuned {i + 1}", parent=path) for i, path in enumerate(config.finetuned)]
        for point in (*parents, chosen):
            sweep.measure(point, list(sweep.tasks), "test")
        sweep.chosen = chosen.label
        split = (
            f"`{chosen.label}` was chosen on `{config.choose or 'variation'}` from validation episodes "
            f"(seeds {config.eval_seed} .. {config.eval_seed + config.episodes - 1}); the table is from test episodes "
            f"(seeds {config.test_seed} .. {config.test_seed + config.episodes - 1}), which the choice never saw."
        )
        evaluation = {"rows": rows(sweep, "test"), "split": split}
        merge(sweep.single(chosen, sweep.folder / CHOSEN), evaluation=evaluation)
    if sweep.tasks:
        sweep.save()
    if sweep.line and sweep.tasks:
        from robopost.merging.plot import sweep_svg

        (sweep.folder / "sweep.svg").write_text(sweep_svg(sweep), encoding="utf-8")
    return sweep


def rows(sweep: Sweep, split: str) -> list[dict[str, Any]]:
    """Measured points of one split as table rows: one column per task, with 95 % intervals."""
    found: dict[str, dict[str, Any]] = {}
    for cell in sweep.cells:
        if cell["split"] != split:
            continue
        percent = cell["measure"] == "success"
        scale, unit = (100.0, " %") if percent else (1.0, "")
        value, low, high = (f"{cell[key] * scale:.1f}" for key in ("value", "low", "high"))
        row = found.setdefault(cell["point"], {"policy": cell["point"]})
        row[cell["task"]] = f"{value}{unit} [{low}, {high}]"
    return list(found.values())
