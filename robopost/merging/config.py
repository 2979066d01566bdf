# SPDX-License-Identifier: Apache-2.0
"""Settings of a merge. Imports no torch: the command line's help reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from robopost.errors import ConfigError, nearest, unknown

METHODS = {
    "linear": "(1 - alpha) base + alpha finetuned (RETAIN, WiSE-FT)",
    "slerp": "the same on the arc between the two, per tensor",
    "task_arithmetic": "base + alpha sum_i weights_i (finetuned_i - base)",
    "ties": "task arithmetic after trimming (keep=) and electing signs",
    "dare": "task arithmetic after dropping entries at random (drop=)",
    "soup": "(1 - alpha) base + alpha mean(finetuned), alpha 1 by default",
    "greedy_soup": "a soup of those that help on the task variation=",
    "fisher": "mean weighted by diagonal Fisher information (fisher=)",
    "continual": "finetuned merged one after another, each by alpha",
}
DTYPES = {"base": "", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TASKS = ("old", "new", "variation", "test")
NEEDS_ALPHA = ("linear", "slerp", "continual")
ONE_PARENT = ("linear", "slerp")
MAX_POINTS = 101


@dataclass
class MergeConfig:
    """What `robopost merge` does."""

    base: str = (
        ""  # the pre-trained parent: run, checkpoint or policy folder, HF-layout folder, safetensors file
    )
    finetuned: list[str] = field(
        default_factory=list[str]
    )  # one or more children of base, separated by commas
    method: str = "linear"  # the operator, see methods below
    alpha: list[float] = field(
        default_factory=list[float]
    )  # coefficient, 0 = base, 1 = fine-tuned; 0:1:0.1 or 0,0.5,1 = a sweep
    modules: dict[str, float] = field(
        default_factory=dict[str, float]
    )  # per-module coefficients, e.g. vision:1,language:0.8,action:1
    groups: str = (
        "auto"  # which parameter is in which module: a family, a JSON file, or group:prefix+prefix,...
    )
    weights: list[float] = field(default_factory=list[float])  # of several fine-tuned parents, default 1 each
    keep: float = 0.2  # ties: share of each task vector that is kept
    drop: float = 0.9  # dare: share of each task vector that is dropped
    fisher: list[str] = field(
        default_factory=list[str]
    )  # fisher: files with F of base and of each fine-tuned parent
    seed: int = 0  # of dare's masks
    fresh: list[str] = field(
        default_factory=list[str]
    )  # prefixes of new modules: taken from the fine-tuned parent, never merged
    buffers: str = (
        "equal"  # integer and batch-norm buffers: equal (refuse where they differ) | base | finetuned
    )
    dtype: str = "base"  # stored dtype: base | float32 | float16 | bfloat16; arithmetic is float32 always
    out: str = ""  # folder to write; appears whole or not at all
    overwrite: bool = False  # replace what is at out
    shard_gb: float = 4.0  # size of the shards of a sharded checkpoint
    hash: bool = True  # SHA-256 of the parents' files in the model card
    workers: int = 0  # threads, 0 = one per core
    old: str = ""  # sweep: task of the base, as overrides in quotes, e.g. 'env=arm_language env.split=train'
    new: str = ""  # sweep: task of the fine-tuning
    variation: str = ""  # sweep: variations of the new task; choose=variation is the usual choice
    test: str = ""  # sweep: held-out variations that only the chosen and the parents are run on
    episodes: int = 50  # sweep: per task and coefficient
    eval_seed: int = 0  # sweep: episode i is reset with eval_seed + i
    test_seed: int = 1_000_000  # sweep: the same for the episodes after the choice
    choose: str = ""  # sweep: write the best one on this task (old | new | variation) to out/chosen
    retain: float = 0.0  # sweep: choose among those with at least this share of the base's score on old
    search: str = ""  # modules: search coefficients module by module, language first
    device: str = "auto"  # sweep: where policies are evaluated

    def __post_init__(self) -> None:
        if not self.base:
            raise ConfigError("base has no value. Fix: base=<run, policy folder, HF-layout folder or file>")
        if not self.finetuned:
            raise ConfigError("finetuned has no value. Fix: finetuned=<folder>[,<folder>...]")
        if not self.out:
            raise ConfigError("out has no value. Fix: out=<folder to write>")
        for name, allowed in (
            ("method", METHODS),
            ("dtype", DTYPES),
            ("buffers", ("equal", "base", "finetuned")),
            ("search", ("", "modules")),
            ("choose", ("", *TASKS[:3])),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), [item for item in allowed if item])
        self._check_parents()
        self._check_ranges()
        self._check_sweep()

    def _check_parents(self) -> None:
        count = len(self.finetuned)
        if self.method in ONE_PARENT and count > 1:
            raise ConfigError(
                f"method={self.method} takes one fine-tuned parent, got {count}. "
                "Fix: method=task_arithmetic, ties, dare, soup or continual"
            )
        if self.weights and len(self.weights) != count:
            raise ConfigError(f"weights={self.weights}: {len(self.weights)} for {count} fine-tuned parents")
        if self.weights and self.method in (*ONE_PARENT, "fisher", "continual", "greedy_soup"):
            raise ConfigError(f"weights= has no meaning with method={self.method}. Fix: drop it")
        if (self.method == "fisher") != bool(self.fisher) or (self.fisher and len(self.fisher) != count + 1):
            raise ConfigError(
                f"method=fisher needs fisher=<file of base>,<file per fine-tuned parent>: {count + 1} files, "
                f"got {len(self.fisher)} with method={self.method}"
            )
        if self.method == "greedy_soup" and (not self.variation or self.alpha or self.modules):
            raise ConfigError(
                "method=greedy_soup needs variation='env=...' to validate on, and takes no alpha= and modules="
            )

    def _check_ranges(self) -> None:
        for name, low, high in (("keep", 0.0, 1.0), ("drop", 0.0, 1.0), ("retain", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in {low:g}..{high:g}")
        if self.keep == 0 or self.drop == 1:
            raise ConfigError(f"keep={self.keep}, drop={self.drop}: nothing of the task vectors is left")
        if not all(math.isfinite(v) for v in (*self.alpha, *self.modules.values(), *self.weights)):
            raise ConfigError("alpha, modules and weights must be finite numbers")
        for value in (*self.alpha, *self.modules.values()):
            if self.method != "task_arithmetic" and not 0 <= value <= 1:
                raise ConfigError(
                    f"coefficient {value:g} must lie in 0..1 (only method=task_arithmetic extrapolates)"
                )
        if self.seed < 0 or self.eval_seed < 0 or self.test_seed < 0:
            raise ConfigError("seed, eval_seed and test_seed must be 0 or more")
        if self.shard_gb <= 0 or self.workers < 0:
            raise ConfigError(
                f"shard_gb={self.shard_gb} must be above 0, workers={self.workers} must be 0 or more"
            )
        if not self.alpha and self.method in NEEDS_ALPHA and not (self.modules or self.search):
            raise ConfigError(
                f"method={self.method} needs alpha=<0..1>: 0 is base, 1 is finetuned. Fix: alpha=0.75, or alpha=0:1:0.1"
            )

    def _check_sweep(self) -> None:
        tasks = [name for name in TASKS if getattr(self, name)]
        if self.episodes < 1:
            raise ConfigError(f"episodes={self.episodes} must be at least 1")
        if self.choose and not getattr(self, self.choose):
            raise ConfigError(f"choose={self.choose} needs the task. Fix: {self.choose}='env=<name> ...'")
        if self.search and not self.choose:
            raise ConfigError("search=modules needs choose=<task>: the search climbs on its score")
        if self.retain and not (self.old and self.choose):
            raise ConfigError(f"retain={self.retain} needs choose= and the task old='env=<name> ...'")
        if tasks and not (self.sweep or self.method == "greedy_soup"):
            raise ConfigError(
                f"{tasks[0]}= is for a sweep. Fix: alpha=0:1:0.1 (or drop it, and `robopost eval` the result)"
            )
        if self.choose and not self.sweep:
            raise ConfigError("choose= is for a sweep. Fix: alpha=0:1:0.1")
        spans = [range(seed, seed + self.episodes) for seed in (self.eval_seed, self.test_seed)]
        if tasks and max(spans[0].start, spans[1].start) < min(spans[0].stop, spans[1].stop):
            raise ConfigError(
                f"test_seed={self.test_seed} overlaps the {self.episodes} episodes from eval_seed={self.eval_seed}: "
                "choosing on test episodes is tuning on them. Fix: another test_seed"
            )

    @property
    def sweep(self) -> bool:
        """True where several coefficients are asked for."""
        return len(self.alpha) > 1 or bool(self.search)


def parse_words(words: Sequence[str]) -> MergeConfig:
    """Build the config from `key=value` words.

    Raises:
        ConfigError: an unknown key, or a value that doesn't parse.
    """
    known = {item.name: item for item in fields(MergeConfig)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(
                f"{word!r} is not key=value. Fix: base=<folder> finetuned=<folder> alpha=0.75 out=<folder>"
            )
        if key not in known:
            raise ConfigError(
                f"unknown key {key!r} in {word!r}.{nearest(key, known)} Keys: {', '.join(known)}"
            )
        values[key] = _value(key, str(known[key].type), text)
    return MergeConfig(**values)


def _value(key: str, kind: str, text: str) -> Any:
    try:
        if key == "alpha":
            return grid(text)
        if kind == "dict[str, float]":
            pairs = [item.partition(":") for item in text.split(",") if item]
            if any(not colon for _, colon, _ in pairs):
                raise ValueError("expected module:coefficient,...")
            return {name.strip(): float(value) for name, _, value in pairs}
        if kind == "list[float]":
            return [float(item) for item in text.split(",") if item]
        if kind == "list[str]":
            return [item for item in text.split(",") if item]
        if kind == "bool":
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{key}={text}: {key} takes {kind}. {error if str(error) else ''}".rstrip()
        ) from error


def grid(text: str) -> list[float]:
    """Coefficients of `0.75`, `0,0.5,1` or `first:last:step` (the last included)."""
    if ":" not in text:
        values = [float(item) for item in text.split(",") if item]
    else:
        first, last, step = (float(item) for item in text.split(":"))
        if step <= 0 or last < first or (last - first) / step > MAX_POINTS:
            raise ValueError(f"expected first:last:step with at most {MAX_POINTS} points, e.g. 0:1:0.1")
        count = math.floor((last - first) / step + 1e-9) + 1
        values = [round(first + i * step, 10) for i in range(count)]
    if not values or len(set(values)) != len(values):
        raise ValueError("expected different numbers, e.g. 0.75, 0,0.5,1 or 0:1:0.1")
    return values
