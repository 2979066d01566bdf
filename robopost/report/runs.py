# SPDX-License-Identifier: Apache-2.0
"""Reads run folders for a report. Damage is noted and shown, never hidden and never fatal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robopost.errors import DataError
from robopost.evaluate.rollout import EvalResult
from robopost.track.jsonl import FILE, read_metrics


@dataclass
class Evaluation:
    """One saved evaluation. `step` is None for one made by `robopost eval`."""

    result: EvalResult
    step: int | None
    source: str


@dataclass
class RunData:
    """What a report shows of one run.

    Attributes:
        path: the run folder.
        config: resolved config.
        provenance: versions, command, machine.
        metrics: lines of metrics.jsonl.
        evaluations: by step; those without a step last.
        videos: (step or None, mp4) by step.
        problems: one line per thing that is missing, torn or unfinished.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    videos: list[tuple[int | None, Path]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Folder name, with its parent's where the folder is one of several seeds."""
        return (
            f"{self.path.parent.name}/{self.path.name}"
            if self.path.name.startswith("seed_")
            else self.path.name
        )

    @property
    def seed(self) -> int | None:
        """Seed of the run."""
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def env(self) -> str:
        """Environment the run is evaluated in, or the dataset it learns from."""
        env = self.config.get("env") or {}
        data = self.config.get("data") or {}
        return str(
            env.get("id") or env.get("name") or Path(str(data.get("path") or "")).stem or "no environment"
        )

    @property
    def group(self) -> str:
        """Runs that share it differ in their seed only, as far as names tell."""
        names = [str((self.config.get(key) or {}).get("name") or "") for key in ("algo", "policy")]
        return " · ".join(name for name in names if name) or self.path.name

    @property
    def switch(self) -> int | None:
        """Step at which an offline run goes on in the environment, None where it doesn't."""
        loop = self.config.get("loop") or {}
        steps = loop.get("steps")
        return steps if loop.get("online_steps") and isinstance(steps, int) else None

    @property
    def last_step(self) -> int:
        """Last step that was logged."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def trained(self) -> list[Evaluation]:
        """Evaluations made while training, in the order of their steps."""
        return [item for item in self.evaluations if item.step is not None]


def load_runs(paths: list[Path]) -> list[RunData]:
    """Load run folders; a folder of seeds (`seed_0/`, `seed_1/`, ...) stands for its runs.

    Raises:
        DataError: a path is no run folder.
    """
    runs = []
    for path in (Path(path) for path in paths):
        if _is_run(path):
            runs.append(load_run(path))
            continue
        inner = sorted(
            (child for child in path.glob("seed_*") if _is_run(child)), key=lambda p: (len(p.name), p.name)
        )
        if not inner:
            reason = "it does not exist" if not path.exists() else f"no config.json or {FILE} in it"
            raise DataError(
                f"{path} is not a run folder: {reason}. Fix: name a folder that robopost train made"
            )
        runs += [load_run(child) for child in inner]
    return runs


def load_run(path: Path) -> RunData:
    """Load one run folder; what is missing or torn goes to `problems`."""
    run = RunData(path)
    run.config = _json(path / "config.json", run.problems)
    run.provenance = _json(path / "provenance.json", run.problems)
    try:
        run.metrics = read_metrics(path / FILE)
    except DataError as error:
        run.problems.append(_without(str(error), path))
    for file in sorted((path / "eval").rglob("*.json")):
        _evaluation(run, file)
    run.evaluations.sort(key=lambda item: (item.step is None, item.step or 0))
    found = [*(path / "videos").glob("*.mp4"), *(path / "eval").rglob("*.mp4")]
    run.videos = sorted(
        ((_step(file), file) for file in found), key=lambda v: (v[0] is None, v[0] or 0, v[1])
    )
    _unfinished(run)
    return run


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Nested config to dotted keys and printable values."""
    if isinstance(tree, dict) and tree:
        out: dict[str, str] = {}
        for key, value in tree.items():
            out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return out
    if tree is None or tree == [] or tree == {} or tree == "":
        return {prefix: "–"}
    return {prefix: ", ".join(map(str, tree)) if isinstance(tree, list) else str(tree)}


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / FILE).is_file()


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} can't be read: {error}")
        return {}
    if not isinstance(data, dict):
        problems.append(f"{path.name} holds no JSON object")
        return {}
    return data


def _evaluation(run: RunData, file: Path) -> None:
    source = str(file.relative_to(run.path))
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        result = EvalResult.from_json(data)
        step = data.get("step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        run.problems.append(f"{source} is not an evaluation ({type(error).__name__}: {error})")
        return
    if not result.episodes:
        run.problems.append(f"{source} holds no episodes")
        return
    run.evaluations.append(Evaluation(result, step if isinstance(step, int) else None, source))


def _unfinished(run: RunData) -> None:
    loop = run.config.get("loop") or {}
    wanted, online = loop.get("steps"), loop.get("online_steps")
    if isinstance(wanted, int) and isinstance(online, int):
        wanted += online
    if isinstance(wanted, int) and run.metrics and run.last_step < wanted:
        run.problems.append(f"not finished: {run.last_step:,} of {wanted:,} steps are logged")
    nulls = sorted({key for line in run.metrics for key, value in line.items() if value is None})
    if nulls:
        run.problems.append(f"not a number at least once: {', '.join(nulls)}")


def _step(file: Path) -> int | None:
    digits = file.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else None


def _without(text: str, path: Path) -> str:
    return text.replace(f"{path}/", "")
