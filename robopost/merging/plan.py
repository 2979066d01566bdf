# SPDX-License-Identifier: Apache-2.0
"""What a merge will do: the parents, every tensor's sources and coefficient; all checks happen here, before writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from robopost.errors import CheckpointError, ConfigError
from robopost.merging.config import DTYPES, NEEDS_ALPHA, MergeConfig
from robopost.merging.groups import coefficients, find_groups, is_normaliser
from robopost.merging.parents import (
    Parent,
    check_kind,
    check_normaliser,
    check_tokenizer,
    match_names,
    open_parent,
    under,
    without_adapters,
)
from robopost.merging.shards import Entry, Shards, open_shards, same_bytes
from robopost.merging.stream import Source
from robopost.merging.writer import size_of

STATISTIC = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm: of the data, not learnt
TIED = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "shared.weight", "embed_out.weight")


@dataclass
class Plan:
    """Everything that is known before the first byte is written.

    Attributes:
        config: of the merge.
        parents: base first.
        information: Fisher information of each parent, or none.
        entries: output tensors: the base's, and fresh ones.
        alphas: coefficient of every merged tensor.
        groups: parameter -> module, empty without `modules`.
        family: table the modules come from.
        sources: output tensor -> tensors of the parents, or the only one it is copied from.
        copied: output tensors that are taken from one parent as they are.
        tied: tensors stored twice -> the name that stands for both, e.g. in the seeds of DARE's masks.
        warnings: for the log and the card.
    """

    config: MergeConfig
    parents: list[Parent]
    information: list[Shards]
    entries: dict[str, Entry]
    alphas: dict[str, float]
    groups: dict[str, str]
    family: str
    sources: dict[str, list[Source]]
    copied: set[str]
    tied: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def base(self) -> Parent:
        """The first parent."""
        return self.parents[0]

    def code(self, name: str) -> str:
        """Stored dtype of an output tensor."""
        entry, code = self.entries[name], DTYPES[self.config.dtype]
        return code if code and name in self.alphas else entry.code

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensors."""
        return sum(size_of(self.code(name), entry.shape) for name, entry in self.entries.items())


@contextmanager
def load_plan(config: MergeConfig) -> Iterator[Plan]:
    """Open the parents and check everything that can be checked before writing; closes them at the end.

    Raises:
        RobopostError: parents that don't go together, a parameter without a module, ..., in one line.
    """
    with ExitStack() as stack:
        parents = []
        # Policies with adapters are written once more without them, beside the output.
        beside = Path(config.out).absolute().parent
        for position, name in enumerate((config.base, *config.finetuned)):
            scratch = beside / f".{Path(config.out).name}.folded-{os.getpid()}-{position}"
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            parents.append(without_adapters(open_parent(name), scratch))
            stack.enter_context(parents[-1].shards)
        information = [stack.enter_context(open_shards(path)) for path in config.fisher]
        yield _plan(config, parents, information)


def _plan(config: MergeConfig, parents: list[Parent], information: list[Shards]) -> Plan:
    base, *tuned = parents
    warnings: list[str] = []
    for prefix in config.fresh:
        if not any(under(name, [prefix]) for name in tuned[0].shards.entries):
            raise ConfigError(f"fresh={prefix}: {tuned[0].name} has no parameter below that prefix")
    for parent in parents:
        if parent.lora:
            warnings.append(f"{parent.name}: {parent.lora // 2} LoRA adapters were folded into its weights")
    for other in tuned:
        check_kind(base, other)
        check_normaliser(base, other)
        warnings += check_tokenizer(base, other)
        match_names(base, other, config.fresh)
    entries = {name: item for name, item in base.shards.entries.items() if not under(name, config.fresh)}
    sources: dict[str, list[Source]] = {}
    copied: set[str] = set()
    for name, item in entries.items():
        stored = [
            (parent.shards, parent.shards.entries[parent.read_as.get(name, name)]) for parent in parents
        ]
        if is_normaliser(name):
            sources[name], keep = [stored[0]], True
        elif not item.floating or name.rpartition(".")[2] in STATISTIC:
            sources[name], keep = [_buffer(config, parents, name, stored)], True
        else:
            sources[name], keep = stored, False
        copied |= {name} if keep else set()
    for name, item in tuned[0].shards.entries.items():
        if under(name, config.fresh):
            entries[name], sources[name] = item, [(tuned[0].shards, item)]
            copied.add(name)
    learnt = [name for name in entries if name not in copied]
    warnings += _check_dtypes(config, parents, learnt, sources)
    groups, family = _groups(config, base, learnt)
    default = None if config.method in NEEDS_ALPHA else 1.0
    one = config.alpha[0] if config.alpha else default
    alphas = coefficients(learnt, groups, config.modules, one)
    for name in learnt:
        sources[name] += _information(information, config.fisher, name, entries[name])
    plan = Plan(config, parents, information, entries, alphas, groups, family, sources, copied, {}, warnings)
    plan.tied = _tied(plan)
    return plan


def _buffer(config: MergeConfig, parents: list[Parent], name: str, stored: list[Source]) -> Source:
    """The source of a tensor that can't be interpolated."""
    if config.buffers == "equal":
        for parent, (shards, entry) in zip(parents[1:], stored[1:], strict=True):
            if not same_bytes(*stored[0][:1], name, shards, entry.name):
                raise CheckpointError(
                    f"buffer {name!r} ({stored[0][1].code}) differs between {parents[0].name} and {parent.name} and "
                    "can't be interpolated. Fix: buffers=base or buffers=finetuned"
                )
    return stored[1 if config.buffers == "finetuned" else 0]


def _check_dtypes(
    config: MergeConfig, parents: list[Parent], learnt: Sequence[str], sources: dict[str, list[Source]]
) -> list[str]:
    half: set[str] = set()
    for name in learnt:
        codes = [entry.code for _, entry in sources[name]]
        half |= {code for code in codes if code in ("BF16", "F16")}
        if len(set(codes)) > 1 and config.dtype == "base":
            at = next(i for i, code in enumerate(codes) if code != codes[0])
            raise CheckpointError(
                f"{name!r} is {codes[0]} in {parents[0].name} and {codes[at]} in {parents[at].name}. "
                "Fix: dtype=float32 (or another) to merge them all the same"
            )
    if not half:
        return []
    return [
        f"parents are stored in {', '.join(sorted(half))}: small differences to the base were rounded away when they "
        "were saved, and the result is rounded again unless dtype=float32. Arithmetic is float32"
    ]


def _groups(config: MergeConfig, base: Parent, learnt: Sequence[str]) -> tuple[dict[str, str], str]:
    return _assign_groups(config, base, learnt) if config.modules else ({}, "")


def _assign_groups(config: MergeConfig, base: Parent, learnt: Sequence[str]) -> tuple[dict[str, str], str]:
    own = None
    if base.layout == "robopost":
        from robopost.registry import POLICIES

        # A policy class may say itself what its modules are.
        own = getattr(POLICIES.get(base.meta["name"]).target, "module_groups", None)
    family, groups = find_groups(learnt, config.groups, own)
    return groups, family


def modules_of(plan: Plan) -> set[str]:
    """Names of the modules of a plan's parameters, whether or not its config has coefficients for them."""
    groups, _ = _assign_groups(plan.config, plan.base, list(plan.alphas))
    return set(groups.values())


def _information(information: list[Shards], paths: Sequence[str], name: str, entry: Entry) -> list[Source]:
    found: list[Source] = []
    for shards, path in zip(information, paths, strict=True):
        item = shards.entries.get(name)
        if item is None or item.shape != entry.shape or not item.floating:
            raise CheckpointError(f"fisher={path} has no {name!r} of shape {entry.shape}")
        found.append((shards, item))
    return found


def _tied(plan: Plan) -> dict[str, str]:
    """Tensors that are one and the same in every parent -> the name that stands for both."""
    names = [name for name in plan.alphas if name.endswith(TIED)]
    tied: dict[str, str] = {}
    for i, name in enumerate(names):
        for other in names[:i]:
            if all(
                same_bytes(a[0], a[1].name, b[0], b[1].name)
                for a, b in zip(plan.sources[name], plan.sources[other], strict=True)
            ):
                tied[name] = tied.get(other, other)
                break
    for name, twin in tied.items():  # they stay one tensor: one coefficient
        plan.alphas[name] = plan.alphas[twin]
    return tied
