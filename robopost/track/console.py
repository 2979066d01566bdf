# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run trains: tables and a progress bar, or plain lines in a log file."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from robopost.registry import TRACKERS
from robopost.results import number
from robopost.track.base import TrackContext, Tracker

HIDDEN = ("_low", "_high")  # interval ends are shown in brackets behind their metric


@TRACKERS.register("console")
class ConsoleTracker(Tracker):
    """One table per log interval, metrics grouped by their prefix; without a terminal one line instead."""

    def __init__(self, context: TrackContext, console: Console | None = None) -> None:
        super().__init__(context)
        self.console = console or Console()
        self._start = time.perf_counter()
        self._bar: Progress | None = None
        if self.console.is_terminal and context.total:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(
                context.run_name, total=context.total, completed=context.resume_step
            )
            self._bar.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Print the interval's metrics and move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if self.console.is_terminal:
            self.console.print(self._table(step, metrics))
        else:
            total = f"/{self.context.total:,}" if self.context.total else ""
            shown = "  ".join(f"{key} {text}" for key, text in _shown(metrics).items())
            self.console.print(
                f"step {step:,}{total}  {shown}", soft_wrap=True, highlight=False, markup=False
            )

    def video(self, step: int, name: str, path: Path) -> None:
        """Say where the video is."""
        self._line(f"video {path}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _table(self, step: int, metrics: dict[str, float]) -> Table:
        """Metric groups side by side: short enough that a long run stays readable."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for key, text in _shown(metrics).items():
            group, _, name = key.rpartition("/")
            groups.setdefault(group, []).append((name, text))
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.perf_counter() - self._start))
        table = Table(
            title=f"step {step:,}   {elapsed}",
            title_justify="left",
            title_style="bold",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for group in groups:
            table.add_column(group, style="cyan", no_wrap=True)
            table.add_column("", justify="right", no_wrap=True)
        for row in range(max(map(len, groups.values()), default=0)):
            cells: list[str] = []
            for items in groups.values():
                cells += items[row] if row < len(items) else ("", "")
            table.add_row(*cells)
        return table


def _shown(metrics: dict[str, float]) -> dict[str, str]:
    out = {}
    for key, value in metrics.items():
        if key.endswith(HIDDEN) and key.rpartition("_")[0] in metrics:
            continue
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        ends = "" if low is None or high is None else f" [{number(low)}, {number(high)}]"
        out[key] = number(value) + ends
    return out
