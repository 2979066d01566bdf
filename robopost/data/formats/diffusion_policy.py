# SPDX-License-Identifier: Apache-2.0
"""Replay buffers of diffusion_policy: zarr v2 groups `data` and `meta/episode_ends`, folder or zip."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import zarr
from numcodecs import Blosc
from zarr.storage import LocalStore, ZipStore

from robopost.data.episode import Arrays, Episode, KeySpec
from robopost.data.files import disk_errors
from robopost.data.formats import EpisodeSource, Format
from robopost.data.formats.common import (
    Names,
    as_image,
    choose,
    declare,
    declared,
    is_image_shape,
    make_spec,
    obs_key,
)
from robopost.errors import DataError
from robopost.registry import FORMATS

if TYPE_CHECKING:
    from robopost.data.store import EpisodeStore

ENDS = "meta/episode_ends"
PUSHT_SIZE = 512.0  # Push-T acts in pixels of its 512 x 512 table
PUSHT_FPS = 10.0
CHUNK_STEPS = 512
WHOLE_BYTES = 64 << 20


@FORMATS.register("diffusion_policy")
class DiffusionPolicy(Format):
    """Replay buffer of diffusion_policy (zarr v2, folder or .zarr.zip), e.g. the Push-T human set.

    `data/img` becomes `image` (uint8), `data/<camera>_image` becomes `image_<camera>`, other arrays keep
    their names. Push-T (`state` 5, `keypoint` 9x2, `action` 2) is recognised: `keypoint` becomes 20 numbers,
    the nine points flattened and then the agent's position; `n_contacts` goes to the extras; bounds are
    0..512 and the rate 10 Hz. The set holds neither rewards (zeros, said in the metadata) nor a final
    observation.
    """

    can_write: ClassVar[bool] = True

    @classmethod
    def detect(cls, path: Path) -> bool:
        """True when there is a zarr v2 array `meta/episode_ends`."""
        if path.is_dir():
            return (path / ENDS / ".zarray").is_file()
        try:
            with zipfile.ZipFile(path) as file:
                return f"{ENDS}/.zarray" in file.namelist()
        except (OSError, zipfile.BadZipFile):
            return False

    @classmethod
    def read(cls, path: Path, *, keys: Names = "", fps: float = 0.0) -> EpisodeSource:
        """Open the buffer.

        Args:
            path: folder or zip.
            keys: observation keys to take, e.g. `"state,keypoint"`. Default: all but images, which are large;
                if there are only images, those.
            fps: steps per second, which the format doesn't store; default 10 for Push-T, else 0 (unknown).
        """
        with _open(path) as group:
            ends = _ends(group, path)
            attributes = dict(group.attrs)
            arrays = {name: (tuple(a.shape), a.dtype) for name, a in group["data"].arrays()}  # type: ignore[union-attr]
        for name, (shape, _) in arrays.items():
            if shape[0] != ends[-1]:
                raise DataError(f"{path}: data/{name} has {shape[0]} rows, meta/episode_ends say {ends[-1]}")
        if "action" not in arrays:
            raise DataError(f"{path}: no data/action, only {', '.join(sorted(arrays))}")
        pusht = {k: arrays[k][0][1:] for k in ("state", "keypoint", "action") if k in arrays} == {
            "state": (5,),
            "keypoint": (9, 2),
            "action": (2,),
        }
        reward = next((name for name in ("reward", "rewards") if name in arrays), "")
        extras = ["n_contacts"] if pusht and "n_contacts" in arrays else []
        fields = {
            _key(n, s): n for n, (s, _) in sorted(arrays.items()) if n not in ("action", reward, *extras)
        }
        images = {key for key, name in fields.items() if is_image_shape(arrays[name][0][1:])}
        low_dim = [key for key in fields if key not in images]
        chosen = choose("key", keys, fields) if keys else low_dim or list(fields)

        spec_obs: dict[str, KeySpec] = {}
        for key in chosen:
            shape = arrays[fields[key]][0][1:] or (1,)
            spec_obs[key] = (shape, "uint8" if key in images else "float32")
        if pusht and "keypoint" in spec_obs:
            spec_obs["keypoint"] = ((20,), "float32")

        def episodes() -> Iterator[Episode]:
            with _open(path) as group:
                columns, start = _Columns(group), 0
                for index, end in enumerate(map(int, ends)):
                    rows = slice(start, end)
                    where = f"{path}, episode {index}"
                    obs: Arrays = {}
                    for key in chosen:
                        value = columns.rows(fields[key], rows, where)
                        obs[key] = as_image(value, where) if key in images else value.astype(np.float32)
                        obs[key] = obs[key].reshape(end - start, *(obs[key].shape[1:] or (1,)))
                    if pusht and "keypoint" in obs:
                        agent = columns.rows("state", rows, where)[:, :2].astype(np.float32)
                        obs["keypoint"] = np.concatenate([obs["keypoint"].reshape(-1, 18), agent], axis=1)
                    given = columns.rows(reward, rows, where).reshape(-1) if reward else np.zeros(end - start)
                    yield Episode(
                        obs=obs,
                        action=columns.rows("action", rows, where).astype(np.float32),
                        reward=given.astype(np.float32),
                        terminated=False,
                        truncated=True,
                        extras={key: columns.rows(key, rows, where).astype(np.float32) for key in extras},
                        has_final_obs=False,
                    )
                    start = end

        action_dim = arrays["action"][0][1]
        rate, low, high = declared(attributes, action_dim)
        if low is None:
            low, high = (0.0, PUSHT_SIZE) if pusht else (-np.inf, np.inf)
        return EpisodeSource(
            make_spec(spec_obs, action_dim, low, high),
            fps or rate or (PUSHT_FPS if pusht else 0.0),
            f"diffusion_policy {path.name}",
            episodes(),
            count=len(ends),
            extras={key: (arrays[key][0][1:], "float32") for key in extras},
            options={"keys": chosen},
            metadata={
                "task": "pusht" if pusht else "",
                "rewards": "recorded" if reward else "none in the set, zeros",
            },
        )

    @classmethod
    def write(cls, store: EpisodeStore, path: Path) -> None:
        """Export to a folder, or to one file where `path` ends in `.zip`.

        Final observations, end flags and instructions have no place in this format and are left out.
        """
        with disk_errors(f"can't write {path}"):
            zipped = path.suffix == ".zip"
            target = ZipStore(path, mode="w") if zipped else LocalStore(path)
            try:
                _write(store, target)
            except BaseException:
                target.close()
                path.unlink(missing_ok=True) if zipped else shutil.rmtree(path, ignore_errors=True)
                raise
            target.close()


def _write(store: EpisodeStore, target: ZipStore | LocalStore) -> None:
    group = zarr.open_group(target, mode="w", zarr_format=2, attributes=declare(store))
    data, meta = group.create_group("data"), group.create_group("meta")
    names = {"action": "action", "reward": "reward"}
    names |= {f"obs.{key}": _name(key) for key in store.spec.obs}
    names |= {f"extra.{key}": key for key in store.extras}
    steps = store.num_steps
    for source, name in names.items():
        like = store.array(f"data/{source}")
        block = max(1, CHUNK_STEPS // 8) if len(like.shape) == 4 else CHUNK_STEPS
        array = data.create_array(
            name,
            shape=(steps, *like.shape[1:]),
            dtype=like.dtype,
            chunks=(block, *like.shape[1:]),
            compressors=Blosc(cname="zstd", clevel=5),
        )
        for start in range(0, steps, block):
            stop = min(start + block, steps)
            array[start:stop] = store.rows(f"data/{source}", start, stop)
    ends = np.asarray(store.episode_ends, np.int64)
    meta.create_array("episode_ends", shape=ends.shape, dtype=ends.dtype, chunks=(max(1, len(ends)),))[:] = (
        ends
    )


def _key(name: str, shape: tuple[int, ...]) -> str:
    if not is_image_shape(shape[1:]):
        return obs_key(name)
    camera = obs_key(name.removesuffix("_image").removesuffix("_img"))
    return "image" if name in ("img", "image") else f"image_{camera.removeprefix('image_')}"


def _name(key: str) -> str:
    return (
        "img"
        if key == "image"
        else f"{key.removeprefix('image_')}_image"
        if key.startswith("image_")
        else key
    )


@contextmanager
def _open(path: Path) -> Iterator[zarr.Group]:
    try:
        store: Any = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode="r")
        group = zarr.open_group(store, mode="r", zarr_format=2)
    except Exception as error:  # a torn zip, absent or broken metadata: each layer has its own kind
        raise DataError(f"{path} does not open as zarr v2 ({error}). Fix: copy it again") from error
    try:
        yield group
    finally:
        store.close()


def _ends(group: zarr.Group, path: Path) -> np.ndarray:
    try:
        ends = np.asarray(group[ENDS][:]).astype(np.int64)  # type: ignore[index]
    except Exception as error:
        raise DataError(f"{path}: {ENDS} can't be read ({error}). Fix: copy it again") from error
    if ends.size == 0 or np.any(np.diff(ends, prepend=0) <= 0):
        raise DataError(f"{path}: {ENDS} must rise, they are {ends}")
    return ends


class _Columns:
    """Rows of the arrays under `data`; small ones are read once, since any zarr read costs milliseconds."""

    def __init__(self, group: zarr.Group) -> None:
        self._data: Any = group["data"]
        self._arrays: dict[str, Any] = {}

    def rows(self, name: str, rows: slice, where: str) -> np.ndarray:
        """A slice of one array; what can't be read raises DataError."""
        try:
            if name not in self._arrays:
                array = self._arrays[name] = self._data[name]
                if array.size * array.dtype.itemsize <= WHOLE_BYTES:
                    with suppress(Exception):  # a torn block: the episode that needs it says so
                        self._arrays[name] = array[:]
            return np.asarray(self._arrays[name][rows])
        except Exception as error:  # every codec raises its own kind
            raise DataError(
                f"{where}: data/{name} can't be read ({type(error).__name__}: {error})"
            ) from error
