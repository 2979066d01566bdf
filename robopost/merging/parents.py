# SPDX-License-Identifier: Apache-2.0
"""The parents of a merge: where their weights, statistics and tokenizers lie, and whether they go together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from robopost.artefacts.checkpoint import load_json
from robopost.errors import CheckpointError, MissingExtraError, require
from robopost.merging.groups import is_normaliser
from robopost.merging.shards import POLICY, Shards, open_shards, same_bytes

ACTING = (
    "execute",
    "image_shift",
    "label_smoothing",
    "temperature",
    "path",
    "freeze_vision",
    "freeze_vlm",
    "source",
    "task",
    "texts",
    "times",
    "gradient_checkpointing",
    "lora_alpha",
    "lora_targets",
)  # config that no weight depends on
TRAINING = ("model.safetensors", "state.json", "env.safetensors", "policy.json", POLICY, "README.md")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "added_tokens.json",
)
STATISTICS = ("dataset_statistics.json", "norm_stats.json", "stats.json")
STATED = ("model_type", "type", "architectures", "normalization_mapping", "norm_stats", "quantization_config")


@dataclass
class Parent:
    """One checkpoint.

    Attributes:
        name: as the user wrote it.
        folder: with the weights.
        layout: "robopost" (policy.json + policy.safetensors), "hf" (config.json + shards) or "file".
        shards: its tensors.
        meta: policy.json or config.json.
        read_as: names of the base that are stored under another name here (tied weights).
        lora: LoRA factors that were folded into the weights.
    """

    name: str
    folder: Path
    layout: str
    shards: Shards
    meta: dict[str, Any] = field(default_factory=dict)
    read_as: dict[str, str] = field(default_factory=dict)
    lora: int = 0

    @property
    def files(self) -> list[Path]:
        """The weights as the user has them: what the card names and hashes."""
        return [self.folder / path.name for path in self.shards.paths] if self.lora else self.shards.paths


def open_parent(name: str) -> Parent:
    """Find and open a parent: run, checkpoint or policy folder, HF-layout folder, safetensors file, or hub id.

    Raises:
        CheckpointError: nothing there, or incomplete.
    """
    from robopost.artefacts.checkpoint import latest

    path = _local(name)
    if path.is_file():
        return Parent(name, path.parent, "file", open_shards(path))
    folder = next(
        (
            item
            for item in (path, latest(path) if path.is_dir() else None)
            if item and (item / "policy.json").exists()
        ),
        None,
    )
    if folder is not None:
        return Parent(
            name, folder, "robopost", open_shards(folder, POLICY), load_json(folder / "policy.json")
        )
    shards = open_shards(path)
    config = path / "config.json"
    return Parent(name, path, "hf", shards, load_json(config) if config.exists() else {})


def _local(name: str) -> Path:
    """`name` as a path, or a download of the hub repository it names."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix or name.count("/") != 1 or name.startswith(("runs/", ".")):
        return path
    try:
        return Path(require("huggingface_hub", "hub").snapshot_download(name))
    except (OSError, ValueError, MissingExtraError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"no folder {name} here, and no such repository on the hub: {reason}"
        ) from error


def check_kind(base: Parent, other: Parent) -> None:
    """Refuse parents of another layout, class, config or spec.

    Raises:
        CheckpointError: in one line, with what differs.
    """
    if base.layout != other.layout:
        raise CheckpointError(
            f"{base.name} is a {base.layout} checkpoint, {other.name} is {other.layout}. Fix: parents of one layout"
        )
    if "quantization_config" in base.meta or "quantization_config" in other.meta:
        raise CheckpointError(
            f"{base.name} or {other.name} is quantised (quantization_config): its weights can't be interpolated. "
            "Fix: merge the unquantised checkpoints"
        )
    if base.layout == "hf":
        for key in STATED:
            if base.meta.get(key) != other.meta.get(key):
                kind = "were normalised differently" if key in STATED[3:5] else "are different models"
                raise CheckpointError(
                    f"{base.name} and {other.name} {kind}: config.json has {key}={_short(base.meta.get(key))} and "
                    f"{_short(other.meta.get(key))}"
                )
    if base.layout != "robopost":
        return
    if base.meta["name"] != other.meta["name"]:
        raise CheckpointError(
            f"{base.name} is policy={base.meta['name']}, {other.name} is policy={other.meta['name']}. "
            "Fix: a fine-tuned parent starts from base (policy=<base run>)"
        )
    mine, theirs = base.meta["config"], other.meta["config"]
    for key in sorted((mine.keys() | theirs.keys()) - set(ACTING)):
        if mine.get(key) != theirs.get(key):
            if key == "tokenizer_json":
                raise CheckpointError(
                    f"the tokenizers of {base.name} and {other.name} differ: the same text means other tokens to each. "
                    "Fix: fine-tune with policy=<base run>"
                )
            raise CheckpointError(
                f"{base.name} has policy.{key}={_short(mine.get(key))}, {other.name} has {_short(theirs.get(key))}: "
                "their weights mean different things. Fix: fine-tune with policy=<base run>"
            )
    for key in ("obs", "action_dim", "choices"):
        if base.meta["spec"].get(key) != other.meta["spec"].get(key):
            raise CheckpointError(
                f"{base.name} and {other.name} differ in {key}: {_short(base.meta['spec'].get(key))} and "
                f"{_short(other.meta['spec'].get(key))}. Fix: fine-tune with the observations and actions of base"
            )


def check_normaliser(base: Parent, other: Parent) -> None:
    """Refuse parents that were trained in other units: their weights can't be averaged.

    Compared are the normaliser's tensors among the weights, further safetensors files (processors of lerobot) and
    statistics in JSON.

    Raises:
        CheckpointError: with the tensor or file that differs and both hashes.
    """
    fix = (
        "they were trained in different units, a merge would be meaningless. "
        "Fix: fine-tune with the statistics of base (policy=<base run> keeps them)"
    )
    for name in base.shards.entries:
        if is_normaliser(name) and (
            name not in other.shards.entries or not same_bytes(base.shards, name, other.shards, name)
        ):
            hashes = " and ".join(parent_hash(parent) for parent in (base, other))
            raise CheckpointError(
                f"normaliser {name!r} of {base.name} and {other.name} differs (hashes {hashes}): {fix}"
            )
    if base.layout != "hf":
        return
    for file in sorted(_statistics(base) | _statistics(other)):
        contents = [_content(parent.folder / file) for parent in (base, other)]
        if contents[0] != contents[1]:
            lacking = [p.name for p, c in zip((base, other), contents, strict=True) if c is None]
            why = f"{lacking[0]} lacks it" if lacking else "it differs"
            raise CheckpointError(f"statistics {file} of {base.name} and {other.name}: {why}; {fix}")


def parent_hash(parent: Parent) -> str:
    """First 12 digits of the SHA-256 of a parent's normaliser tensors."""
    names = [name for name in parent.shards.entries if is_normaliser(name)]
    return parent.shards.digest(names)[:12]


def _statistics(parent: Parent) -> set[str]:
    weights = {path.resolve() for path in parent.shards.paths}
    found = [path for path in parent.folder.rglob("*.safetensors") if path.resolve() not in weights]
    found += [path for name in STATISTICS for path in parent.folder.rglob(name)]
    return {
        str(path.relative_to(parent.folder))
        for path in found
        if "processor" in path.name or path.suffix == ".json"
    }


def _content(path: Path) -> Any:
    if not path.exists():
        return None
    if path.suffix == ".json":
        return load_json(path)
    shards = open_shards(path)
    with shards:
        return shards.digest(list(shards.entries))


def check_tokenizer(base: Parent, other: Parent) -> list[str]:
    """Refuse parents whose tokenizers give text other numbers.

    Returns:
        Warnings: a tokenizer that only one of them carries can't be compared.

    Raises:
        CheckpointError: a tokenizer file differs.
    """
    warnings = []
    for file in TOKENIZERS:
        contents = [_tokens(parent.folder / file) for parent in (base, other)]
        if None in contents:
            if contents[0] != contents[1]:
                lacking = (base, other)[contents.index(None)].name
                warnings.append(f"{lacking} has no {file}: tokenizers could not be compared")
        elif contents[0] != contents[1]:
            raise CheckpointError(
                f"{file} of {base.name} and {other.name} differs: the same text means other tokens to each. "
                "Fix: fine-tune with the tokenizer of base"
            )
    return warnings


def _tokens(path: Path) -> Any:
    """What decides how text becomes tokens: padding and truncation are left behind by the last call."""
    if not path.exists():
        return None
    if path.suffix != ".json":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    return (
        {key: value for key, value in table.items() if key not in ("padding", "truncation")}
        if isinstance(table, dict)
        else table
    )


def match_names(base: Parent, other: Parent, fresh: list[str]) -> None:
    """Pair the tensors of `other` with those of `base`; tied weights may be stored once or twice.

    Fills `other.read_as`.

    Raises:
        CheckpointError: a tensor that only one of them has, or of another shape.
    """
    mine = {name for name in base.shards.entries if not under(name, fresh)}
    theirs = {name for name in other.shards.entries if not under(name, fresh)}
    for name in sorted(mine - theirs):
        twin = _twin(base, name, mine & theirs) or other.shards.metadata.get(name, "")
        if twin not in theirs:
            raise CheckpointError(f"{other.name} lacks {name!r}, which {base.name} has. {_fix_names(name)}")
        other.read_as[name] = twin
    for name in sorted(theirs - mine):
        if _twin(other, name, mine & theirs) is None:
            raise CheckpointError(f"{other.name} has {name!r}, which {base.name} lacks. {_fix_names(name)}")
    for name in sorted(mine):
        one, two = base.shards.entries[name], other.shards.entries[other.read_as.get(name, name)]
        if one.shape != two.shape:
            words = any(part in name for part in ("embed", "lm_head", "wte"))
            fix = (
                "their vocabularies differ. Fix: fine-tune with the tokenizer of base"
                if words
                else "Fix: parents of one architecture, or fresh=<prefix> to take a new module from finetuned"
            )
            raise CheckpointError(
                f"{name!r} has shape {one.shape} in {base.name} and {two.shape} in {other.name}: {fix}"
            )


def under(name: str, prefixes: list[str]) -> bool:
    """True where one of `prefixes` covers `name`, whole parts only."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _twin(parent: Parent, name: str, candidates: set[str]) -> str | None:
    """A tensor with the same bytes in the same checkpoint, i.e. one that `name` is tied to."""
    entry = parent.shards.entries[name]
    for other in sorted(candidates):
        item = parent.shards.entries[other]
        alike = (item.code, item.shape) == (entry.code, entry.shape) and len(entry.shape) > 1
        if alike and same_bytes(parent.shards, name, parent.shards, other):
            return other
    return None


def _fix_names(name: str) -> str:
    if "lora_" in name:
        return "Fix: fold the LoRA adapter into the weights first; its two factors can't be merged one by one"
    return "Fix: parents of one architecture, or fresh=<prefix> for a new module"


def without_adapters(parent: Parent, folder: Path) -> Parent:
    """A parent whose LoRA factors are folded into its weights: merging factors one by one is no merge of products.

    Args:
        parent: returned as it is where it has none.
        folder: where a folded policy is written.

    Raises:
        CheckpointError: it is no robopost policy that can fold them (`merge_lora`).
    """
    found = [name for name in parent.shards.entries if {"lora_A", "lora_B"} & set(name.split("."))]
    if not found:
        return parent
    if parent.layout == "robopost":
        from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder

        policy: Any = load_policy(parent.folder)
        if hasattr(policy, "merge_lora"):
            policy.merge_lora()
            save_folder(folder, policy_files(policy))
            shards = open_shards(folder, POLICY)
            return replace(parent, shards=shards, meta=load_json(folder / "policy.json"), lora=len(found))
    raise CheckpointError(f"{parent.name}: {_fix_names(found[0])} ({found[0]!r})")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
