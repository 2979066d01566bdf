# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases (`pip install 'robopost[wandb]'`, `track.also=[wandb]`)."""

from __future__ import annotations

import secrets
from pathlib import Path

from robopost.errors import require
from robopost.registry import TRACKERS
from robopost.track.base import TrackContext, Tracker


@TRACKERS.register("wandb")
class WandbTracker(Tracker):
    """One W&B run per run folder; a resumed run goes on under the same id, kept in `wandb_id.txt`."""

    def __init__(self, context: TrackContext) -> None:
        super().__init__(context)
        self._wandb = require("wandb", "wandb")
        context.run_dir.mkdir(parents=True, exist_ok=True)
        identity = context.run_dir / "wandb_id.txt"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._run = self._wandb.init(
            project=context.project,
            name=context.run_name,
            dir=str(context.run_dir),
            config=context.config,
            id=identity.read_text().strip(),
            resume="allow",
        )
        # W&B's own step only rises, so a resumed run could not log again what was lost: plot over ours.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send one row."""
        self._run.log({"step": step, **metrics})

    def video(self, step: int, name: str, path: Path) -> None:
        """Upload an mp4."""
        self._run.log({"step": step, f"video/{name}": self._wandb.Video(str(path), format="mp4")})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
