# SPDX-License-Identifier: Apache-2.0
"""`metrics.jsonl`: one JSON object per log line, flushed line by line. Reports are made from it."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from robopost.errors import DataError, RobopostError
from robopost.registry import TRACKERS
from robopost.track.base import TrackContext, Tracker

FILE = "metrics.jsonl"


@TRACKERS.register("jsonl")
class JsonlTracker(Tracker):
    """Appends `{"step": ..., "time": seconds of training, ...}` per line; NaN and infinities become null.

    Opening drops a torn last line and every line past `resume_step`: they were logged by a run that was
    killed after its last checkpoint, and will be logged again.
    """

    required: ClassVar[bool] = True

    def __init__(self, context: TrackContext) -> None:
        super().__init__(context)
        self.path = context.run_dir / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = truncate(self.path, context.resume_step) if self.path.exists() else []
        # Time goes on where the checkpoint left it: the clock counts training, not pauses between sittings.
        self._before = float(kept[-1].get("time") or 0.0) if kept else 0.0
        self._start = time.perf_counter()
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line and flush it to the system: a killed process loses nothing."""
        line: dict[str, Any] = {"step": int(step)}
        line["time"] = round(self._before + time.perf_counter() - self._start, 3)
        line |= {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise RobopostError(
                f"can't write {self.path}: {reason}. Fix: free space, then resume the run"
            ) from error

    def close(self) -> None:
        """Sync to disk and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, oldest first. A torn last line (a crash while writing) is ignored.

    Args:
        path: the file or the run folder that holds it.

    Raises:
        DataError: the file is missing, or a line before the last is not a JSON object with a step.
    """
    path = path / FILE if path.is_dir() else path
    try:
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    lines: list[dict[str, Any]] = []
    # What follows the last newline was never finished, even where it happens to parse.
    for number, text in enumerate(raw[:-1], start=1):
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(raw) - 1:
                break
            raise DataError(f"{path} line {number} is not a log line. Fix: delete that line") from error
        lines.append(line)
    return lines


def series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the lines that lack it or hold null."""
    found = [(line["step"], float(line[key])) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop torn lines and those past `step`, in place and atomically. Returns what is kept."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if text.encode() != path.read_bytes():
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return kept
