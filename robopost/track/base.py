# SPDX-License-Identifier: Apache-2.0
"""The tracker contract, and `make_tracker`, which builds the set a run asks for."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from robopost.config import TrackConfig
from robopost.registry import TRACKERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackContext:
    """What a tracker is built from.

    Attributes:
        run_dir: the run folder.
        project: name of the project for trackers that have one.
        config: the resolved config as plain JSON values.
        resume_step: the checkpoint's step the run goes on from, 0 for a fresh run. Whatever was logged
            after it belongs to a run that was lost and must not show.
        total: last step of the run, 0 when unknown.
    """

    run_dir: Path
    project: str = "robopost"
    config: dict[str, Any] | None = None
    resume_step: int = 0
    total: int = 0

    @property
    def run_name(self) -> str:
        """Name shown by trackers: the run folder's, with its parent's where it is one of several seeds."""
        name = self.run_dir.name
        return f"{self.run_dir.parent.name}-{name}" if name.startswith("seed_") else name


class Tracker(ABC):
    """Receives metrics. A subclass is registered with `@TRACKERS.register(name)`, built as `cls(context)`."""

    # A required tracker's error ends the run, as its record would have a hole; others are dropped.
    required: ClassVar[bool] = False

    def __init__(self, context: TrackContext) -> None:
        self.context = context

    @abstractmethod
    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record `metrics` at `step`; called at log intervals with host numbers, never with tensors."""

    def video(self, step: int, name: str, path: Path) -> None:  # noqa: B027
        """Record the mp4 at `path` as `name`; trackers that can't show videos ignore it."""

    def close(self) -> None:  # noqa: B027
        """Flush and free; called exactly once."""


class MultiTracker(Tracker):
    """Passes everything on to several trackers. A network tracker that fails never takes the run with it."""

    def __init__(self, context: TrackContext, trackers: list[Tracker]) -> None:
        super().__init__(context)
        self.trackers = list(trackers)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record `metrics` everywhere."""
        plain = {key: float(value) for key, value in metrics.items()}
        self._each("log", step, plain)

    def video(self, step: int, name: str, path: Path) -> None:
        """Record a video everywhere."""
        self._each("video", step, name, Path(path))

    def close(self) -> None:
        """Close every tracker, even after one fails."""
        self._each("close")
        self.trackers = []

    def _each(self, method: str, *args: Any) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:
                if tracker.required and method != "close":
                    raise
                self.trackers.remove(tracker)
                logger.warning("tracker %s dropped: %s", type(tracker).__name__, error)


def make_tracker(
    run_dir: Path, config: TrackConfig, config_dict: dict[str, Any], resume_step: int = 0, *, total: int = 0
) -> MultiTracker:
    """Build the trackers of a run: jsonl, tensorboard and console, then those of `config.also`.

    Args:
        run_dir: the run folder.
        config: which trackers.
        config_dict: resolved config of the run, shown by trackers that keep one.
        resume_step: 0, or the step of the checkpoint the run goes on from.
        total: last step, for the progress bar.

    Raises:
        ConfigError: `config.also` names an unknown tracker.
        MissingExtraError: a tracker's package is not installed.
    """
    context = TrackContext(Path(run_dir), config.project, config_dict, resume_step, total)
    names = ["jsonl"]
    names += ["tensorboard"] if config.tensorboard else []
    names += ["console"] if config.console else []
    names += [name for name in config.also if name not in names]
    targets = [TRACKERS.get(name).target for name in names]  # all names are checked before anything is opened
    opened: list[Tracker] = []
    try:
        for target in reversed(targets):  # jsonl last: its clock must not count the opening of the others
            opened.insert(0, target(context))
    except BaseException:
        MultiTracker(context, opened).close()
        raise
    return MultiTracker(context, opened)
