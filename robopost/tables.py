# SPDX-License-Identifier: Apache-2.0
"""Tables in README.md and docs/ are rendered from results files, never typed.

A document holds `<!-- results:NAME -->` and `<!-- /results -->` on lines of their own; what stands between is
replaced. NAME is one of

    ppo            everything of results/*/ppo.json: its tables, its figures, where they come from
    ppo/figures    only the figures          ppo/cells    the raw cells          ppo/TABLE    one table
    ppo/output     what the command of the first cell printed, where the benchmark keeps it
    *              the figures of all benchmarks, with their targets
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from robopost.errors import ConfigError, unknown
from robopost.results import number, read_result, status

_OPEN = re.compile(r"^<!-- results:(\S+) -->\s*$")
_CLOSE = re.compile(r"^<!-- /results -->\s*$")
_FENCE = re.compile(r"^\s*(```|~~~)")


def render_docs(root: Path, results_dir: Path | None = None) -> list[Path]:
    """Bring every document of the checkout up to date. Returns the files that changed."""
    changed = []
    for path, text in _stale(root, results_dir):
        path.write_text(text, encoding="utf-8")
        changed.append(path)
    return changed


def check_docs(root: Path, results_dir: Path | None = None) -> list[Path]:
    """Documents whose tables no longer match the results; empty when all is well."""
    return [path for path, _ in _stale(root, results_dir)]


def render_text(text: str, results_dir: Path, *, name: str = "document") -> str:
    """Replace the blocks of one document. Markers inside fenced code are left alone.

    Raises:
        ConfigError: a block is not closed, or names a table its results file doesn't have.
    """
    out: list[str] = []
    fenced, inside = False, ""
    for line_number, line in enumerate(text.splitlines(keepends=True), start=1):
        opened, closed = _OPEN.match(line), _CLOSE.match(line)
        if inside:
            if opened:
                raise ConfigError(
                    f"{name} line {line_number}: results:{inside} is not closed by <!-- /results -->"
                )
            if closed:
                out.append(line)
                inside = ""
            continue
        out.append(line)
        if _FENCE.match(line):
            fenced = not fenced
        elif opened and not fenced:
            inside = opened.group(1)
            out.append("\n" + render_block(inside, results_dir) + "\n\n")
        elif closed and not fenced:
            raise ConfigError(f"{name} line {line_number}: <!-- /results --> closes nothing")
    if inside:
        raise ConfigError(f"{name}: results:{inside} is not closed by <!-- /results -->")
    return "".join(out)


def render_block(spec: str, results_dir: Path) -> str:
    """Markdown for one marker, without a trailing newline."""
    if spec == "*":
        return _all(results_dir)
    name, _, part = spec.partition("/")
    path = _find(name, results_dir)
    if path is None:
        return _not_measured(name)
    data = read_result(path)
    tables = {table["name"]: table for table in data.get("tables", [])}
    if not part:
        parts = [_table(table) for table in data.get("tables", [])]
        if data["figures"]:
            parts.append(figure_table(data["figures"]))
        return "\n\n".join([*parts, source_line(data)])
    if part == "figures":
        return figure_table(data["figures"]) + "\n\n" + source_line(data)
    if part == "cells":
        return _cells(data) + "\n\n" + source_line(data)
    if part == "output":
        return _output(data)
    if not tables:  # cells are being measured; the benchmark writes its tables at its end
        return _not_measured(name)
    if part not in tables:
        raise unknown(f"table of {path.name}", part, [*tables, "figures", "cells"])
    return _table(tables[part]) + "\n\n" + source_line(data)


def _not_measured(name: str) -> str:
    return f"*Not measured yet: `robopost bench {name} --tier small`.*"


def _output(data: dict[str, Any]) -> str:
    """The lines stored under `output` in the first cell that has them, as a code block."""
    for row in data["rows"]:
        lines = (row.get("result") or {}).get("output")
        if lines:
            return "\n".join(["```text", *lines, "```"])
    return "*No output stored.*"


def figure_table(figures: list[dict[str, Any]]) -> str:
    """Markdown table of figures with intervals, targets and whether they hold."""
    rows = []
    for figure in figures:
        sign = "≥" if figure["better"] == "higher" else "≤"
        bounds = figure["interval"]
        value = "" if figure["value"] is None else f"{number(figure['value'])} {figure['unit']}".strip()
        rows.append(
            [
                f"`{figure['name']}`" + (f" ({figure['note']})" if figure.get("note") else ""),
                value,
                f"{number(bounds[0])} to {number(bounds[1])}" if bounds else "",
                "" if figure["target"] is None else f"{sign} {number(figure['target'])}",
                "not measured yet" if status(figure) == "empty" else status(figure),
            ]
        )
    return markdown(["figure", "value", "interval", "target", "status"], rows, right={1, 2, 3})


def source_line(data: dict[str, Any]) -> str:
    """Where the numbers of a results file come from, in one line; failed cells are named."""
    hardware = data["hardware"]
    where = f"{hardware['cpu']}, {hardware['cores']} cores"
    if hardware.get("gpu"):
        where += f", {hardware['gpu'][0]}"
    # The revision of the cells that are shown, which may be older than that of the last run.
    commits = sorted({str(row.get("commit") or "unknown")[:7] for row in data["rows"]})
    parts = [f"`{data['command']}`", where]
    if data["seeds"]:
        parts.append(f"seeds {', '.join(map(str, data['seeds']))}")
    parts.append(f"{number(round(data['wall_s']))} s")
    parts.append(f"commit {', '.join(commits)}" if commits else "no cells")
    failed = [row["cell"] for row in data["rows"] if row["status"] != "ok"]
    if failed:
        parts.append(f"**failed: {', '.join(failed)}**")
    line = " ".join(" · ".join(parts).split())
    return line if failed else f"*{line}*"


def markdown(columns: list[str], rows: list[list[str]], *, right: set[int] | None = None) -> str:
    """A GitHub table; `right` are the columns set flush right."""
    right = right or set()
    lines = ["| " + " | ".join(_escape(column) for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if i in right else "---" for i in range(len(columns))) + "|")
    lines += ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _table(table: dict[str, Any]) -> str:
    numeric = {
        i
        for i in range(len(table["columns"]))
        if any(isinstance(row[i], int | float) for row in table["rows"])
        and all(isinstance(row[i], int | float | None) for row in table["rows"])
    }
    rows = [[_cell(value) for value in row] for row in table["rows"]]
    caption = f"**{_escape(table['caption'])}**\n\n" if table.get("caption") else ""
    return caption + markdown(table["columns"], rows, right=numeric)


def _cells(data: dict[str, Any]) -> str:
    keys: dict[str, None] = {}
    for row in data["rows"]:
        for key, value in row.get("result", {}).items():
            if not isinstance(value, list | dict):
                keys[key] = None
    rows = []
    for row in data["rows"]:
        result = row.get("result", {})
        values = [_cell(result.get(key)) for key in keys]
        rows.append(
            [row["cell"], *values, number(row["seconds"]), "" if row["status"] == "ok" else row["error"]]
        )
    return markdown(["cell", *keys, "seconds", "error"], rows, right=set(range(1, len(keys) + 2)))


def _all(results_dir: Path) -> str:
    paths = sorted(path for path in results_dir.glob("*/*.json") if path.parent.name != "smoke")
    figures = [figure for path in paths for figure in read_result(path)["figures"]]
    return figure_table(figures) if figures else "*Nothing measured yet.*"


def _find(name: str, results_dir: Path) -> Path | None:
    found = sorted(path for path in results_dir.glob(f"*/{name}.json") if path.parent.name != "smoke")
    if len(found) > 1:
        raise ConfigError(
            f"results:{name} is ambiguous: {', '.join(str(p.relative_to(results_dir)) for p in found)}"
        )
    return found[0] if found else None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else str(value)


def _escape(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _stale(root: Path, results_dir: Path | None) -> list[tuple[Path, str]]:
    results = results_dir or root / "results"
    paths = [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.is_file()]
    stale = []
    for path in paths:
        old = path.read_text(encoding="utf-8")
        new = render_text(old, results, name=str(path.relative_to(root)))
        if new != old:
            stale.append((path, new))
    return stale
