# SPDX-License-Identifier: Apache-2.0
"""The page: comparisons first, then evaluations, curves, videos, config and provenance, in one HTML file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from robopost import __version__
from robopost.errors import RobopostError
from robopost.evaluate.rollout import EvalResult
from robopost.evaluate.statistics import Interval, paired_difference
from robopost.report.charts import interval_bars, shown
from robopost.report.runs import RunData, load_runs
from robopost.report.sections import (
    Budget,
    Groups,
    config_section,
    curves,
    evaluation_table,
    group_runs,
    provenance_section,
    smoothness_table,
    video_tag,
    videos,
)
from robopost.results import number

MAX_VIDEO = 8 * 2**20  # bytes of one embedded mp4
MAX_PAGE = 32 * 2**20  # bytes of all of them
# Nothing may be loaded or run: the page is data, whatever a config or a file name holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
CURVE_NOTE = (
    "Thick: mean over seeds, or a running mean of one. Thin: single seeds, or every log line of one. "
    "Shaded: 95 % interval over seeds, or over the episodes of an evaluation."
)

SWITCH_NOTE = " Steps are offline updates up to the dashed line, environment steps behind it."


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same task, shown large at the top.

    Attributes:
        title: heading.
        before: the starting point.
        after: what became of it.
        video: side-by-side mp4, embedded when it is at most 8 MiB.
        labels: names of the two.
    """

    title: str
    before: EvalResult
    after: EvalResult
    video: Path | None = None
    labels: tuple[str, str] = ("before", "after")


def write_report(
    runs: Sequence[Path],
    out: Path,
    title: str = "",
    comparisons: Sequence[Comparison] = (),
    *,
    notes: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML page about run folders.

    Args:
        runs: run folders, or folders of seeds.
        out: file to write, replaced atomically.
        title: heading; default: the runs' names.
        comparisons: before/after pairs for the top of the page.
        notes: paragraphs under the heading.

    Returns:
        `out`.

    Raises:
        DataError: a path is no run folder.
        RobopostError: `out` can't be written.
    """
    loaded = load_runs([Path(path) for path in runs])
    html = render(loaded, title or ", ".join(run.name for run in loaded), comparisons, notes)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(html, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise RobopostError(f"can't write {out}: {error.strerror}") from error
    return out


def render(
    runs: Sequence[RunData], title: str, comparisons: Sequence[Comparison] = (), notes: Sequence[str] = ()
) -> str:
    """The HTML of `write_report`."""
    budget = Budget(MAX_PAGE, MAX_VIDEO)
    tree = group_runs(runs)
    body = [_header(runs, title, notes), _problems(runs)]
    body += [_comparison(item, budget) for item in comparisons]
    for env, groups in tree.items():
        body.append(f"<h2>{escape(env)}</h2>" if len(tree) > 1 else "<h2>Evaluation</h2>")
        body.append(evaluation_table(groups))
        motion = smoothness_table(groups)
        body.append(f"<h3>Smoothness</h3>{motion}" if motion else "")
        main, rest = curves(groups)
        if main:
            body.append("<h2>Learning curves</h2>" if len(tree) == 1 else "")
            body.append(main)
            both = any(run.switch is not None for members in groups.values() for run in members)
            body.append(f'<p class="dim">{CURVE_NOTE}{SWITCH_NOTE if both else ""}</p>')
        if rest:
            fold = "" if main else " open"
            body.append(f"<details{fold}><summary>All training curves</summary>{rest}</details>")
        film = videos(groups, budget)
        body.append(f"<h2>Videos</h2>{film}" if film else "")
    everything: Groups = {
        (label if len(tree) == 1 else f"{env} · {label}"): members
        for env, groups in tree.items()
        for label, members in groups.items()
    }
    body.append(f"<h2>Config</h2>{config_section(everything)}")
    body.append(f"<h2>Provenance</h2>{provenance_section(everything)}")
    body.append(_footer(runs))
    style = (files("robopost.report") / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="robopost {__version__}"><title>{escape(title)}</title>'
        f"<style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _header(runs: Sequence[RunData], title: str, notes: Sequence[str]) -> str:
    facts: list[tuple[str, str]] = []
    for label, values in (
        ("environment", [run.env for run in runs]),
        ("algorithm", [str((run.config.get("algo") or {}).get("name") or "") for run in runs]),
        ("seeds", sorted({str(run.seed) for run in runs if run.seed is not None}, key=lambda s: (len(s), s))),
        ("steps", [f"{run.last_step:,}" for run in runs]),
        ("revision", [_revision(run) for run in runs]),
        ("torch", [str((run.provenance.get("packages") or {}).get("torch") or "") for run in runs]),
        ("device", [str(run.provenance.get("gpu") or run.provenance.get("cpu") or "") for run in runs]),
    ):
        known = list(dict.fromkeys(value for value in values if value))
        if known:
            facts.append((label, ", ".join(known[:6]) + (" …" if len(known) > 6 else "")))
    items = "".join(f"<li>{escape(label)} <b>{escape(value)}</b></li>" for label, value in facts)
    text = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<header><h1>{escape(title)}</h1>{text}<ul class="facts">{items}</ul></header>'


def _problems(runs: Sequence[RunData]) -> str:
    lines = [f"<li><code>{escape(run.name)}</code>: {escape(p)}</li>" for run in runs for p in run.problems]
    if not lines:
        return ""
    return f'<section class="card problems"><h2>Read with care</h2><ul>{"".join(lines)}</ul></section>'


def _comparison(item: Comparison, budget: Budget) -> str:
    before, after = item.before.success(), item.after.success()
    percent = before is not None and after is not None
    if before is None or after is None:
        before, after = item.before.mean_return(), item.after.mean_return()
    what = "success rate" if percent else "mean return"
    apart = not before.overlaps(after)
    verdict = ("good", "intervals do not overlap") if apart else ("bad", "intervals overlap")
    badge = f'<span class="badge {verdict[0]}">{verdict[1]}</span>'
    first, second = item.labels
    top = (
        _big(first, before, "before", percent)
        + _big(second, after, "after", percent)
        + _gain(item, percent, badge)
    )
    bars = interval_bars([(first, before, "before"), (second, after, "after")], percent=percent)
    film = ""
    if item.video is not None:
        data = budget.take(item.video)
        film = (
            video_tag(data) if data else f'<p class="dim">Too large to embed: {escape(item.video.name)}.</p>'
        )
    paired = _paired(item)
    episodes = f"{item.before.episodes:,} episodes each" if item.before.episodes == item.after.episodes else (
        f"{item.before.episodes:,} and {item.after.episodes:,} episodes")  # fmt: skip
    how = f"{what.capitalize()} over {episodes}" + (", from the same starts" if paired else "")
    how += ", deterministic actions" if item.after.deterministic else ", sampled actions"
    how += ". Wilson intervals, 95 %" if percent else ". Bootstrap intervals, 95 %"
    how += "; the gain's is bootstrapped over pairs of episodes." if paired else "."
    return (
        f'<h2>{escape(item.title)}</h2><section class="card hero">'
        f'<div class="top">{top}</div>{bars}{film}</section>'
        f'<p class="dim">{how}</p>'
    )


def _big(label: str, interval: Interval, kind: str, percent: bool) -> str:
    value, low, high = shown(interval, percent=percent)
    unit = " %" if percent else ""
    if percent:
        value = f"{interval.value * 100:.0f}"
    return (
        f'<div class="big {kind}"><span class="label">{escape(label)}</span>'
        f'<span class="value">{value}{unit}</span><span class="ends">{low} – {high}{unit}</span></div>'
    )


def _gain(item: Comparison, percent: bool, badge: str) -> str:
    paired = _paired(item)
    a, b = item.after.successes, item.before.successes
    if percent and a is not None and b is not None:
        difference = (a.mean() - b.mean()) * 100
        interval = paired_difference(a, b) if paired else None
        text = f"{difference:+.0f} points"
        ends = f"{interval.low * 100:+.0f} to {interval.high * 100:+.0f}" if interval else ""
    else:
        difference = item.after.returns.mean() - item.before.returns.mean()
        interval = paired_difference(item.after.returns, item.before.returns) if paired else None
        text = f"{'+' if difference >= 0 else ''}{number(float(f'{difference:.4g}'))}"
        ends = f"{interval.low:+.4g} to {interval.high:+.4g}" if interval else ""
    return (
        f'<div class="big gain"><span class="label">gain</span><span class="value">{text}</span>'
        f'<span class="ends">{ends} {badge}</span></div>'
    )


def _paired(item: Comparison) -> bool:
    same_env = item.before.env == item.after.env
    return same_env and item.before.seed == item.after.seed and item.before.episodes == item.after.episodes


def _revision(run: RunData) -> str:
    revision = str(run.provenance.get("revision") or "")
    return revision[:10] + ("+" if revision.endswith("+") and len(revision) > 10 else "")


def _footer(runs: Sequence[RunData]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    count = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    return f"<footer>robopost {__version__} · {when} · {count} · this page loads and runs nothing</footer>"
