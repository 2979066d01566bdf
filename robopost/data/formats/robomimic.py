# SPDX-License-Identifier: Apache-2.0
"""robomimic HDF5: `data/demo_<i>/{obs,next_obs,actions,rewards,dones,states}` and `mask` filters."""

from __future__ import annotations

import json
import logging
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
    choose,
    declare,
    declared,
    h5_layout,
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
from robopost.errors import DataError, require, unknown
from robopost.registry import FORMATS

if TYPE_CHECKING:
    from robopost.data.store import EpisodeStore

log = logging.getLogger(__name__)
ROBOSUITE_FPS = 20.0
GYM_TYPE = 2  # robomimic.envs.env_base.EnvType.GYM_TYPE


@FORMATS.register("robomimic")
class Robomimic(Format):
    """robomimic HDF5 demonstrations.

    `<camera>_image` becomes `image_<camera>`, other observations keep their names. The final observation is
    the last row of `next_obs`. `dones[-1]` says terminated. `states` (simulator states) become an extra,
    `ep_meta.lang` the instruction, `mask` filters a list in the episode's metadata.
    """

    can_write: ClassVar[bool] = True

    @classmethod
    def detect(cls, path: Path) -> bool:
        """True for an HDF5 file with `data/demo_<i>` groups."""
        return path.is_file() and h5_layout(path) == "robomimic"

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        keys: Names = "",
        state: Names = "",
        mask: str = "",
        states: bool = False,
        action_limit: float = 0.0,
        fps: float = 0.0,
    ) -> EpisodeSource:
        """Open the file.

        Args:
            path: the HDF5 file.
            keys: observation keys to take (names after mapping, e.g. `image_agentview`). Default: all.
            state: low-dimensional keys to concatenate under `state`, in this order, e.g.
                `"robot0_eef_pos,robot0_eef_quat,robot0_gripper_qpos,object"`.
            mask: take only the demonstrations of this filter, e.g. `"train"`.
            states: keep the simulator states as the extra `states`.
            action_limit: actions lie within plus and minus this; 0 = 1, which robomimic asks for, or the
                bounds that an export of ours has left in the file.
            fps: control rate; 0 = 20 Hz, as in robosuite's tasks, or the rate that an export of ours has left.
        """
        joined = as_names(state)
        with open_h5(path) as file:
            names = _chosen(file, mask, path)
            first = file["data"][names[0]]
            if "obs" not in first:
                raise DataError(
                    f"{path}: {names[0]} holds simulator states and no obs. "
                    "Fix: extract observations with robomimic's dataset_states_to_obs.py"
                )
            fields = {_key(name, item.shape): name for name, item in first["obs"].items()}
            chosen = choose("observation key", [*as_names(keys), *joined] if keys else "", fields)
            obs = {key: _declare(key, first["obs"][fields[key]].shape[1:]) for key in dict.fromkeys(chosen)}
            obs = join_state_spec(obs, joined)
            action_dim = member(first, "actions").shape[1]
            extras: dict[str, KeySpec] = {}
            if states:
                if "states" not in first:
                    raise DataError(f"{path}: {names[0]} has no states. Fix: states=false")
                extras["states"] = (tuple(first["states"].shape[1:]), "float64")
            env_args = _env_args(file, path)
            rate, low, high = declared(file["data"].attrs, action_dim)
            masks = (
                {name: set(_texts(item[:])) for name, item in file["mask"].items()} if "mask" in file else {}
            )
        if action_limit or low is None:
            low, high = symmetric(action_limit or 1.0)
        sparse = env_args.get("env_kwargs", {}).get("reward_shaping") is False

        def episodes() -> Iterator[Episode]:
            with open_h5(path) as file:
                for name in names:
                    demo = file["data"][name]
                    steps = len(member(demo, "actions"))
                    where = f"{path}: {name}"
                    has_next = "next_obs" in demo
                    values: Arrays = {}
                    for key in dict.fromkeys(chosen):
                        rows = member(member(demo, "obs"), fields[key])[:]
                        if has_next:
                            rows = np.concatenate([rows, member(demo["next_obs"], fields[key])[-1:]])
                        values[key] = rows if rows.dtype == np.uint8 and rows.ndim == 4 else as_vectors(rows)
                    for field in ("rewards", "dones", *(["states"] if states else [])):
                        if field in demo and len(demo[field]) != steps:
                            raise DataError(
                                f"{where}: {field} has {len(demo[field])} rows and actions {steps}"
                            )
                    reward = (
                        as_vectors(demo["rewards"][:])[:, 0]
                        if "rewards" in demo
                        else np.zeros(steps, np.float32)
                    )
                    done = bool(demo["dones"][-1]) if "dones" in demo and steps else False
                    success = demo.attrs.get("success", bool(reward.max(initial=0) > 0) if sparse else None)
                    yield Episode(
                        obs=join_state(values, joined),
                        action=as_vectors(demo["actions"][:]),
                        reward=reward,
                        terminated=done,
                        truncated=not done,
                        success=None if success is None else bool(success),
                        instruction=_language(demo),
                        extras={"states": np.asarray(demo["states"][:], np.float64)} if states else {},
                        metadata={
                            "demo": name,
                            "masks": sorted(m for m, demos in masks.items() if name in demos),
                        },
                        has_final_obs=has_next,
                    )

        return EpisodeSource(
            make_spec(obs, action_dim, low, high),
            fps or rate or ROBOSUITE_FPS,
            f"robomimic {path.name}",
            episodes(),
            count=len(names),
            extras=extras,
            options={"keys": as_names(keys), "state": joined, "mask": mask, "action_limit": action_limit},
            metadata={"env_args": env_args},
        )

    @classmethod
    def write(cls, store: EpisodeStore, path: Path, *, env_name: str = "", valid: float = 0.0) -> None:
        """Export to one HDF5 file.

        `next_obs` is written when every episode has a final observation, which robomimic's offline RL needs;
        its behaviour cloning doesn't.

        Args:
            store: what to export.
            path: the file.
            env_name: Gymnasium id for `env_args`, when the store doesn't come from robomimic.
            valid: share of episodes in the filter `mask/valid` (the last ones), the others go to
                `mask/train`; 0 = filters as they were imported.
        """
        if not 0 <= valid < 1:
            raise DataError(f"valid={valid} must be at least 0 and below 1")
        h5py = require("h5py", "minari")
        if max(map(abs, (*store.spec.action_low, *store.spec.action_high))) > 1:
            log.warning("%s: actions may leave -1..1, the range robomimic trains in", store.path)
        env_args = store.metadata.get("env_args") or {
            "env_name": env_name,
            "type": GYM_TYPE,
            "env_kwargs": {},
        }
        final = all(info["has_final_obs"] for info in store.episode_info)
        masks: dict[str, list[str]] = {}
        with disk_errors(f"can't write {path}"):
            try:
                with h5py.File(path, "w") as file:
                    data = file.create_group("data")
                    data.attrs["env_args"] = json.dumps(env_args)
                    data.attrs["total"] = store.num_steps
                    data.attrs.update(declare(store))
                    for index, episode in enumerate(store):
                        _write_demo(data.create_group(f"demo_{index}"), episode, final)
                        for mask in episode.metadata.get("masks", []):
                            masks.setdefault(str(mask), []).append(f"demo_{index}")
                    if valid:
                        split = len(store) - max(1, round(valid * len(store)))
                        demos = [f"demo_{index}" for index in range(len(store))]
                        masks |= {"train": demos[:split], "valid": demos[split:]}
                    for mask, demos in masks.items():
                        file.create_dataset(f"mask/{mask}", data=np.array(demos, dtype="S"))
            except BaseException:
                path.unlink(missing_ok=True)
                raise


def _chosen(file: Any, mask: str, path: Path) -> list[str]:
    names = numbered(file["data"], "demo_")
    if mask:
        filters: Any = file.get("mask", {})
        if mask not in filters:
            raise unknown("mask", mask, list(filters), DataError)
        wanted = set(_texts(filters[mask][:]))
        missing = sorted(wanted - set(names))
        if missing:
            raise DataError(f"{path}: mask {mask!r} names {', '.join(missing[:3])}, which data lacks")
        names = [name for name in names if name in wanted]
    if not names:
        raise DataError(f"{path} has no data/demo_<i>" + (f" in mask {mask!r}" if mask else ""))
    return names


def _key(name: str, shape: tuple[int, ...]) -> str:
    if not is_image_shape(shape[1:]):
        return obs_key(name)
    camera = obs_key(name.removesuffix("_image").removesuffix("_rgb"))
    return "image" if name == "image" else f"image_{camera.removeprefix('image_')}"


def _declare(key: str, shape: tuple[int, ...]) -> KeySpec:
    return (tuple(shape) or (1,), "uint8" if key.startswith("image") else "float32")


def _env_args(file: Any, path: Path) -> dict[str, Any]:
    try:
        return json.loads(file["data"].attrs.get("env_args", "{}"))
    except ValueError as error:
        raise DataError(f"{path}: data.attrs['env_args'] is no JSON ({error})") from error


def _texts(values: Any) -> list[str]:
    return [item.decode() if isinstance(item, bytes) else str(item) for item in values]


def _language(demo: Any) -> str:
    try:
        return str(json.loads(demo.attrs.get("ep_meta", "{}")).get("lang", ""))
    except (ValueError, AttributeError):
        return ""


def _write_demo(group: Any, episode: Episode, final: bool) -> None:
    steps = len(episode)
    group.attrs["num_samples"] = steps
    if episode.success is not None:
        group.attrs["success"] = episode.success
    if episode.instruction:
        group.attrs["ep_meta"] = json.dumps({"lang": episode.instruction})
    for key, value in episode.obs.items():
        name = f"{key.removeprefix('image_')}_image" if key.startswith("image_") else key
        options = {"compression": "gzip"} if value.ndim == 4 else {}
        group.create_dataset(f"obs/{name}", data=value[:steps], **options)
        if final:
            group.create_dataset(f"next_obs/{name}", data=value[1:], **options)
    dones = np.zeros(steps, np.int64)
    dones[-1] = episode.terminated
    group.create_dataset("actions", data=episode.action)
    group.create_dataset("rewards", data=episode.reward)
    group.create_dataset("dones", data=dones)
    for key, value in episode.extras.items():
        group.create_dataset(key, data=value)
