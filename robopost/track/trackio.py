# SPDX-License-Identifier: Apache-2.0
"""trackio, a local-first tracker (`pip install 'robopost[trackio]'`, `track.also=[trackio]`)."""

from __future__ import annotations

from pathlib import Path

from robopost.errors import require
from robopost.registry import TRACKERS
from robopost.track.base import TrackContext, Tracker


@TRACKERS.register("trackio")
class TrackioTracker(Tracker):
    """One trackio run per run folder, named after it; a resumed run goes on in the same one."""

    def __init__(self, context: TrackContext) -> None:
        super().__init__(context)
        self._trackio = require("trackio", "trackio")
        resume = "allow" if context.resume_step else "never"
        self._run = self._trackio.init(
            project=context.project, name=context.run_name, config=context.config, resume=resume
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Store one row."""
        self._run.log(metrics, step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """Store an mp4."""
        self._run.log({f"video/{name}": self._trackio.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
