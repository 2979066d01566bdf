# SPDX-License-Identifier: Apache-2.0
"""What only a reader of LeRobot's own files can find: absent and short videos, wrong numbers and totals."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robopost.data.episode import Problem
from robopost.data.formats.lerobot_meta import (
    EpisodeFiles,
    LeRobotMeta,
    column,
    read_meta,
    read_schema,
    read_table,
)
from robopost.data.formats.lerobot_video import probe
from robopost.errors import DataError

if TYPE_CHECKING:
    from robopost.data.formats.lerobot import LeRobot

MISSING_FIX = (
    "copy it again, or import with missing_video=skip (without the episode) or cameras=none (without video)"
)
COPY_FIX = "copy it again, or leave the episode out with episodes="
RATE_TOLERANCE = 0.01


def verify(kind: type[LeRobot], path: Path, options: dict[str, Any]) -> list[Problem]:
    """All findings: the tables through the common checks, then numbering, then every video file.

    Videos are counted frame by frame without decoding them; the import decodes.
    """
    from robopost.data.formats.lerobot import pick, views_of
    from robopost.data.verify import check_source

    meta = read_meta(path, options.get("video_dir", ""))
    tables = {**options, "cameras": "none", "missing_video": "error"}
    source = kind.read(path, **tables)
    episodes = pick(meta.episodes, options.get("episodes", ""))
    problems = _totals(meta)
    problems += check_source(source)
    problems += _numbering(meta, episodes)
    for key, feature in views_of(meta, options.get("cameras", "all")).items():
        if meta.is_video(feature):
            severity = "warning" if options.get("missing_video") == "skip" else "error"
            problems += _videos(meta, key, feature, episodes, severity)
    return problems


def _totals(meta: LeRobotMeta) -> list[Problem]:
    found = {"total_episodes": len(meta.episodes), "total_frames": sum(item.length for item in meta.episodes)}
    return [
        Problem(
            "meta/info.json",
            f"{name} is {meta.info[name]}, meta/episodes add up to {count}",
            "correct it",
            "warning",
        )
        for name, count in found.items()
        if name in meta.info and int(meta.info[name]) != count
    ]


def _numbering(meta: LeRobotMeta, episodes: list[EpisodeFiles]) -> list[Problem]:
    problems = []
    tables: dict[Path, Any] = {}
    for item in episodes:
        try:
            if item.table not in tables:
                wanted = [name for name in read_schema(item.table) if name.endswith("_index")]
                tables = {item.table: read_table(item.table, wanted)}
            table, where = tables[item.table], f"episode {item.index}"
            if "episode_index" in table.column_names:
                table = table.filter(column(table, "episode_index", where) == item.index)
            for name in ("frame_index", "task_index"):
                if name not in table.column_names:
                    continue
                numbers = column(table, name, where)
                good = (
                    numbers == np.arange(len(numbers))
                    if name == "frame_index"
                    else np.isin(numbers, list(meta.tasks))
                )
                if not good.all():
                    row = int(np.argmin(good))
                    what = (
                        f"{int(numbers[row])} is not its number"
                        if name == "frame_index"
                        else (f"task {int(numbers[row])} is not in meta/tasks")
                    )
                    problems.append(Problem(f"{where}, row {row}, key {name!r}", what, COPY_FIX))
        except DataError:
            continue  # said already, by the check of the tables
    return problems


def _videos(
    meta: LeRobotMeta, key: str, feature: str, episodes: list[EpisodeFiles], severity: str
) -> list[Problem]:
    absent = [item for item in episodes if not item.videos[feature].path.is_file()]
    if len(absent) == len(episodes):
        example = _short(meta, absent[0], feature)
        what = f"missing video: none of the {len(episodes)} episodes has one, e.g. {example}"
        return [Problem(f"key {key!r}", what, "name the other cameras with cameras=, or cameras=none")]
    problems = [
        Problem(
            f"episode {item.index}, key {key!r}",
            f"missing video {_short(meta, item, feature)}",
            MISSING_FIX,
            severity,
        )
        for item in absent
    ]
    files: dict[Path, list[EpisodeFiles]] = defaultdict(list)
    for item in episodes:
        if item not in absent:
            files[item.videos[feature].path].append(item)
    declared = meta.size(feature)
    sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for path, items in files.items():
        where = f"episode {items[0].index}, key {key!r}"
        try:
            facts = probe(path)
        except DataError as error:
            numbers = ", ".join(str(item.index) for item in items)
            problems.append(Problem(f"episode {numbers}, key {key!r}", str(error), MISSING_FIX))
            continue
        if facts["fps"] and abs(facts["fps"] - meta.fps) > RATE_TOLERANCE * meta.fps:
            what = f"wrong rate: the video runs at {facts['fps']:.3g} Hz, the dataset says {meta.fps:.3g}"
            problems.append(Problem(where, what, "re-encode the video, or correct fps"))
        if (facts["height"], facts["width"]) != declared:
            sizes[facts["height"], facts["width"]].append(items[0].index)
        for item in items:
            first = round(item.videos[feature].start * meta.fps)
            wrong = facts["frames"] < first + item.length
            if meta.version != "v3.0":
                wrong |= facts["frames"] > item.length
            if wrong:
                what = f"video has {max(0, facts['frames'] - first)} frames, the table has {item.length} rows"
                problems.append(Problem(f"episode {item.index}, key {key!r}", what, COPY_FIX))
    for (height, width), numbers in sizes.items():
        what = f"frames of {len(numbers)} videos are {height}x{width}, declared {declared[0]}x{declared[1]}"
        problems.append(Problem(f"episode {numbers[0]}, key {key!r}", what, "import with resize=", "warning"))
    return problems


def _short(meta: LeRobotMeta, item: EpisodeFiles, feature: str) -> str:
    path = item.videos[feature].path
    return str(path.relative_to(meta.root)) if path.is_relative_to(meta.root) else str(path)
