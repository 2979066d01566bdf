# SPDX-License-Identifier: Apache-2.0
"""Orchestration of one merge: plan (which checks everything), stream, card; the output folder appears whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robopost.errors import ConfigError, RobopostError
from robopost.merging.card import model_card
from robopost.merging.config import DTYPES, MergeConfig
from robopost.merging.jobs import job
from robopost.merging.parents import TRAINING
from robopost.merging.plan import Plan, load_plan
from robopost.merging.shards import INDEX, POLICY, SINGLE, file_sha256
from robopost.merging.stream import stream
from robopost.merging.writer import FilePlan, plan_files

logger = logging.getLogger(__name__)


@dataclass
class Merged:
    """What `merge` did: the folder, seconds, bytes read of the parents and written, and warnings."""

    folder: Path
    seconds: float
    read: int
    written: int
    warnings: list[str]


def merge(
    config: MergeConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> Merged:
    """Merge and write `config.out`.

    Args:
        config: of the merge, with at most one alpha.
        progress: called with (bytes written, bytes in all).
        evaluation: what a sweep measured, for the card.

    Raises:
        RobopostError: in one line; nothing is left at `out`.
    """
    if len(config.alpha) > 1 or config.search:
        raise ConfigError("merge takes one coefficient; a sweep is robopost.merging.sweep.sweep")
    start = time.perf_counter()
    out = Path(config.out).resolve()
    for name in (config.base, *config.finetuned):
        if Path(name).resolve().is_relative_to(out):
            raise ConfigError(f"out={config.out} is where the parent {name} lies. Fix: another out=")
    with load_plan(config) as plan:
        for line in plan.warnings:
            logger.warning("%s", line)
        with replaced_folder(Path(config.out), overwrite=config.overwrite) as partial:
            write(plan, partial, progress=progress, evaluation=evaluation)
        read = sum(parent.shards.nbytes for parent in plan.parents)
        return Merged(Path(config.out), time.perf_counter() - start, read, plan.nbytes, plan.warnings)


def write(
    plan: Plan,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> None:
    """Write weights, metadata and card of `plan` into an existing folder."""
    config = plan.config
    files, index = _layout(plan)
    free = shutil.disk_usage(folder).free
    if plan.nbytes > free:
        raise RobopostError(
            f"the disk is full: the merged weights need {plan.nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free "
            f"at {folder.parent}. Fix: free some space, or out= on another disk"
        )
    paths = [path for parent in plan.parents for path in parent.files] if config.hash else []
    stop, total = threading.Event(), plan.nbytes
    with ThreadPoolExecutor(4) as pool:
        try:
            # Norms and thresholds of whole tensors are read first, tensors side by side.
            jobs = dict(zip(plan.entries, pool.map(lambda name: job(plan, name), plan.entries), strict=True))
            digests = {path: pool.submit(file_sha256, path, stop) for path in paths}
            stream(
                folder,
                files,
                jobs,
                workers=config.workers,
                progress=(lambda done: progress(done, total)) if progress else lambda done: None,
            )
            hashes = {
                parent.name: {path.name: digests[path].result() for path in parent.files if path in digests}
                for parent in plan.parents
            }
        except BaseException:
            stop.set()
            raise
    if index is not None:
        (folder / INDEX).write_bytes(index)
    _companions(plan, folder, hashes)
    (folder / "README.md").write_text(model_card(plan, hashes, evaluation), encoding="utf-8")


def _layout(plan: Plan) -> tuple[list[FilePlan], bytes | None]:
    config, base = plan.config, plan.base
    tensors = [(name, plan.code(name), entry.shape) for name, entry in plan.entries.items()]
    single = POLICY if base.layout == "robopost" else SINGLE if base.shards.sharded else base.files[0].name
    # A checkpoint in one file stays one: loaders such as lerobot's read nothing else.
    limit = int(config.shard_gb * 1e9) if base.shards.sharded else 0
    return plan_files(tensors, single=single, limit=limit, metadata=base.shards.metadata)


def _companions(plan: Plan, folder: Path, hashes: dict[str, dict[str, str]]) -> None:
    """Everything beside the weights: policy.json with provenance, or a copy of the base's other files."""
    base = plan.base
    if base.layout == "robopost":
        meta = base.meta | {"merged": provenance(plan, hashes)}
        (folder / "policy.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    weights = {path.resolve() for path in base.files}
    skip = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
    for path in sorted(base.folder.rglob("*")) if base.layout != "file" else ():
        inside = path.relative_to(base.folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        robopost = base.layout == "robopost" and inside.name in TRAINING
        if not path.is_file() or hidden or robopost or path.resolve() in weights or path.suffix in skip:
            continue
        if inside.name in (INDEX, "README.md"):
            continue
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / inside)
    code = DTYPES[plan.config.dtype]
    config = folder / "config.json"
    if code and base.layout == "hf" and config.exists():
        table = json.loads(config.read_text())
        for key in ("torch_dtype", "dtype"):
            if key in table:
                table[key] = plan.config.dtype
        config.write_text(json.dumps(table, indent=2))


def provenance(plan: Plan, hashes: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Method, coefficients and parents as JSON."""
    config = plan.config
    used = {"ties": {"keep": config.keep}, "dare": {"drop": config.drop, "seed": config.seed}}
    return {
        "method": config.method,
        "alpha": config.alpha[0] if config.alpha else None,
        "modules": config.modules,
        "family": plan.family,
        "weights": config.weights,
        "dtype": config.dtype,
        **used.get(config.method, {}),
        "parents": [
            {"path": parent.name, "files": hashes.get(parent.name, {}), "merged": parent.meta.get("merged")}
            for parent in plan.parents
        ],
    }


@contextmanager
def replaced_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block succeeds and vanishes when it fails.

    Raises:
        RobopostError: something is at `folder` already, or the disk is full.
    """
    if folder.exists() and not overwrite and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"out={folder} exists. Fix: another name, or overwrite=true")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            if path.suffix != ".safetensors":  # weights are synced by their writer
                _sync(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise RobopostError(f"can't write {folder}: {error}. Nothing was changed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
