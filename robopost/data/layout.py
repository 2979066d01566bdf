# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and identities inside an `EpisodeStore`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from robopost.data.batch import Spec
from robopost.data.episode import Episode, KeySpec
from robopost.data.files import DurableStore
from robopost.data.stats import Running, moments, stats_shape
from robopost.errors import DataError

FORMAT_VERSION = 1
CHUNK_BYTES = 256 << 10  # one compressed unit
SHARD_BYTES = 16 << 20  # one file


def is_store(path: Path) -> bool:
    """True when `path` is a robopost store (of any version, whole or not)."""
    try:
        return "robopost" in json.loads((path / "zarr.json").read_bytes()).get("attributes", {})
    except (OSError, ValueError, AttributeError):
        return False


def data_arrays(spec: Spec, extras: dict[str, KeySpec]) -> dict[str, KeySpec]:
    """Arrays under `data/`: name -> (row shape, dtype)."""
    out: dict[str, KeySpec] = {
        f"obs.{key}": (tuple(shape), dtype) for key, (shape, dtype) in spec.obs.items()
    }
    out |= {"action": ((spec.action_dim,), "float32"), "reward": ((), "float32")}
    return out | {f"extra.{key}": (tuple(shape), dtype) for key, (shape, dtype) in extras.items()}


def meta_arrays(spec: Spec) -> dict[str, KeySpec]:
    """Arrays under `meta/`: name -> (row shape, dtype)."""
    out: dict[str, KeySpec] = {"episode_ends": ((), "int64"), "episodes": ((), "uint8")}
    return out | {f"final_obs.{key}": (tuple(shape), dtype) for key, (shape, dtype) in spec.obs.items()}


def shard_rows(shape: tuple[int, ...], dtype: str) -> int:
    """Rows of one shard file."""
    chunk = _chunk_rows(shape, dtype)
    return chunk * max(SHARD_BYTES // max(chunk * _row_bytes(shape, dtype), 1), 1)


def shard_files(array: zarr.Array, folder: Path, start: int, stop: int) -> list[Path]:
    """The files that hold rows [start, stop) of an array of `create_array` in `folder`."""
    unit = (array.shards or array.chunks)[0]
    rest = ["0"] * (len(array.shape) - 1)
    return (
        [folder.joinpath("c", str(i), *rest) for i in range(start // unit, -(-stop // unit))]
        if stop > start
        else []
    )


def create_array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """An empty, growable, sharded array whose chunks carry checksums."""
    group.create_array(
        name,
        shape=(0, *shape),
        dtype=dtype,
        chunks=(_chunk_rows(shape, dtype), *shape),
        shards=(shard_rows(shape, dtype), *shape),
        compressors=(BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"), Crc32cCodec()),
    )


def create_group(
    path: Path, spec: Spec, *, fps: float, source: str, extras: dict[str, KeySpec], metadata: dict[str, Any]
) -> None:
    """Write a store without episodes."""
    path.mkdir(parents=True, exist_ok=True)
    group = zarr.open_group(DurableStore(path), mode="w")
    data, meta = group.create_group("data"), group.create_group("meta")
    for name, (shape, dtype) in data_arrays(spec, extras).items():
        create_array(data, name, shape, dtype)
    for name, (shape, dtype) in meta_arrays(spec).items():
        create_array(meta, name, shape, dtype)
    meta.attrs["commit"] = empty_commit(spec, fps)
    # Last: a folder without it is no store.
    group.attrs["robopost"] = {
        "format": FORMAT_VERSION,
        "spec": spec_to_json(spec),
        "fps": fps,
        "source": source,
        "extras": {key: [list(shape), dtype] for key, (shape, dtype) in extras.items()},
        "metadata": metadata,
    }


def _row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return max(int(math.prod(shape)) * np.dtype(dtype).itemsize, 1)


def _chunk_rows(shape: tuple[int, ...], dtype: str) -> int:
    return max(CHUNK_BYTES // _row_bytes(shape, dtype), 1)


def spec_to_json(spec: Spec) -> dict[str, Any]:
    """`Spec.to_json` with infinite bounds as text, which strict JSON readers need."""
    data = spec.to_json()
    for name in ("action_low", "action_high"):
        data[name] = [v if math.isfinite(v) else str(v) for v in data[name]]
    return data


def spec_from_json(data: dict[str, Any]) -> Spec:
    """Reverse `spec_to_json`."""
    bounds = {name: [float(v) for v in data[name]] for name in ("action_low", "action_high")}
    return Spec.from_json({**data, **bounds})


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a `zarr.json` document; absent or torn raises DataError."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: the {what} is missing, so this is no robopost store. Fix: check the path"
        ) from error
    except NotADirectoryError as error:
        raise DataError(
            f"{path.parent} is a file, no store. Fix: robopost data import {path.parent}"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: the {what} is torn ({error}). Fix: restore it from a copy") from error
    if not isinstance(data, dict) or not isinstance(data.get("attributes", {}), dict):
        raise DataError(f"{path}: the {what} is torn (no attributes). Fix: restore it from a copy")
    return data.get("attributes", {})


def read_header(path: Path) -> dict[str, Any]:
    """What `create_group` wrote about the store at `path`; no store, or of another version, raises DataError."""
    header = read_json(path / "zarr.json", "header").get("robopost")
    if header is None:
        raise DataError(f"{path} is a zarr group but no robopost store. Fix: robopost data import {path}")
    if header.get("format") != FORMAT_VERSION:
        raise DataError(
            f"{path} has store format {header.get('format')!r}, this version reads {FORMAT_VERSION}. "
            "Fix: export it with the version that wrote it, or upgrade robopost"
        )
    return header


def acquire_lock(path: Path) -> BinaryIO:
    """Become the one writer of the store at `path` until the returned file is closed."""
    file = (path / "zarr.json").open(
        "r+b"
    )  # the header: it never changes, so it needs no lock file beside it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise DataError(f"{path} is being written by another process. Fix: wait for it or stop it") from error
    return file


def empty_commit(spec: Spec, fps: float) -> dict[str, Any]:
    """The commit record of a store without episodes."""
    identity = json.dumps([spec_to_json(spec), fps], sort_keys=True).encode()
    stats = {key: Running.empty(shape).to_json() for key, shape in stats_keys(spec).items()}
    start = hashlib.blake2b(identity, digest_size=8).hexdigest()
    return {"episodes": 0, "steps": 0, "json_bytes": 0, "dataset_id": start, "stats": stats}


def stats_keys(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Keys that have statistics -> shape of the statistics."""
    shapes = {key: stats_shape(shape, dtype) for key, (shape, dtype) in spec.obs.items()}
    shapes |= {"action": (spec.action_dim,), "reward": ()}
    return {key: shape for key, shape in shapes.items() if shape is not None}


def count_episode(episode: Episode, running: dict[str, Running]) -> None:
    """Add an episode to running statistics; the final observation, which has no action, is not counted."""
    for key, into in running.items():
        rows = {"action": episode.action, "reward": episode.reward}.get(key)
        moments(episode.obs[key][: len(episode)] if rows is None else rows, into)


def episode_json(episode: Episode, mark: str) -> dict[str, Any]:
    """The line of `meta/episodes` for an episode whose digest is `mark`."""
    return {
        "length": len(episode),
        "terminated": episode.terminated,
        "truncated": episode.truncated,
        "success": episode.success,
        "instruction": episode.instruction,
        "has_final_obs": episode.has_final_obs,
        "metadata": episode.metadata,
        "digest": mark,
    }


def episode_blocks(
    episodes: list[Episode], spec: Spec, extras: dict[str, KeySpec]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every array under `data/` with the rows of `episodes`, one array at a time."""
    for key in spec.obs:
        yield f"obs.{key}", np.concatenate([episode.obs[key][: len(episode)] for episode in episodes])
    yield "action", np.concatenate([episode.action for episode in episodes])
    yield "reward", np.concatenate([episode.reward for episode in episodes])
    for key in extras:
        yield f"extra.{key}", np.concatenate([episode.extras[key] for episode in episodes])


def digest(episode: Episode) -> str:
    """Hash of everything training reads from an episode (not of its metadata), 16 hexadecimal digits."""
    flags = [
        episode.terminated,
        episode.truncated,
        episode.success,
        episode.instruction,
        episode.has_final_obs,
    ]
    mark = hashlib.blake2b(json.dumps([len(episode), *flags]).encode(), digest_size=8)
    for group in (episode.obs, {"action": episode.action, "reward": episode.reward}, episode.extras):
        for key in sorted(group):
            mark.update(key.encode() + b"\0")
            mark.update(np.ascontiguousarray(group[key]).data)
    return mark.hexdigest()


def chain_id(identity: str, mark: str) -> str:
    """Identity of a dataset after appending an episode with digest `mark`."""
    return hashlib.blake2b((identity + mark).encode(), digest_size=8).hexdigest()
