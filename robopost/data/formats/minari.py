# SPDX-License-Identifier: Apache-2.0
"""Minari datasets: a folder with `main_data.hdf5` (one group per episode) and `metadata.json`."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from robopost.data.episode import Arrays, Episode, KeySpec
from robopost.data.files import disk_errors
from robopost.data.formats import EpisodeSource, Format
from robopost.data.formats.common import (
    Names,
    as_names,
    as_vectors,
    h5_extras,
    h5_layout,
    h5_leaves,
    is_image_shape,
    join_state,
    join_state_spec,
    make_spec,
    member,
    numbered,
    obs_key,
    open_h5,
    symmetric,
)
from robopost.errors import DataError, require
from robopost.registry import FORMATS

if TYPE_CHECKING:
    from robopost.data.store import EpisodeStore

MAIN, META = "main_data.hdf5", "metadata.json"


@FORMATS.register("minari")
class Minari(Format):
    """Minari dataset (HDF5). An episode has T + 1 observations, so nothing is lost.

    A Box observation becomes `state` (or `image`), a Dict keeps its keys, text becomes the instruction.
    """

    can_write: ClassVar[bool] = True

    @classmethod
    def detect(cls, path: Path) -> bool:
        """True for a folder with main_data.hdf5 (or one below `data`), or an HDF5 file of episode groups."""
        if path.is_dir():
            return _main(path) is not None
        return path.is_file() and h5_layout(path) in ("minari", "torn")

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        state: Names = "",
        infos: Names = "",
        action_limit: float = 0.0,
        fps: float = 0.0,
    ) -> EpisodeSource:
        """Open a dataset folder or an HDF5 file.

        Args:
            path: the dataset's folder, its `data` folder, or the HDF5 file.
            state: observation keys to concatenate under `state`, in this order, e.g.
                `"observation,achieved_goal,desired_goal"`.
            infos: members of `infos` to keep as per-step extras, e.g. `"qpos,qvel"`.
            action_limit: actions lie within plus and minus this; 0 = the bounds of the metadata, or none.
            fps: steps per second, which the format doesn't store; 0 = unknown, or what an export of ours has left.
        """
        main = _main(path) if path.is_dir() else path
        if main is None:
            raise DataError(
                f"{path} holds no {MAIN}; Minari's arrow storage is not read. Fix: save it as hdf5"
            )
        source = _read(main, as_names(infos), action_limit)
        keys = as_names(state)
        source.spec = make_spec(
            join_state_spec(source.spec.obs, keys),
            source.spec.action_dim,
            source.spec.action_low,
            source.spec.action_high,
        )
        source.fps = fps or source.fps
        source.options = {"state": keys, "infos": as_names(infos), "action_limit": action_limit}
        if keys:
            source.episodes = _joined(source.episodes, keys)
        return source

    @classmethod
    def write(cls, store: EpisodeStore, path: Path, *, dataset_id: str = "", author: str = "") -> None:
        """Export to `path/data/{main_data.hdf5,metadata.json}`, where Minari looks for it.

        Minari needs the observation after the last action. For an episode without one, the last observation
        is repeated when it terminated (nothing bootstraps from it) and the last step is dropped when it was
        cut.

        Args:
            store: what to export.
            path: dataset folder, e.g. `~/.minari/datasets/arm/push-v0`.
            dataset_id: Minari's name; default `robopost/<folder>-v0`.
            author: kept in the metadata.
        """
        h5py = require("h5py", "minari")
        with disk_errors(f"can't write {path}"):
            try:
                (path / "data").mkdir(parents=True)
                with h5py.File(path / "data" / MAIN, "w", track_order=True) as file:
                    steps = sum(_write_episode(file, i, episode) for i, episode in enumerate(store))
                meta = _metadata(store, steps, dataset_id or f"robopost/{obs_key(path.name)}-v0", author)
                (path / "data" / META).write_text(json.dumps(meta))
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise


def _main(path: Path) -> Path | None:
    return next((p for p in (path / MAIN, path / "data" / MAIN) if p.is_file()), None)


def _joined(episodes: Any, keys: list[str]) -> Iterator[Episode]:
    for episode in episodes:
        episode.obs = join_state(episode.obs, keys)
        yield episode


def _named(leaves: dict[str, Any], space: dict[str, Any]) -> dict[str, tuple[Any, KeySpec, str]]:
    """Observation key -> (dataset, shape and dtype per step, how it is stored)."""
    named: dict[str, tuple[Any, KeySpec, str]] = {}
    for name, data in leaves.items():
        declared = _subspace(space, name)
        shape = tuple(declared["shape"]) if declared.get("shape") is not None else tuple(data.shape[1:])
        if data.dtype == object and declared.get("dtype") != "uint8":
            named[obs_key(name)] = (data, ((), "str"), "text")
            continue
        jpeg = data.dtype == object or (data.dtype == np.uint8 and data.ndim == 2 and len(shape) == 3)
        if is_image_shape(shape) and (jpeg or data.dtype == np.uint8):
            key = obs_key(name)
            named[key if key.startswith("image") else f"image_{key}" if key else "image"] = (
                data,
                (shape, "uint8"),
                "jpeg" if jpeg else "raw",
            )
        else:
            named[obs_key(name) or "state"] = (data, (shape or (1,), "float32"), "raw")
    return named


def _subspace(space: dict[str, Any], name: str) -> dict[str, Any]:
    """The serialised space of the member at path `name` of a Dict or Tuple space."""
    for part in filter(None, name.split("/")):
        inner = space.get("subspaces", {})
        space = inner[int(part.removeprefix("_index_"))] if isinstance(inner, list) else inner.get(part, {})
    return space


def _load(data: Any, how: str, rows: slice) -> np.ndarray:
    if how == "jpeg":
        imageio = require("imageio.v3", "minari")
        return np.stack([imageio.imread(io.BytesIO(bytes(item))) for item in data[rows]])
    return data[rows] if data.dtype == np.uint8 and data.ndim == 4 else as_vectors(data[rows])


def _read(main: Path, infos: list[str], action_limit: float) -> EpisodeSource:
    meta_path = main.parent / META
    try:
        meta = json.loads(meta_path.read_text()) if meta_path.is_file() else {}
        obs_space = json.loads(meta.get("observation_space", "{}"))
        action_space = json.loads(meta.get("action_space", "{}"))
    except ValueError as error:
        raise DataError(f"{meta_path} is torn ({error}). Fix: copy it again") from error
    with open_h5(main) as file:
        names = numbered(file, "episode_")
        if not names:
            raise DataError(f"{main} has no episode_<n> groups. Fix: name another format with data.format")
        first = file[names[0]]
        named = _named(h5_leaves(member(first, "observations")), obs_space)
        action_dim = int(np.prod(member(first, "actions").shape[1:], dtype=int)) or 1
        extras = h5_extras(first.get("infos"), infos)
    low, high = action_space.get("low"), action_space.get("high")
    if action_limit or low is None or high is None:
        low, high = symmetric(action_limit)

    def episodes() -> Iterator[Episode]:
        with open_h5(main) as file:
            for name in names:
                group = file[name]
                steps = len(member(group, "actions"))
                obs: Arrays = {}
                text = str(_scalar(group.attrs.get("instruction", "")))
                for key, (like, (shape, _), how) in _named(
                    h5_leaves(member(group, "observations")), obs_space
                ).items():
                    if how == "text":
                        text = text or str(_scalar(like[0]))
                        continue
                    value = _load(like, how, slice(None))
                    obs[key] = value.reshape(len(value), *shape)
                info = h5_leaves(group["infos"]) if "infos" in group else {}
                success = info.get("success")
                yield Episode(
                    obs=obs,
                    action=as_vectors(member(group, "actions")[:]).reshape(steps, -1),
                    reward=as_vectors(member(group, "rewards")[:])[:, 0],
                    terminated=bool(member(group, "terminations")[-1]) if steps else False,
                    truncated=bool(member(group, "truncations")[-1])
                    or not bool(member(group, "terminations")[-1])
                    if steps
                    else True,
                    success=bool(np.any(success[:])) if success is not None else None,
                    instruction=text,
                    extras={obs_key(k): as_vectors(info[k][:])[-steps:] for k in infos},
                    metadata={k: _scalar(v) for k, v in group.attrs.items() if k in ("id", "seed")},
                )

    obs = {key: item for key, (_, item, how) in named.items() if how != "text"}
    kept = {k: v for k, v in meta.items() if k not in ("observation_space", "action_space") and _is_plain(v)}
    return EpisodeSource(
        make_spec(obs, action_dim, low, high),
        float(meta.get("fps") or 0.0),
        f"minari {meta.get('dataset_id', main.name)}",
        episodes(),
        count=len(names),
        extras=extras,
        metadata=kept,
    )


def _scalar(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list)


def _write_episode(file: Any, index: int, episode: Episode) -> int:
    steps = len(episode)
    obs = episode.obs
    if not episode.has_final_obs:
        if episode.terminated:
            obs = {key: np.concatenate([value, value[-1:]]) for key, value in obs.items()}
        else:
            steps -= 1
    if steps < 1:
        raise DataError(
            f"episode {index} has one step, was cut and has no final observation: Minari can't hold it. "
            "Fix: leave it out of the store"
        )
    group = file.create_group(f"episode_{index}")
    group.attrs["id"] = index
    group.attrs["total_steps"] = steps
    if episode.instruction:
        group.attrs["instruction"] = episode.instruction
    if isinstance(episode.metadata.get("seed"), int):
        group.attrs["seed"] = episode.metadata["seed"]
    if list(obs) == ["state"]:
        _put(group, "observations", obs["state"])
    else:
        for key, value in obs.items():
            _put(group.require_group("observations"), key, value)
    _put(group, "actions", episode.action[:steps])
    _put(group, "rewards", episode.reward[:steps])
    last = np.arange(steps) == steps - 1
    _put(group, "terminations", last & episode.terminated)
    _put(group, "truncations", last & (not episode.terminated))
    infos = {key: np.concatenate([value[:1], value[:steps]]) for key, value in episode.extras.items()}
    if episode.success is not None:
        infos["success"] = np.append(np.zeros(steps, bool), bool(episode.success))
    for key, value in infos.items():
        _put(group.require_group("infos"), key, value)
    return steps


def _put(group: Any, name: str, value: np.ndarray) -> None:
    group.create_dataset(name, data=value, chunks=True, maxshape=(None, *value.shape[1:]), compression="gzip")


def _metadata(store: EpisodeStore, steps: int, dataset_id: str, author: str) -> dict[str, Any]:
    spec = store.spec
    spaces = {key: _box(shape, dtype) for key, (shape, dtype) in spec.obs.items()}
    obs = spaces["state"] if list(spaces) == ["state"] else {"type": "Dict", "subspaces": spaces}
    bounds = {"low": list(spec.action_low), "high": list(spec.action_high)}
    action = {"type": "Box", "dtype": "float32", "shape": [spec.action_dim], **bounds}
    images = any(len(shape) == 3 for shape, _ in spec.obs.values())
    return {
        "total_episodes": len(store),
        "total_steps": steps,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(obs),
        "action_space": json.dumps(action),
        "dataset_id": dataset_id,
        # Images that are not JPEG need a Minari that reads `jpeg_encoding`; everything else any 0.5 reads.
        "minari_version": "0.5.4" if images else "0.5.0",
        "author": [author] if author else [],
        "description": f"Exported by robopost from {store.source}",
        "dataset_size": 0.0,
        "fps": store.fps,
    }


def _box(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    low, high = (0, 255) if dtype == "uint8" else (-np.inf, np.inf)
    return {
        "type": "Box",
        "dtype": dtype,
        "shape": list(shape),
        "low": np.full(shape, low).tolist(),
        "high": np.full(shape, high).tolist(),
    }
