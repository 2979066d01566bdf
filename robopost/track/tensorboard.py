# SPDX-License-Identifier: Apache-2.0
"""TensorBoard event files: `tensorboard --logdir runs`."""

from __future__ import annotations

from robopost.registry import TRACKERS
from robopost.track.base import TrackContext, Tracker


@TRACKERS.register("tensorboard")
class TensorBoardTracker(Tracker):
    """Scalars under their metric names in `tensorboard/` of the run folder."""

    def __init__(self, context: TrackContext) -> None:
        super().__init__(context)
        from torch.utils.tensorboard import SummaryWriter  # a quarter of a second, only paid by training

        folder = context.run_dir / "tensorboard"
        # TensorBoard hides events from purge_step on: those a killed run logged past its last checkpoint.
        purge = context.resume_step + 1 if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=30)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write scalars."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
