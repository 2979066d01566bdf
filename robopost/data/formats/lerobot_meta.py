# SPDX-License-Identifier: Apache-2.0
"""Metadata of a LeRobotDataset v2.0, v2.1 or v3.0: where each episode's table rows and video frames are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robopost.data.formats.common import obs_key
from robopost.errors import DataError, require

EXTRA = "lerobot-read"
INFO = "meta/info.json"
OURS = "meta/robopost.json"  # what an export of ours leaves beside: bounds of the actions
VERSIONS = ("v2.0", "v2.1", "v3.0")
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
FLAGS = ("next.reward", "next.done", "next.success", "next.truncated")


@dataclass(frozen=True)
class VideoPart:
    """Where an episode's frames are: a file, and the seconds at which they start in it."""

    path: Path
    start: float = 0.0


@dataclass(frozen=True)
class EpisodeFiles:
    """One episode: its number, length, tasks, table and videos (feature name -> part)."""

    index: int
    length: int
    tasks: tuple[str, ...]
    table: Path
    videos: dict[str, VideoPart] = field(default_factory=dict)


@dataclass(frozen=True)
class LeRobotMeta:
    """Everything but the recordings themselves.

    Attributes:
        root: dataset folder.
        version: `v2.0`, `v2.1` or `v3.0`.
        info: `meta/info.json`.
        features: feature name -> declaration.
        tasks: task index -> text.
        episodes: in order of their number.
    """

    root: Path
    version: str
    info: dict[str, Any]
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    episodes: list[EpisodeFiles]

    @property
    def fps(self) -> float:
        """Steps per second."""
        return float(self.info["fps"])

    @property
    def cameras(self) -> dict[str, str]:
        """Observation key -> feature name of every video and image feature."""
        return {
            camera_key(name): name
            for name, feature in self.features.items()
            if feature.get("dtype") in ("video", "image")
        }

    def is_video(self, feature: str) -> bool:
        """True for a feature that is kept in video files, False for images inside the table."""
        return self.features[feature].get("dtype") == "video"

    def size(self, feature: str) -> tuple[int, int]:
        """Declared (height, width) of a camera; some sets put channels first, and their names say so."""
        shape = [int(v) for v in self.features[feature]["shape"]]
        names = self.features[feature].get("names") or []
        channels_first = names[:1] in (["channel"], ["channels"]) or (shape[0] in (1, 3) and shape[2] > 4)
        return (shape[1], shape[2]) if channels_first else (shape[0], shape[1])


def camera_key(feature: str) -> str:
    """`observation.images.top` -> `image_top`; `observation.image` -> `image`."""
    name = feature.removeprefix("observation.").removeprefix("images.")
    if name in ("image", "images"):
        return "image"
    key = obs_key(name)
    return key if key.startswith("image_") else f"image_{key}"


def is_lerobot(path: Path) -> bool:
    """True for a folder whose meta/info.json is LeRobot's."""
    try:
        return "codebase_version" in json.loads((path / INFO).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def read_meta(root: Path, video_dir: str = "") -> LeRobotMeta:
    """Read the metadata of the dataset in `root`.

    Args:
        root: dataset folder.
        video_dir: folder to take the videos from instead of the declared one (`videos`), e.g. a set of
            smaller copies.

    Raises:
        DataError: not a LeRobotDataset, an unknown version, or torn metadata.
    """
    info = read_json(root / INFO)
    version = str(info.get("codebase_version", ""))
    if version not in VERSIONS:
        fix = "convert it with lerobot's own scripts" if version < "v2" else "upgrade robopost"
        raise DataError(f"{root} is LeRobotDataset {version!r}, read are {', '.join(VERSIONS)}. Fix: {fix}")
    for name in ("fps", "features", "data_path"):
        if not info.get(name):
            raise DataError(f"{root / INFO} lacks {name!r}. Fix: restore it from a copy")
    features = info["features"]
    videos = [name for name, feature in features.items() if feature.get("dtype") == "video"]
    template = info.get("video_path") or ""
    if video_dir:
        template = re.sub(r"^[^/]+", lambda _: video_dir.rstrip("/"), template)
    locate = _v3 if version == "v3.0" else _v2
    tasks, episodes = locate(root, info, videos, template)
    if not episodes:
        raise DataError(f"{root}: meta lists no episodes")
    return LeRobotMeta(root, version, info, features, tasks, episodes)


def _v2(
    root: Path, info: dict[str, Any], videos: list[str], template: str
) -> tuple[dict[int, str], list[EpisodeFiles]]:
    tasks = {int(row["task_index"]): str(row["task"]) for row in _jsonl(root / "meta/tasks.jsonl")}
    chunk_size = int(info.get("chunks_size") or 1000)
    episodes = []
    for row in _jsonl(root / "meta/episodes.jsonl"):
        index = int(row["episode_index"])
        names = {"episode_index": index, "episode_chunk": index // chunk_size}
        parts = {key: VideoPart(_place(root, template, {**names, "video_key": key})) for key in videos}
        table = _place(root, info["data_path"], names)
        episodes.append(EpisodeFiles(index, int(row["length"]), tuple(map(str, row["tasks"])), table, parts))
    return tasks, sorted(episodes, key=lambda item: item.index)


def _v3(
    root: Path, info: dict[str, Any], videos: list[str], template: str
) -> tuple[dict[int, str], list[EpisodeFiles]]:
    tasks = {}
    for row in read_table(root / "meta/tasks.parquet").to_pylist():
        text = row.get("task", row.get("__index_level_0__"))
        tasks[int(row["task_index"])] = str(text)
    episodes = []
    for path in sorted((root / "meta/episodes").glob("*/*.parquet")):
        table = read_table(path)
        columns = [name for name in table.column_names if not name.startswith("stats/")]
        for row in table.select(columns).to_pylist():
            index = int(row["episode_index"])
            parts = {}
            for key in videos:
                chunk = row.get(f"videos/{key}/chunk_index")
                if chunk is None:
                    raise DataError(
                        f"{path}: episode {index} has no place for {key}. Fix: restore meta/episodes"
                    )
                names = {
                    "video_key": key,
                    "chunk_index": chunk,
                    "file_index": row[f"videos/{key}/file_index"],
                }
                start = float(row[f"videos/{key}/from_timestamp"])
                parts[key] = VideoPart(root / template.format(**names), start)
            names = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            table_path = root / info["data_path"].format(**names)
            episodes.append(EpisodeFiles(index, int(row["length"]), tuple(row["tasks"]), table_path, parts))
    return tasks, sorted(episodes, key=lambda item: item.index)


def _place(root: Path, template: str, names: dict[str, Any]) -> Path:
    """The declared path; where nothing lies there, the file of the same name in another chunk folder.

    Some published v2 sets declare `chunk-{episode_index:03d}` and keep everything in chunk-000.
    """
    declared = root / template.format(**names)
    if declared.exists():
        return declared
    relative = re.sub(r"chunk-[^/]*", "chunk-*", template)
    return next(iter(sorted(root.glob(relative.format(**names)))), declared)


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """Read a parquet file; an absent or torn one raises DataError."""
    parquet = require("pyarrow.parquet", EXTRA)
    if not path.exists():
        raise DataError(f"{path} is missing. Fix: copy the dataset again")
    try:
        return parquet.read_table(path, columns=columns)
    except Exception as error:  # pyarrow has a tree of its own
        raise DataError(f"{path} does not open as parquet ({error}). Fix: copy it again") from error


def read_schema(path: Path) -> list[str]:
    """Column names of a parquet file."""
    parquet = require("pyarrow.parquet", EXTRA)
    if not path.exists():
        raise DataError(f"{path} is missing. Fix: copy the dataset again")
    try:
        return list(parquet.read_schema(path).names)
    except Exception as error:
        raise DataError(f"{path} does not open as parquet ({error}). Fix: copy it again") from error


def column(table: Any, name: str, where: str) -> np.ndarray:
    """A table column as a numpy array, (T,) or (T, ...); rows of unequal length raise DataError."""
    data = table.column(name).combine_chunks()
    kind = str(data.type)
    if data.null_count:
        raise DataError(f"{where}: column {name!r} has {data.null_count} empty rows")
    if not kind.startswith(("list", "large_list", "fixed_size_list")):
        return data.to_numpy(zero_copy_only=False)
    values = data.flatten()
    depth_rows = len(data)
    if kind.count("list") == 1 and depth_rows and len(values) % depth_rows == 0:
        lengths = np.asarray(data.value_lengths()) if not kind.startswith("fixed") else None
        if lengths is None or np.all(lengths == lengths[0]):
            return values.to_numpy(zero_copy_only=False).reshape(depth_rows, -1)
    try:
        return np.array(data.to_pylist())
    except ValueError as error:
        raise DataError(f"{where}: column {name!r} has rows of unequal length") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent or torn file raises DataError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Fix: copy the dataset again") from error
    except ValueError as error:
        raise DataError(f"{path} is torn ({error}). Fix: copy it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object")
    return value


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Fix: copy the dataset again") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is torn ({error}). Fix: copy it again") from error


def without_video(
    items: Sequence[EpisodeFiles], views: dict[str, str], meta: LeRobotMeta
) -> dict[str, list[int]]:
    """Camera key -> numbers of the episodes whose video file is absent."""
    lacking = {
        key: [item.index for item in items if not item.videos[name].path.is_file()]
        for key, name in views.items()
        if meta.is_video(name)
    }
    return {key: numbers for key, numbers in lacking.items() if numbers}


def missing_text(path: Path, lacking: dict[str, list[int]], count: int) -> str:
    """What an error says about episodes `lacking` videos, of `count`."""
    parts = []
    for key, numbers in lacking.items():
        listed = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        parts.append(f"{key} of {len(numbers)} of {count} episodes ({listed})")
    return (
        f"missing video in {path}: {'; '.join(parts)}. "
        "Fix: missing_video=skip leaves these episodes out, cameras=none (or naming others) the video"
    )
