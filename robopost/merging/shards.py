# SPDX-License-Identifier: Apache-2.0
"""Reading safetensors by byte ranges: one file or a sharded folder, checked from headers alone, never mapped.

Tensors are read with `pread` into buffers of the caller. A memory map would be simpler, but its pages count as the
process's memory: a 7B model would show as 28 GB although no more than a block is in use.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robopost.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
POLICY = "policy.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
READ = 1 << 22  # bytes per read where whole tensors or files pass through


@dataclass(frozen=True)
class Entry:
    """One stored tensor.

    Attributes:
        name: its key.
        code: safetensors dtype, e.g. `"BF16"`.
        shape: its shape.
        file: index into `Shards.paths`.
        start: first byte in the file.
        nbytes: its size.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    file: int
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Its torch dtype."""
        return DTYPES[self.code]

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.nbytes // self.dtype.itemsize

    @property
    def floating(self) -> bool:
        """True for weights that can be interpolated."""
        return self.code in FLOATS


@dataclass
class Shards:
    """The tensors of one checkpoint. `open_shards` makes it; read inside its context.

    Attributes:
        folder: where it lies.
        paths: its safetensors files.
        entries: tensors by name.
        metadata: `__metadata__` of all files together.
        sharded: True where an index names the files.
    """

    folder: Path
    paths: list[Path]
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    sharded: bool = False
    _files: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> Shards:
        for number, path in enumerate(self.paths):
            self._files[number] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def handle(self, file: int) -> int:
        """Descriptor of a file; inside the context only."""
        return self._files[file]

    def read(self, entry: Entry, view: memoryview, first: int = 0) -> None:
        """Fill `view` with the bytes of `entry` from byte `first` on.

        Raises:
            CheckpointError: the file ends early.
        """
        handle, offset, done = self.handle(entry.file), entry.start + first, 0
        while done < len(view):
            got = os.preadv(handle, [view[done:]], offset + done)
            if got == 0:
                raise CheckpointError(
                    f"{self.paths[entry.file]} became shorter while it was read ({entry.name!r})"
                )
            done += got

    def blocks(self, name: str, elements: int = READ // 4) -> Iterator[torch.Tensor]:
        """A tensor as flat blocks of at most `elements`; each is valid until the next."""
        entry = self.entries[name]
        size = entry.dtype.itemsize
        buffer = bytearray(min(elements, entry.count) * size)
        for first in range(0, entry.count, elements):
            count = min(elements, entry.count - first)
            self.read(entry, memoryview(buffer)[: count * size], first * size)
            yield torch.frombuffer(buffer, dtype=entry.dtype, count=count)

    def digest(self, names: list[str]) -> str:
        """SHA-256 over the names, dtypes, shapes and bytes of some tensors."""
        total = hashlib.sha256()
        for name in sorted(names):
            entry = self.entries[name]
            total.update(f"{name}:{entry.code}:{entry.shape};".encode())
            for block in self.blocks(name):
                total.update(block.view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def same_bytes(a: Shards, first: str, b: Shards, second: str) -> bool:
    """True where two tensors have the same dtype, shape and bytes."""
    one, two = a.entries[first], b.entries[second]
    if (one.code, one.shape) != (two.code, two.shape):
        return False
    pairs = zip(a.blocks(first), b.blocks(second), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def open_shards(folder: str | Path, name: str | None = None) -> Shards:
    """Open a checkpoint and check its headers against the sizes of its files.

    Args:
        folder: with an index, or a single safetensors file; or that file itself.
        name: the weights' file in the folder; default: the index, `model.safetensors`, or the only file there is.

    Raises:
        CheckpointError: no weights, a shard is missing, truncated or foreign, or two shards hold the same tensor.
    """
    folder = Path(folder)
    paths, weight_map = _files(folder, name)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for number, path in enumerate(paths):
        found, notes = read_header(path, number)
        metadata |= notes
        for entry in found:
            if entry.name in entries:
                raise CheckpointError(
                    f"{path} holds {entry.name!r}, and so does {paths[entries[entry.name].file].name}"
                )
            entries[entry.name] = entry
    for key, file in (weight_map or {}).items():
        if key not in entries or paths[entries[key].file].name != file:
            raise CheckpointError(
                f"{folder / INDEX} places {key!r} in {file}, which lacks it. Fix: copy the checkpoint again"
            )
    if not entries:
        raise CheckpointError(f"{folder} holds no tensors")
    root = folder if folder.is_dir() else folder.parent
    return Shards(root, paths, entries, metadata, sharded=weight_map is not None)


def _files(folder: Path, name: str | None) -> tuple[list[Path], Mapping[str, str] | None]:
    """Paths of the weights, and the index's map from tensor to file name where there is one."""
    if folder.is_file():
        return [folder], None
    if not folder.exists():
        raise CheckpointError(f"no checkpoint at {folder}: it does not exist")
    if name is not None:
        return [_existing(folder / name)], None
    if (folder / INDEX).exists():
        weight_map = _index(folder / INDEX)
        return [_existing(folder / file, INDEX) for file in sorted(set(weight_map.values()))], weight_map
    if (folder / SINGLE).exists():
        return [folder / SINGLE], None
    if (folder / "adapter_model.safetensors").exists():
        raise CheckpointError(
            f"{folder} is a LoRA adapter, whose two factors can't be merged one by one. "
            "Fix: fold it into its base model first (merge_and_unload of peft), then merge"
        )
    others = sorted(path for path in folder.glob("*.safetensors") if "processor" not in path.name)
    if len(others) == 1:
        return others, None
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    fix = (
        f"{pickled[0].name} is a pickle, which is not read here. Fix: save the model as safetensors"
        if pickled
        else f"expected {INDEX} or {SINGLE}"
    )
    raise CheckpointError(f"no safetensors weights in {folder}: {fix}")


def _existing(path: Path, index: str = "") -> Path:
    if not path.is_file():
        named = f", which {index} names," if index else ""
        raise CheckpointError(
            f"{path.name}{named} is missing in {path.parent}. Fix: copy the checkpoint again"
        )
    return path


def _index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no index of shards: {error!r}") from error
    for file in weight_map.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path} names the file {file!r} outside its folder")
    return weight_map


def read_header(path: Path, number: int = 0) -> tuple[list[Entry], dict[str, str]]:
    """Tensors and metadata of one safetensors file.

    Args:
        path: the file.
        number: stored as `Entry.file`.

    Raises:
        CheckpointError: missing, truncated, no safetensors file, or a quantised or unknown dtype.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes)")
            table = json.loads(file.read(length))
            items = {key: value for key, value in table.items() if key != "__metadata__"}
            entries = [
                _entry(path, key, value, number, 8 + length, size - 8 - length)
                for key, value in items.items()
            ]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupt or no safetensors file: {error}") from error
    end = 8 + length
    for entry in sorted(entries, key=lambda item: item.start):
        if entry.nbytes and entry.start != end:
            raise CheckpointError(
                f"{path} is corrupt: {entry.name!r} begins at byte {entry.start}, not {end}"
            )
        end += entry.nbytes
    if end != size:
        raise CheckpointError(f"{path} is truncated or damaged: {size} bytes, its header promises {end}")
    return entries, {str(k): str(v) for k, v in (table.get("__metadata__") or {}).items()}


def _entry(path: Path, name: str, value: Any, number: int, base: int, room: int) -> Entry:
    code, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if code not in DTYPES:
        kind = "quantised" if code.startswith(("F8", "F6", "F4", "E")) else "unknown"
        raise CheckpointError(
            f"{path}: {name!r} has the {kind} dtype {code}, which can't be interpolated. "
            f"Fix: merge the unquantised checkpoints ({', '.join(FLOATS)}), then quantise"
        )
    count = 1
    for dim in shape:
        count *= int(dim)
    if stop > room:
        raise CheckpointError(
            f"{path} is truncated: {name!r} ends at byte {base + stop}, the file has {base + room}"
        )
    if start < 0 or stop - start != count * DTYPES[code].itemsize:
        raise CheckpointError(f"{path} is corrupt: {name!r} of {code} {shape} takes {stop - start} bytes")
    return Entry(name, code, shape, number, base + start, stop - start)


def file_sha256(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file, as `sha256sum` prints it; gives up with an empty string once `stop` is set."""
    total, buffer = hashlib.sha256(), bytearray(READ)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            if stop is not None and stop.is_set():
                return ""
            total.update(view[:got])
    return total.hexdigest()
