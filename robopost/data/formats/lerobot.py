# SPDX-License-Identifier: Apache-2.0
"""LeRobotDataset v2.0, v2.1 and v3.0: read natively, written through the lerobot package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from robopost.data.episode import Arrays, Episode, KeySpec, Problem
from robopost.data.formats import EpisodeSource, Format
from robopost.data.formats.common import (
    INSTRUCTION,
    INSTRUCTION_BYTES,
    Names,
    as_names,
    as_vectors,
    choose,
    declared,
    instruction_rows,
    make_spec,
    obs_key,
    symmetric,
)
from robopost.data.formats.lerobot_meta import (
    BOOKKEEPING,
    FLAGS,
    OURS,
    EpisodeFiles,
    LeRobotMeta,
    camera_key,
    column,
    is_lerobot,
    missing_text,
    read_json,
    read_meta,
    read_schema,
    read_table,
    without_video,
)
from robopost.data.formats.lerobot_video import probe, read_frames, read_images
from robopost.errors import DataError, unknown
from robopost.registry import FORMATS

if TYPE_CHECKING:
    from robopost.data.store import EpisodeStore

ALL, NONE = "all", "none"
MISSING = ("error", "skip")
TOLD = ("auto", "yes", "no")


@FORMATS.register("lerobot")
class LeRobot(Format):
    """LeRobotDataset v2.0 / v2.1 / v3.0 (parquet and mp4); written as v3.0 by the lerobot package.

    `observation.state` becomes `state`, `observation.images.<camera>` becomes `image_<camera>`, another
    `observation.<name>` becomes `<name>`; the task becomes the instruction; `next.reward`, `next.done` and
    `next.success` become reward, terminated and success (without them: zeros, and cut by the end of the
    recording). Further numbers per frame become extras. There is no final observation.
    """

    can_write: ClassVar[bool] = True

    @classmethod
    def detect(cls, path: Path) -> bool:
        """True for a folder with LeRobot's meta/info.json."""
        return path.is_dir() and is_lerobot(path)

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        cameras: Names = ALL,
        resize: str = "",
        video_dir: str = "",
        missing_video: str = "error",
        keys: Names = "",
        episodes: Names = "",
        action_limit: float = 0.0,
        instruction: str = "auto",
    ) -> EpisodeSource:
        """Open the dataset.

        Args:
            path: dataset folder (the one that holds `meta`).
            cameras: cameras to take, e.g. `"image_top"` or `"top,wrist"`; `"all"`, or `"none"` for no video.
            resize: `"96x128"` (height x width) scales every camera; default: as recorded.
            video_dir: take the videos from this folder of the dataset instead of `videos`.
            missing_video: `"error"` stops when an episode lacks a video, `"skip"` leaves such episodes out.
            keys: observation keys to take besides cameras, e.g. `"state"`. Default: all.
            episodes: episode numbers to take, e.g. `"0:10"` or `"3,5,29"`. Default: all.
            action_limit: actions lie within plus and minus this; 0 = unbounded, or the bounds that an export of
                ours has left beside the metadata (the format has none).
            instruction: whether the task is an observation too, in every step: `yes`, `no`, or `auto`: where an
                export of ours says that it was one.
        """
        if missing_video not in MISSING:
            raise unknown("missing_video", missing_video, MISSING, DataError)
        if instruction not in TOLD:
            raise unknown("instruction", instruction, TOLD, DataError)
        ours = _json_file(path / OURS)
        told = instruction == "yes" or (instruction == "auto" and bool(ours.get(INSTRUCTION)))
        meta = read_meta(path, video_dir)
        chosen = pick(meta.episodes, episodes)
        views = views_of(meta, cameras)
        lacking = without_video(chosen, views, meta)
        if lacking and missing_video == "error":
            raise DataError(missing_text(path, lacking, len(chosen)))
        absent = {index for numbers in lacking.values() for index in numbers}
        chosen = [item for item in chosen if item.index not in absent]
        if not chosen:
            raise DataError(missing_text(path, lacking, len(absent)))
        reader = _Reader(meta, views, _size(resize), keys, told)
        _, low, high = declared(ours, reader.action_dim)
        if action_limit or low is None:
            low, high = symmetric(action_limit)
        return EpisodeSource(
            spec=make_spec(reader.obs_spec(chosen[0]), reader.action_dim, low, high),
            fps=meta.fps,
            source=f"lerobot {meta.version} {path.name}",
            episodes=_Episodes(reader, chosen),
            count=len(chosen),
            extras=reader.extras,
            options={
                "cameras": sorted(views),
                "resize": resize,
                "video_dir": video_dir,
                "keys": sorted(reader.vectors),
                "episodes": as_names(episodes),
                "skipped": sorted(absent),
                "action_limit": action_limit,
                "instruction": told,
            },
            metadata=_metadata(meta, reader.skipped),
        )

    @classmethod
    def write(
        cls,
        store: EpisodeStore,
        path: Path,
        *,
        python: str = "",
        repo_id: str = "",
        video: bool = True,
        codec: str = "libsvtav1",
        robot: str = "",
        fps: int = 0,
    ) -> None:
        """Export as LeRobotDataset v3.0 through the lerobot package.

        It runs here when lerobot is installed beside robopost, otherwise in the interpreter named by `python`
        or `$ROBOPOST_LEROBOT_PYTHON` (an environment that has lerobot; robopost is not needed there). Final
        observations have no place in the format and are left out.

        Args:
            store: what to export.
            path: folder to create.
            python: interpreter of an environment with lerobot.
            repo_id: name on the hub, default `local/<folder>`.
            video: True encodes cameras as video (lossy), False keeps every frame as PNG.
            codec: `libsvtav1`, `h264` or `hevc`.
            robot: `robot_type` of the dataset, default that of the store.
            fps: frames per second, default the store's.
        """
        from robopost.data.formats.lerobot_write import export

        export(store, path, python=python, repo_id=repo_id, video=video, codec=codec, robot=robot, fps=fps)

    @classmethod
    def verify(cls, path: Path, **options: Any) -> list[Problem]:
        """Check tables and videos: missing, torn, short, misnumbered, of another size or rate."""
        from robopost.data.formats.lerobot_verify import verify

        return verify(cls, path, options)


class _Reader:
    """Turns the files of an episode into an Episode."""

    def __init__(
        self, meta: LeRobotMeta, views: dict[str, str], size: tuple[int, int] | None, keys: Names, told: bool
    ) -> None:
        self.meta, self.views, self.size, self.told = meta, views, size, told
        if "action" not in meta.features:
            raise DataError(f"{meta.root} declares no 'action', only {', '.join(meta.features)}")
        self.action_dim = int(np.prod(meta.features["action"]["shape"]))
        numeric = {
            name: feature
            for name, feature in meta.features.items()
            if feature["dtype"] not in ("video", "image", "string", "language")
        }
        known = (*BOOKKEEPING, *FLAGS, "action")
        obs = {vector_key(name): name for name in numeric if name.startswith("observation.")}
        wanted = choose("observation key", keys, obs)
        self.vectors: dict[str, str] = {key: obs[key] for key in wanted}
        rest = {obs_key(n): n for n in numeric if n not in known and not n.startswith("observation.")}
        present = _columns_of(meta)
        self.more = {key: name for key, name in rest.items() if name in present}
        pictures = [name for name in views.values() if not meta.is_video(name)]
        needed = {"action", *BOOKKEEPING, *FLAGS, *self.vectors.values(), *self.more.values(), *pictures}
        self._columns = [name for name in present if name in needed]
        self.skipped = sorted(n for n, f in meta.features.items() if f["dtype"] in ("string", "language"))
        self.extras: dict[str, KeySpec] = {"timestamp": ((), "float64")}
        for key, name in self.more.items():
            self.extras[key] = (_shape(numeric[name]), str(np.dtype(numeric[name]["dtype"])))
        self._table: tuple[Path, Any, np.ndarray] | None = None

    def obs_spec(self, first: EpisodeFiles) -> dict[str, KeySpec]:
        """Shapes; a camera's from its first video, since copies in other sizes keep the declaration."""
        spec: dict[str, KeySpec] = {}
        for key, name in self.vectors.items():
            spec[key] = (_shape(self.meta.features[name]), "float32")
        for key, name in self.views.items():
            height, width = self.size or self.meta.size(name)
            if not self.size and self.meta.is_video(name):
                facts = probe(first.videos[name].path)
                height, width = facts["height"], facts["width"]
            spec[key] = ((height, width, 3), "uint8")
        return spec | ({INSTRUCTION: ((INSTRUCTION_BYTES,), "uint8")} if self.told else {})

    def rows(self, files: EpisodeFiles) -> Any:
        """The episode's rows of its table (the last table stays in memory: v3 keeps many episodes in one)."""
        where = f"{files.table}, episode {files.index}"
        if self._table is None or self._table[0] != files.table:
            loaded = read_table(files.table, self._columns)
            named = "episode_index" in loaded.column_names
            numbers = (
                column(loaded, "episode_index", where) if named else np.full(loaded.num_rows, files.index)
            )
            self._table = (files.table, loaded, numbers)
        _, table, numbers = self._table
        mine = np.flatnonzero(numbers == files.index)
        if self.meta.version != "v3.0" and len(mine) != len(numbers):
            raise DataError(f"{where}: {len(numbers) - len(mine)} of its rows belong to other episodes")
        if len(mine) != files.length:
            raise DataError(f"{where}: {len(mine)} rows, meta/episodes says {files.length}")
        if len(mine) and mine[-1] - mine[0] + 1 != len(mine):
            raise DataError(f"{where}: its rows are not in one piece")
        return table.slice(int(mine[0]) if len(mine) else 0, len(mine))

    def episode(self, files: EpisodeFiles) -> Episode:
        """Read one episode, videos and all."""
        table = self.rows(files)
        steps = table.num_rows
        where = f"{files.table}, episode {files.index}"

        def get(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name not in table.column_names:
                raise DataError(f"{where}: no column {name!r}")
            values = column(table, name, where)
            if values.size != steps * int(np.prod(shape, dtype=int)):
                raise DataError(f"{where}: column {name!r} has shape {values.shape[1:]}, declared is {shape}")
            return values.reshape(steps, *shape)

        obs: Arrays = {}
        for key, name in self.vectors.items():
            obs[key] = as_vectors(get(name, _shape(self.meta.features[name])))
        for key, name in self.views.items():
            if self.meta.is_video(name):
                part, whole = files.videos[name], self.meta.version != "v3.0"
                obs[key] = read_frames(part.path, steps, self.meta.fps, part.start, self.size, whole)
            else:
                obs[key] = read_images(table.column(name).to_pylist(), f"{where}, {name}", self.size)
        flags = {name: get(name, (1,))[:, 0] for name in FLAGS if name in table.column_names}
        task = get("task_index", (1,))[:, 0] if "task_index" in table.column_names else np.zeros(0, int)
        texts = [self.meta.tasks.get(int(index), "") for index in dict.fromkeys(task.tolist())] or list(
            files.tasks
        )
        if self.told:
            obs[INSTRUCTION] = instruction_rows(texts[0] if texts else "", steps, where)
        done = bool(flags["next.done"][-1]) if "next.done" in flags else False
        cut = bool(flags["next.truncated"][-1]) if "next.truncated" in flags else not done
        extras: Arrays = {key: get(name, self.extras[key][0]) for key, name in self.more.items()}
        if "timestamp" in table.column_names:
            extras["timestamp"] = get("timestamp", ()).astype(np.float64)
        else:
            extras["timestamp"] = np.arange(steps) / self.meta.fps
        return Episode(
            obs=obs,
            action=as_vectors(get("action", (self.action_dim,))),
            reward=as_vectors(flags.get("next.reward", np.zeros(steps)))[:, 0],
            terminated=done,
            truncated=cut,
            success=bool(np.any(flags["next.success"])) if "next.success" in flags else None,
            instruction=texts[0] if texts else "",
            extras=extras,
            metadata={"episode_index": files.index, **({"tasks": texts} if len(texts) > 1 else {})},
            has_final_obs=False,
        )


class _Episodes:
    """Reads lazily. Its iterator goes on after a bad episode, so that a check can list all of them."""

    def __init__(self, reader: _Reader, files: Sequence[EpisodeFiles]) -> None:
        self.reader, self.files = reader, files

    def __iter__(self) -> Iterator[Episode]:
        return map(self.reader.episode, self.files)

    def __len__(self) -> int:
        return len(self.files)


def _columns_of(meta: LeRobotMeta) -> list[str]:
    """Columns of the first table that opens; the reading of the others finds out what is wrong with them."""
    failure: DataError | None = None
    for table in dict.fromkeys(item.table for item in meta.episodes):
        try:
            return read_schema(table)
        except DataError as error:
            failure = failure or error
    raise failure or DataError(f"{meta.root} has no tables")


def vector_key(feature: str) -> str:
    """`observation.state` -> `state`, `observation.environment_state` -> `environment_state`."""
    return obs_key(feature.removeprefix("observation."))


def _shape(feature: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in feature["shape"]) or (1,)


def pick(items: list[EpisodeFiles], episodes: Names) -> list[EpisodeFiles]:
    """The episodes that an `episodes` option names, e.g. `"0:10"` or `"3,5,29"`; all when it is empty."""
    wanted = as_names(episodes)
    if not wanted:
        return items
    known = {item.index: item for item in items}
    numbers: list[int] = []
    for part in wanted:
        match = re.fullmatch(r"(\d*):(\d*)|(\d+)", part)
        if not match:
            raise DataError(f"episodes={part!r} must be numbers and ranges, e.g. 0:10 or 3,5,29")
        if match[3]:
            numbers.append(int(match[3]))
        else:
            stop = int(match[2]) if match[2] else max(known) + 1
            numbers += [n for n in range(int(match[1] or 0), stop) if n in known]
    bad = [n for n in numbers if n not in known]
    if bad or not numbers:
        raise DataError(
            f"episodes={','.join(wanted)}: no such episode, there are {min(known)} to {max(known)}"
        )
    return [known[n] for n in dict.fromkeys(numbers)]


def views_of(meta: LeRobotMeta, cameras: Names) -> dict[str, str]:
    """Observation key -> feature of the cameras: `"all"`, `"none"`, or names with or without `image_`."""
    names = as_names(cameras)
    if names == [NONE]:
        return {}
    if names == [ALL]:
        return meta.cameras
    wanted = [name if name in meta.cameras else camera_key(name) for name in names]
    return {key: meta.cameras[key] for key in choose("camera", wanted, meta.cameras)}


def _size(resize: str) -> tuple[int, int] | None:
    if not resize:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", resize)
    if not match or min(int(match[1]), int(match[2])) < 1:
        raise DataError(f"resize={resize!r} must be HEIGHTxWIDTH, e.g. 96x128")
    return int(match[1]), int(match[2])


def _metadata(meta: LeRobotMeta, skipped: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {
        "robot": meta.info.get("robot_type") or "",
        "lerobot_version": meta.version,
        "names": {n: f["names"] for n, f in meta.features.items() if f.get("names") and n not in BOOKKEEPING},
        "tasks": {str(index): text for index, text in meta.tasks.items()},
        "rewards": "recorded" if "next.reward" in meta.features else "none in the set, zeros",
    }
    if skipped:
        kept["features_left_out"] = skipped
    modality = _json_file(meta.root / "meta" / "modality.json")
    return {**kept, "modality": modality} if modality else kept


def _json_file(path: Path) -> dict[str, Any]:
    """An optional JSON object; empty where there is none."""
    return read_json(path) if path.is_file() else {}
