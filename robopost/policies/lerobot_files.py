# SPDX-License-Identifier: Apache-2.0
"""Files of LeRobot checkpoints: found, kept as text inside a config, unpacked again."""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from robopost.errors import CheckpointError, require
from robopost.nets.vla.prompts import pack, unpack

EXTRA = "lerobot"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
BACKBONE, TOKENIZER = "vlm", "tokenizer"  # folders for what a policy would fetch by name


def find_folder(path: str, *, whole: bool = True) -> Path:
    """A local folder with a LeRobot policy; a hub id is fetched into the hub's cache.

    Args:
        path: folder or hub id.
        whole: weights too, not only JSON.

    Raises:
        CheckpointError: neither.
    """
    if (Path(path) / CONFIG).is_file():
        return Path(path)
    if Path(path).exists() or path.count("/") != 1:
        raise CheckpointError(f"policy.path={path} is no LeRobot policy: {CONFIG} is missing")
    hub = require("huggingface_hub", EXTRA)
    patterns = ["*.json", "*.safetensors"] if whole else [CONFIG]
    try:
        return Path(hub.snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # of the network, the hub, the cache
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"policy.path={path}: no such folder, and the hub says: {reason}") from error


def read_config(path: str, bundle: str) -> dict[str, Any]:
    """The LeRobot config of the policy at `path`, or in `bundle`."""
    text = (find_folder(path, whole=False) / CONFIG).read_bytes() if path else unbundle(bundle)[CONFIG]
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path or 'the stored policy'}: {CONFIG} is not valid JSON: {error}"
        ) from error
    if not isinstance(config, dict) or "type" not in config or "output_features" not in config:
        raise CheckpointError(f"{path or 'the stored policy'}: {CONFIG} is not LeRobot's, it names no type")
    return config


def bundle(files: dict[str, bytes]) -> str:
    """Files by name, as letters and digits for a config."""
    return pack(json.dumps({name: base64.b64encode(data).decode() for name, data in sorted(files.items())}))


def unbundle(text: str) -> dict[str, bytes]:
    """Undo `bundle`."""
    return {name: base64.b64decode(data) for name, data in json.loads(unpack(text)).items()}


@contextlib.contextmanager
def unpacked(files: dict[str, bytes]) -> Iterator[Path]:
    """A temporary folder that holds `files`."""
    with tempfile.TemporaryDirectory(prefix="robopost-lerobot-") as name:
        root = Path(name)
        for inner, data in files.items():
            target = root / inner
            if not target.resolve().is_relative_to(root.resolve()):
                raise CheckpointError(f"the stored policy has a file {inner!r} outside its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        yield root


def collect(folder: Path) -> dict[str, bytes]:
    """Everything of the policy in `folder` but its weights: also what its config only names (a VLM, a tokenizer).

    Raises:
        CheckpointError: no processors, or the named parts can't be had.
    """
    for name in (PRE, POST):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}: it is older than lerobot 0.4. Fix: migrate it with lerobot's "
                "migrate_policy_normalization script"
            )
    kept = [path for path in folder.iterdir() if path.suffix == ".json" or path.name.startswith("policy_p")]
    files = {
        path.name: path.read_bytes() for path in kept if path.is_file() and path.name != "train_config.json"
    }
    config = json.loads(files[CONFIG])
    backbone = config.get("vlm_model_name")
    words = read_step(files[PRE], "tokenizer_processor")
    named: list[tuple[str, Any, tuple[str, ...]]] = (
        [(BACKBONE, backbone, ("AutoConfig", "AutoProcessor"))] if backbone else []
    )
    if words is not None and words["tokenizer_name"] != backbone:
        named.append((TOKENIZER, words["tokenizer_name"], ("AutoTokenizer",)))
    for inner, name, kinds in named:
        local = folder / inner if (folder / inner).is_dir() else name
        files |= _named_parts(inner, str(local), kinds)
    return files


def _named_parts(inner: str, name: str, kinds: Sequence[str]) -> dict[str, bytes]:
    transformers = require("transformers", EXTRA)
    with tempfile.TemporaryDirectory(prefix="robopost-lerobot-") as out:
        try:
            for kind in kinds:
                getattr(transformers, kind).from_pretrained(name).save_pretrained(out)
        except Exception as error:  # of the hub, the network, the files
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"the policy is built on {name}, which can't be read: {reason}") from error
        found = [path for path in Path(out).rglob("*") if path.is_file() and path.suffix != ".safetensors"]
        return {f"{inner}/{path.relative_to(out)}": path.read_bytes() for path in found}


def read_step(processor: bytes, name: str) -> dict[str, Any] | None:
    """Config of the step `name` of a processor's JSON."""
    for step in json.loads(processor)["steps"]:
        if step.get("registry_name") == name:
            return step["config"]
    return None
