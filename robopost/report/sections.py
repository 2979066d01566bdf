# SPDX-License-Identifier: Apache-2.0
"""The sections of a report: evaluation table, curves, videos, config, provenance. All text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from robopost.evaluate.statistics import Interval, t_interval, wilson
from robopost.report.charts import COLOURS, Curve, Series, line_chart, mini_bar, seed_curve, shown
from robopost.report.runs import Evaluation, RunData, flatten
from robopost.results import number
from robopost.track.jsonl import series

MAIN = ("eval/success", "eval/return", "eval/max_reward", "train/success", "train/return")
PERCENT = ("success", "fraction")
SAME = {"seed", "out", "resume"}  # differ between the seeds of one group without being a difference
Groups = dict[str, list[RunData]]


class Budget:
    """Bytes of video a page may still embed."""

    def __init__(self, total: int, single: int) -> None:
        self.left, self.single = total, single

    def take(self, path: Path) -> bytes | None:
        """The file's bytes, or None when it is gone, too large, or the page is full."""
        try:
            size = path.stat().st_size
            if size > min(self.left, self.single):
                return None
            self.left -= size
            return path.read_bytes()
        except OSError:
            return None


def group_runs(runs: Sequence[RunData]) -> dict[str, Groups]:
    """Environment -> group label -> runs. Groups whose names agree but whose configs don't are kept apart."""
    tree: dict[str, dict[str, dict[str, list[RunData]]]] = {}
    for run in runs:
        shape = "\n".join(f"{k}={v}" for k, v in sorted(flatten(run.config).items()) if k not in SAME)
        tree.setdefault(run.env, {}).setdefault(run.group, {}).setdefault(shape, []).append(run)
    out: dict[str, Groups] = {}
    for env, groups in tree.items():
        out[env] = {}
        for label, variants in groups.items():
            for members in variants.values():
                key = label if len(variants) == 1 else f"{label} · {members[0].name}"
                while key in out[env]:
                    key += "′"
                out[env][key] = sorted(members, key=lambda run: (run.seed is None, run.seed or 0))
    return out


def evaluation_table(groups: Groups) -> str:
    """Last evaluation of each run with its interval, best and offline next to it, and the mean over seeds."""
    last = {id(run): _last(run) for runs in groups.values() for run in runs}
    shown = [item.result for item in last.values() if item is not None]
    if not shown:
        return '<p class="dim">These runs hold no evaluation.</p>'
    judged = any(result.successes is not None for result in shown)
    both = any(run.switch is not None for runs in groups.values() for run in runs)
    returns = [result.mean_return() for result in shown]
    low, high = min(i.low for i in returns), max(i.high for i in returns)
    head = ["run", "step"] + (["success", ""] if judged else []) + ["return", ""]
    measure = "success" if judged else "return"
    head += [f"best {measure} (step)", *([f"offline {measure} (step)"] if both else []), "episodes", "length"]
    rows = []
    for colour, (label, runs) in enumerate(groups.items()):
        items = [item for item in (last[id(run)] for run in runs) if item is not None]
        several = len(runs) > 1
        if several and items:
            cells = [_named(label, colour), ""]
            if judged:
                outcomes = [i.result.successes for i in items if i.result.successes is not None]
                cells += _interval(seeds_success(outcomes), 0, 1, colour, percent=True)
            mean = t_interval([item.result.returns.mean() for item in items])
            cells += _interval(mean, low, high, colour)
            cells += ["", *([""] if both else []), _num(f"{len(items)} seeds"), ""]
            rows.append(_row(cells, "group"))
        for run in runs:
            name = f"seed {run.seed}" if several else label
            rows.append(_run_row(run, last[id(run)], name, colour, several, judged, both, (low, high)))
    note = "Success: Wilson interval. Return: bootstrap interval. Means over seeds: Student's t, for success never "
    note += "narrower than the pooled Wilson interval. All 95 %."
    head_html = "".join(
        f'<th class="{"num" if h in ("step", "length", "episodes") else ""}">{h}</th>' for h in head
    )
    body = f"<thead><tr>{head_html}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="card"><div class="scroll"><table>{body}</table></div></div><p class="dim">{note}</p>'


def smoothness_table(groups: Groups) -> str:
    """Smoothness of each run's last evaluation, one line per run; empty where none holds any."""
    rows: list[tuple[str, str, dict[str, Interval]]] = []
    for colour, (label, runs) in enumerate(groups.items()):
        for run in runs:
            item = _last(run)
            if item is not None and item.result.smoothness is not None:
                found = item.result.smoothness.rows()
                cells = {f"{name} ({unit})" if unit else name: interval for name, interval, unit in found}
                rows.append((_named(label, colour), f"seed {run.seed}" if len(runs) > 1 else "", cells))
    columns = list(dict.fromkeys(name for _, _, cells in rows for name in cells))
    if not columns:
        return ""
    several = any(seed for _, seed, _ in rows)
    head = ["run", *(["seed"] if several else []), *columns]
    body = []
    for name, seed, cells in rows:
        values = [f'{v} <span class="ends">{a} – {b}</span>' for v, a, b in map(shown, cells.values())]
        table = dict(zip(cells, values, strict=True))
        body.append(_row([name, *([seed] if several else []), *(table.get(key, "") for key in columns)], ""))
    top = "".join(f"<th>{escape(key)}</th>" for key in head)
    note = (
        "Executed actions as fractions of their range; means over episodes with Student's t intervals, 95 %."
    )
    html = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="card"><div class="scroll">{html}</div></div><p class="dim">{note}</p>'


def curves(groups: Groups) -> tuple[str, str]:
    """(main charts, all other charts) over steps, one colour per group."""
    keys = list(
        dict.fromkeys(k for runs in groups.values() for run in runs for line in run.metrics for k in line)
    )
    plain = [k for k in keys if k not in ("step", "time") and not k.endswith(("_low", "_high"))]
    charts = {key: _chart(key, groups) for key in sorted(plain)}
    charts = {key: chart for key, chart in charts.items() if chart}
    main = [charts.pop(key) for key in MAIN if key in charts]
    legend = "".join(
        f'<li style="--c:var(--c{i % COLOURS})"><i></i>{escape(label)}{_seeds(runs)}</li>'
        for i, (label, runs) in enumerate(groups.items())
    )
    legend = f'<ul class="legend">{legend}</ul>'
    first = f'{legend}<div class="charts">{"".join(main)}</div>' if main else ""
    if not charts:
        return first, ""
    return first, ("" if main else legend) + f'<div class="charts small">{"".join(charts.values())}</div>'


def videos(groups: Groups, budget: Budget) -> str:
    """First and last video of each group's first run, embedded while the budget lasts."""
    cells, left_out = [], []
    for run in (runs[0] for runs in groups.values()):
        picked = run.videos if len(run.videos) <= 2 else [run.videos[0], run.videos[-1]]
        for step, path in picked:
            where = f"step {step:,}" if step is not None else path.parent.name
            data = budget.take(path)
            if data is None:
                left_out.append(f"{run.name}/{path.name}")
                continue
            caption = f"<figcaption>{escape(run.name)} · {escape(where)}</figcaption>"
            cells.append(f"<figure>{video_tag(data)}{caption}</figure>")
    note = f'<p class="dim">Too large to embed: {escape(", ".join(left_out))}.</p>' if left_out else ""
    return (f'<div class="videos">{"".join(cells)}</div>' if cells else "") + note


def video_tag(data: bytes) -> str:
    """A looping, muted player with the mp4 inside."""
    text = base64.b64encode(data).decode("ascii")
    return f'<video controls loop muted autoplay playsinline src="data:video/mp4;base64,{text}"></video>'


def config_section(groups: Groups) -> str:
    """Differences between the groups first, the whole config behind a fold."""
    columns = {label: _merge([flatten(run.config) for run in runs]) for label, runs in groups.items()}
    return _comparison(columns, "Config")


def provenance_section(groups: Groups) -> str:
    """Command, revision, versions and machine of each group."""
    columns = {}
    for label, runs in groups.items():
        plain = [{k: v for k, v in run.provenance.items() if k != "policies"} for run in runs]
        columns[label] = _merge([flatten(item) if item else {} for item in plain])
    return _comparison(columns, "Provenance")


def _comparison(columns: dict[str, dict[str, str]], title: str) -> str:
    keys = sorted({key for column in columns.values() for key in column})
    if not keys:
        return f'<p class="dim">{title} is missing.</p>'
    differs = [
        k for k in keys if len({column.get(k, "–") for column in columns.values()}) > 1 and k not in SAME
    ]
    head = (
        "" if len(columns) == 1 else "<th></th>" + "".join(f"<th>{escape(label)}</th>" for label in columns)
    )

    def table(chosen: Iterable[str], mark: bool) -> str:
        rows = []
        for key in chosen:
            cells = "".join(f"<td>{escape(column.get(key, '–'))}</td>" for column in columns.values())
            kind = ' class="differs"' if mark and key in differs else ""
            rows.append(f"<tr{kind}><td>{escape(key)}</td>{cells}</tr>")
        top = f"<thead><tr>{head}</tr></thead>" if head else ""
        return f'<div class="card scroll"><table class="kv">{top}<tbody>{"".join(rows)}</tbody></table></div>'

    parts = []
    if differs and len(columns) > 1:
        parts.append(f"<h3>What differs</h3>{table(differs, mark=False)}")
    parts.append(
        f"<details><summary>All of it ({len(keys)} entries)</summary>{table(keys, mark=True)}</details>"
    )
    return "".join(parts)


def _merge(columns: list[dict[str, str]]) -> dict[str, str]:
    """One column for the runs of a group; values that differ between seeds are listed."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: " | ".join(dict.fromkeys(column.get(key, "–") for column in columns)) for key in keys}


def _last(run: RunData) -> Evaluation | None:
    return run.trained[-1] if run.trained else run.evaluations[-1] if run.evaluations else None


def _run_row(
    run: RunData,
    item: Evaluation | None,
    name: str,
    colour: int,
    several: bool,
    judged: bool,
    both: bool,
    ends: tuple[float, float],
) -> str:
    first = escape(name) if several else _named(name, colour)
    if item is None:
        width = 8 + (2 if judged else 0) + both
        return f'<tr class="seed"><td>{first}</td><td class="dim" colspan="{width}">no evaluation</td></tr>'
    result = item.result
    cells = [first, _num("" if item.step is None else f"{item.step:,}")]
    if judged:
        success = result.success()
        cells += _interval(success, 0, 1, colour, percent=True) if success else ["", ""]
    cells += _interval(result.mean_return(), *ends, colour)
    cells += [
        _best(run, judged),
        *([_offline(run, judged)] if both else []),
        _num(f"{result.episodes:,}"),
        _num(f"{result.lengths.mean():.0f}"),
    ]
    return _row(cells, "seed" if several else "")


def _best(run: RunData, judged: bool) -> str:
    scored = []
    for item in run.trained:
        values = item.result.successes if judged else item.result.returns
        if values is not None:
            scored.append((float(values.mean()), item.step))
    if len(scored) < 2:
        return ""
    value, step = max(scored, key=lambda pair: pair[0])
    return _score(value, step, judged)


def _offline(run: RunData, judged: bool) -> str:
    """The evaluation at the end of the offline updates of a run that goes on online."""
    for item in run.trained:
        values = item.result.successes if judged else item.result.returns
        if item.step == run.switch and values is not None:
            return _score(float(values.mean()), item.step, judged)
    return ""


def _score(value: float, step: int | None, judged: bool) -> str:
    return f"{value * 100:.1f} % ({step:,})" if judged else f"{number(value)} ({step:,})"


def _chart(key: str, groups: Groups) -> str:
    drawn: list[Curve] = []
    for colour, (label, runs) in enumerate(groups.items()):
        seeds = [_series(run, key) for run in runs]
        found = [(run, s) for run, s in zip(runs, seeds, strict=True) if len(s[0])]
        if not found:
            continue
        bounds = None
        if len(found) == 1:
            run = found[0][0]
            bounds = (_series(run, f"{key}_low"), _series(run, f"{key}_high"))
        drawn.append(seed_curve(label, colour, [s for _, s in found], bounds))
    if not drawn or max(len(x) for c in drawn for x in (c.x, *(t[0] for t in c.thin))) < 2:
        return ""  # a single evaluation is in the table
    name = key.rpartition("/")[2]
    values = np.concatenate([part for c in drawn for part in (c.y, *(y for _, y in c.thin))])
    percent = any(word in name for word in PERCENT) and values.min() >= 0 and values.max() <= 1
    switches = {run.switch for runs in groups.values() for run in runs if run.switch is not None}
    return line_chart(key, drawn, percent=percent, switches=sorted(switches))


def _series(run: RunData, key: str) -> Series:
    steps, values = series(run.metrics, key)
    # A step logged twice keeps its last value, and steps rise: a curve is a function.
    table = dict(zip(steps, values, strict=True))
    x = np.array(sorted(table), dtype=np.float64)
    return x, np.array([table[int(step)] for step in x], dtype=np.float64)


def _seeds(runs: Sequence[RunData]) -> str:
    return f' <span class="dim">({len(runs)} seeds)</span>' if len(runs) > 1 else ""


def _named(label: str, colour: int) -> str:
    return f'<span class="swatch" style="--c:var(--c{colour % COLOURS})"></span>{escape(label)}'


def _interval(
    interval: Interval, low: float, high: float, colour: int, *, percent: bool = False
) -> list[str]:
    value, lower, upper = shown(interval, percent=percent)
    unit = " %" if percent else ""
    return [
        f'{value}{unit} <span class="ends">{lower} – {upper}</span>',
        mini_bar(interval, low, high, colour),
    ]


def seeds_success(outcomes: Sequence[np.ndarray]) -> Interval:
    """Mean success over seeds: Student's t between seeds, never narrower than the pooled Wilson interval.

    Three seeds that all fail have no spread, which says nothing about rates below one in their episodes.
    """
    between = t_interval([float(values.mean()) for values in outcomes])
    pooled = wilson(int(sum(values.sum() for values in outcomes)), sum(map(len, outcomes)))
    low, high = min(between.low, pooled.low), max(between.high, pooled.high)
    return replace(between, low=max(0.0, low), high=min(1.0, high))


def _num(text: str) -> str:
    return f"\0{text}"  # marks a right-aligned cell for _row


def _row(cells: list[str], kind: str) -> str:
    inner = "".join(_td(cell) for cell in cells)
    return f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>"


def _td(cell: str) -> str:
    css = (
        "num" if cell[:1] == "\0" else "minibar" if cell[:4] == "<svg" else "value" if "ends" in cell else ""
    )
    return f'<td class="{css}">{cell.lstrip(chr(0))}</td>' if css else f"<td>{cell}</td>"
