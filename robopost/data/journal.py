# SPDX-License-Identifier: Apache-2.0
"""The journal of a replay buffer: safetensors segments, each written atomically, that rebuild it bitwise."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from robopost.data.files import PARTIAL, disk_errors, sync_folder
from robopost.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from robopost.data.buffer import ReplayBuffer

_NAME = re.compile(r"segment_(\d{12})_(\d{12})\.safetensors")


def segments(folder: Path) -> list[tuple[int, int, Path]]:
    """(first step, step after the last, file) of every segment, in order."""
    found = [(match, path) for path in folder.glob("segment_*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), int(match[2]), path) for match, path in found)


def write(buffer: ReplayBuffer, folder: Path) -> int:
    """Write the steps since the last segment; see `ReplayBuffer.journal`."""
    start = max(buffer.journaled, buffer.total - buffer.steps_per_env)
    if start == buffer.total:
        return buffer.total
    steps, pending = buffer.dump_steps(start)
    tensors = {name: tensor.contiguous() for name, tensor in steps.items()}
    tensors |= {f"pending.{key}": tensor.contiguous() for key, tensor in pending.items()}
    path = folder / f"segment_{start:012d}_{buffer.total:012d}.safetensors"
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(f"can't write the replay journal {path}"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            try:
                save_file(tensors, partial, metadata={"num_envs": str(buffer.num_envs)})
            except SafetensorError as error:  # it wraps the errors of the disk: ask the disk itself
                partial.unlink(missing_ok=True)
                _probe(partial, sum(tensor.nbytes for tensor in tensors.values()))
                raise CheckpointError(f"can't write the replay journal {path}: {error}") from error
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(folder)
    buffer.journaled = buffer.total
    return buffer.total


def prune(buffer: ReplayBuffer, folder: Path, cursor: int) -> None:
    """Remove segments that end before the ring of a buffer at `cursor` begins."""
    for _, stop, path in segments(folder):
        if stop <= cursor - buffer.steps_per_env:
            path.unlink(missing_ok=True)


def restore(buffer: ReplayBuffer, folder: Path, cursor: int) -> None:
    """Rebuild an empty buffer; see `ReplayBuffer.restore`."""
    if buffer.total:
        raise CheckpointError(f"the buffer already holds {buffer.total} steps. Fix: restore into a new one")
    if cursor == 0:
        return
    needed = max(0, cursor - buffer.steps_per_env)
    found = segments(folder)
    at = needed
    for first, stop, path in [item for item in found if item[1] > needed and item[0] < cursor]:
        if first > at or stop > cursor:
            break
        steps = _read(path, buffer)
        pending = {key: steps.pop(f"pending.{key}") for key in buffer.obs}
        skip = at - first
        if skip:
            keep = steps["final_index"] >= skip * buffer.num_envs
            for name in steps:
                if name.startswith("final"):
                    steps[name] = steps[name][keep]
                else:
                    steps[name] = steps[name][skip:]
            steps["final_index"] = steps["final_index"] - skip * buffer.num_envs
        buffer.load_steps(at, steps, pending if stop == cursor else None)
        at = stop
    if at != cursor:
        raise CheckpointError(
            f"the replay journal {folder} ends at step {at}, the checkpoint needs {needed}..{cursor}. "
            "Fix: resume from an older checkpoint"
        )
    for first, _, path in found:
        if first >= cursor:
            path.unlink()


def _read(path: Path, buffer: ReplayBuffer) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            steps = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the journal segment {path} can't be read: {error}") from error
    for key, store in {"action": buffer.action, **{f"obs.{k}": v for k, v in buffer.obs.items()}}.items():
        wanted = (buffer.num_envs, *store.shape[1:])
        got = tuple(steps[key].shape[1:]) if key in steps else None
        if got != wanted:
            raise CheckpointError(
                f"the journal segment {path} has {key!r} of shape {got}, this run needs {wanted}"
            )
    return steps


def _probe(path: Path, size: int) -> None:
    """Raise the OSError behind a failed write of `size` bytes, if it is one."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        path.unlink(missing_ok=True)
