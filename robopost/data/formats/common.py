# SPDX-License-Identifier: Apache-2.0
"""What several formats share: names of observation keys, exact dtypes, HDF5 access with one-line errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robopost.data.batch import Spec
from robopost.data.episode import Arrays, KeySpec
from robopost.errors import DataError, require, unknown

if TYPE_CHECKING:
    from robopost.data.store import EpisodeStore

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
Names = str | int | Sequence[str | int]  # the command line parses values as JSON, so that 3 comes as a number

INSTRUCTION, INSTRUCTION_BYTES = "instruction", 64


def as_names(value: Names) -> list[str]:
    """`"a,b"` or `["a", "b"]` as a list; empty means no choice was made."""
    parts = [str(value)] if isinstance(value, str | int) else [str(item) for item in value]
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def choose(kind: str, wanted: Names, available: Iterable[str]) -> list[str]:
    """The `wanted` names, checked; all of `available` when none is named."""
    options = list(available)
    names = as_names(wanted)
    for name in names:
        if name not in options:
            raise unknown(kind, name, options, DataError)
    return names or options


def obs_key(name: str) -> str:
    """`name` as an observation key: letters, digits and underscores (dots and slashes become underscores)."""
    return re.sub(r"\W+", "_", name).strip("_")


def is_image_shape(shape: Sequence[int]) -> bool:
    """True for (H, W, C) with 1, 3 or 4 channels and at least 8 x 8 pixels."""
    return len(shape) == 3 and shape[2] in (1, 3, 4) and min(shape[0], shape[1]) >= 8


def as_vectors(values: np.ndarray) -> np.ndarray:
    """Per-step numbers as float32 (T, ...); scalars per step become (T, 1)."""
    array = np.asarray(values, dtype=np.float32)
    return array[:, None] if array.ndim == 1 else array


def as_image(values: np.ndarray, where: str) -> np.ndarray:
    """Images as uint8 0..255. Floats may hold 0..255 or 0..1, told apart by the largest value."""
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"{where}: image of dtype {values.dtype}, expected uint8 or floating point")
    top = float(values.max(initial=0.0))
    if float(values.min(initial=0.0)) < 0 or top > 255 or not np.isfinite(top):
        raise DataError(f"{where}: image values up to {top}, expected 0..255 or 0..1")
    return np.rint(values * 255 if top <= 1.0 else values).astype(np.uint8)


def make_spec(
    obs: dict[str, KeySpec],
    action_dim: int,
    low: Sequence[float] | float = -np.inf,
    high: Sequence[float] | float = np.inf,
    max_steps: int = 0,
) -> Spec:
    """A Spec with scalar bounds spread over the action dimensions."""
    lows, highs = (
        np.broadcast_to(np.asarray(v, dtype=np.float64).reshape(-1), (action_dim,)) for v in (low, high)
    )
    return Spec(obs, action_dim, tuple(map(float, lows)), tuple(map(float, highs)), max_steps)


def symmetric(action_limit: float) -> tuple[float, float]:
    """Bounds of an `action_limit` option: plus and minus it, unbounded for 0."""
    if action_limit < 0:
        raise DataError(f"action_limit={action_limit} must be 0 (unknown) or the largest absolute action")
    return (-action_limit, action_limit) if action_limit else (-np.inf, np.inf)


def declared(facts: Mapping[str, Any], action_dim: int) -> tuple[float, Any, Any]:
    """Rate and action bounds that an export of ours left in a file: (fps, low, high); (0, None, None) otherwise."""
    low, high = facts.get("action_low"), facts.get("action_high")
    fps = float(facts.get("fps") or 0.0)
    if low is None or high is None or not len(low) == len(high) == action_dim:
        return fps, None, None
    return fps, list(low), list(high)


def declare(store: EpisodeStore) -> dict[str, Any]:
    """What `declared` reads back, for formats that have no place for it but allow attributes.

    Bounds are left out where one is infinite, which plain JSON can't say.
    """
    bounds = {"action_low": list(store.spec.action_low), "action_high": list(store.spec.action_high)}
    told = {INSTRUCTION: True} if INSTRUCTION in store.spec.obs else {}
    return {"fps": store.fps, **(bounds if store.spec.bounded else {}), **told}


def instruction_rows(text: str, steps: int, where: str) -> np.ndarray:
    """The observation `instruction` (steps, 64) uint8: UTF-8 of `text`, padded with zeros, in every row.

    Raises:
        DataError: the text is too long.
    """
    data = text.encode()
    if len(data) > INSTRUCTION_BYTES:
        raise DataError(
            f"{where}: the task {text!r} takes {len(data)} bytes, an instruction has {INSTRUCTION_BYTES}. "
            "Fix: instruction=no, or a shorter task"
        )
    row = np.frombuffer(data.ljust(INSTRUCTION_BYTES, b"\0"), np.uint8)
    return np.tile(row, (steps, 1))


def join_state(obs: Arrays, keys: Sequence[str]) -> Arrays:
    """`obs` with the `keys` concatenated, in this order and flattened, under `state`."""
    if not keys:
        return obs
    rest = {key: value for key, value in obs.items() if key not in keys}
    joined = np.concatenate([obs[key].reshape(len(obs[key]), -1) for key in keys], axis=1)
    return {"state": joined, **rest}


def join_state_spec(obs: dict[str, KeySpec], keys: Sequence[str]) -> dict[str, KeySpec]:
    """The declaration that belongs to `join_state`."""
    if not keys:
        return obs
    for key in keys:
        if key not in obs:
            raise unknown("observation key", key, obs, DataError)
    size = sum(int(np.prod(obs[key][0])) for key in keys)
    return {"state": ((size,), "float32"), **{key: item for key, item in obs.items() if key not in keys}}


def h5_layout(path: Path) -> str:
    """`"minari"`, `"d4rl"`, `"robomimic"`, `"torn"` (HDF5, but it does not open), or `""`. Never raises."""
    try:
        with path.open("rb") as file:
            if file.read(len(HDF5_MAGIC)) != HDF5_MAGIC:
                return ""
        h5py = require("h5py", "minari")
    except OSError:
        return ""
    except Exception:
        return "torn"  # h5py is missing: let the reader say so
    try:
        with h5py.File(path, "r") as file:
            if isinstance(file.get("data"), h5py.Group) and any(k.startswith("demo") for k in file["data"]):
                return "robomimic"
            if any(key.startswith("episode_") for key in file):
                return "minari"
            return "d4rl" if {"observations", "actions"} <= set(file) else ""
    except Exception:
        return "torn"


@contextmanager
def open_h5(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading; a torn file or a missing member raises DataError, naming both."""
    h5py = require("h5py", "minari")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path} does not open as HDF5, it may be cut short ({error}). Fix: copy it again"
        ) from error
    with file:
        try:
            yield file
        except (KeyError, OSError) as error:  # a damaged block, found when it is read
            raise DataError(f"{path}: {_plain(error)}. Fix: copy it again") from error


def member(group: Any, name: str) -> Any:
    """`group[name]` of an HDF5 file; absent raises DataError."""
    if name not in group:
        raise DataError(
            f"{group.file.filename}: {group.name} lacks {name!r}. Fix: copy it again or re-record it"
        )
    return group[name]


def h5_leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Datasets at and below an HDF5 node: path -> dataset; the path of a lone dataset is empty."""
    if not hasattr(node, "keys"):
        return {prefix: node}
    found: dict[str, Any] = {}
    for name in node:
        found |= h5_leaves(node[name], f"{prefix}/{name}" if prefix else name)
    return found


def h5_extras(node: Any, names: Sequence[str]) -> dict[str, KeySpec]:
    """Declare the members `names` of a group of per-step arrays (None = no such group) as float32 extras."""
    available = h5_leaves(node) if node is not None else {}
    for name in names:
        if name not in available:
            raise unknown("member of infos", name, available, DataError)
    return {obs_key(name): (tuple(available[name].shape[1:]) or (1,), "float32") for name in names}


def _plain(error: Exception) -> str:
    return str(error.args[0] if error.args else error).replace("\n", " ")


def numbered(names: Iterable[str], prefix: str) -> list[str]:
    """The `prefix<number>` among `names`, in numerical order (`demo_10` after `demo_9`)."""
    found = [name for name in names if re.fullmatch(rf"{re.escape(prefix)}\d+", name)]
    return sorted(found, key=lambda name: int(name[len(prefix) :]))
