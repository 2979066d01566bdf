# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: safetensors + JSON, written whole or not at all, loaded without unpickling."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from robopost.data.batch import Spec
from robopost.errors import CheckpointError, RobopostError
from robopost.policies.base import Policy
from robopost.registry import POLICIES

FORMAT = 1
LATEST = "LATEST"


def save_folder(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write `files` into a new `folder` atomically: temporary sibling, fsync, rename.

    A name ending in `.safetensors` takes tensors or numpy arrays, one ending in `.json` takes JSON values.

    Raises:
        RobopostError: the disk is full or not writable; nothing is left behind.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            path = partial / name
            if name.endswith(".safetensors"):
                # safetensors refuses tensors that share storage; contiguous clones are what is stored anyway.
                if any(isinstance(value, np.ndarray) for value in content.values()):
                    save_arrays({key: np.ascontiguousarray(value) for key, value in content.items()}, path)
                else:
                    save_file(
                        {k: value.detach().cpu().contiguous().clone() for k, value in content.items()}, path
                    )
            else:
                path.write_text(json.dumps(content, indent=1, sort_keys=True))
            _sync(path)
        _sync(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower()
        reason = "the disk is full" if full else str(error)
        raise RobopostError(
            f"can't write {folder}: {reason}. The previous checkpoint is untouched"
        ) from error


def save_checkpoint(
    run: Path, step: int, files: dict[str, dict[str, Any]], *, policy: Policy, keep: int = 2, spare: int = -1
) -> Path:
    """Save `files` plus the exported policy as `run/checkpoints/step_<step>` and point LATEST at it.

    The newest `keep` stay, and the one of step `spare`.
    """
    root = run / "checkpoints"
    folder = root / f"step_{step:09d}"
    for leftover in root.glob(".step_*.partial-*"):  # of a process that was killed while writing
        shutil.rmtree(leftover, ignore_errors=True)
    save_folder(folder, files | policy_files(policy))
    pointer = root / f".{LATEST}.partial"
    pointer.write_text(folder.name)
    _sync(pointer)
    pointer.replace(root / LATEST)
    _sync(root)
    older = sorted(path for path in root.glob("step_*") if path.name < folder.name)
    for path in older[: max(0, len(older) - keep + 1)]:
        if path.name != f"step_{spare:09d}":
            shutil.rmtree(path, ignore_errors=True)
    return folder


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None."""
    pointer = run / "checkpoints" / LATEST
    if not pointer.exists():
        return None
    folder = run / "checkpoints" / pointer.read_text().strip()
    return folder if folder.is_dir() else None


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    return _load(path, lambda: load_file(path, device=str(device)))


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file as numpy arrays; errors as in `load_tensors`."""
    return _load(path, lambda: load_numpy(path))


def _load(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated: {error}") from error


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def policy_files(policy: Policy) -> dict[str, dict[str, Any]]:
    """The two files that are a policy: weights with normaliser, and config, spec and provenance."""
    from robopost.compose import to_dict

    return {
        "policy.safetensors": dict(policy.state_dict()),
        "policy.json": {
            "format": FORMAT,
            "name": policy.registry_name or policy.config.name,
            "config": to_dict(policy.config),
            "spec": policy.spec.to_json(),
            "normaliser": policy.normaliser.provenance,
        },
    }


def find_policy(path: str | Path) -> Path:
    """The folder holding `policy.json` for a run folder, a checkpoint or a policy folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for candidate in (path, latest(path) if path.is_dir() else None):
        if candidate is not None and (candidate / "policy.json").exists():
            return candidate
    if not path.exists():
        raise CheckpointError(f"no policy at {path}: it does not exist")
    raise CheckpointError(
        f"no policy at {path}: expected a run folder with checkpoints/, or a folder with policy.json"
    )


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> Policy:
    """Load a policy to evaluate, deploy or fine-tune.

    Args:
        path: run folder (its latest checkpoint), checkpoint folder or policy folder.
        device: where the policy goes.

    Raises:
        CheckpointError: missing, corrupt, or weights that don't fit the stored config.
    """
    from robopost.compose import policy_config_from_dict

    folder = find_policy(path)
    meta = load_json(folder / "policy.json")
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / 'policy.json'}: format {meta.get('format')!r}, this version reads {FORMAT}"
        )
    spec = Spec.from_json(meta["spec"])
    policy: Policy = POLICIES.get(meta["name"]).target(policy_config_from_dict(meta["config"]), spec)
    tensors = load_tensors(folder / "policy.safetensors")
    expected = policy.state_dict()
    for key in sorted(expected.keys() ^ tensors.keys()):
        where = "lacks" if key in expected else "has the extra tensor"
        raise CheckpointError(f"{folder}: policy {meta['name']!r} {where} {key!r}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{folder}: {key!r} has shape {tuple(tensor.shape)}, its config says {tuple(expected[key].shape)}"
            )
    policy.load_state_dict(tensors)
    policy.normaliser.provenance = meta["normaliser"]
    return policy.to(device).eval()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
