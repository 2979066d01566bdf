# SPDX-License-Identifier: Apache-2.0
"""`robopost bench`: run a benchmark of the checkout, list them, or say which targets hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robopost.cli.console import console, make_parser, setup_logging
from robopost.errors import ConfigError

EXAMPLES = (
    "robopost bench --list",
    "robopost bench vecenv --tier smoke",
    "robopost bench ppo --tier small --cells 'hopper/*'",
    "robopost bench --summary",
    "robopost bench --render",
)


def main(argv: Sequence[str]) -> int:
    """Run the command. Exit code 1 when a cell failed."""
    parser = make_parser(
        "bench",
        "Run a benchmark of benchmarks/ and write results/. A second call does only what is missing.",
        EXAMPLES,
    )
    parser.add_argument("name", nargs="?", help="a file of benchmarks/, without .py")
    parser.add_argument(
        "--tier", choices=("smoke", "small", "paper"), default="smoke", help="how much (default: smoke)"
    )
    parser.add_argument("--cells", default="*", metavar="PATTERN", help="only cells whose key matches")
    parser.add_argument("--rerun", action="store_true", help="measure again what is stored")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="results folder (default: results/ of the checkout)"
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument(
        "--summary", action="store_true", help="print every figure and whether its target holds"
    )
    parser.add_argument("--render", action="store_true", help="update the tables in README.md and docs/")
    parser.add_argument("--check", action="store_true", help="fail where those tables are stale")
    args = parser.parse_args(argv)

    from robopost.bench import available, find_checkout, run_benchmark

    setup_logging()
    root = find_checkout()
    if args.list:
        _list(available(root))
        return 0
    if args.summary:
        _summary(args.results or root / "results", list(available(root)))
        return 0
    if args.render or args.check:
        return _docs(root, args.results, check=args.check)
    if not args.name:
        raise ConfigError("no benchmark named. Fix: robopost bench NAME; `robopost bench --list` shows them")
    bench = run_benchmark(
        args.name, args.tier, root=root, results_dir=args.results, cells=args.cells, rerun=args.rerun
    )
    _figures(bench.figures, str(bench.path))
    if bench.left_out:
        console().print(f"left out: {', '.join(bench.left_out)}", markup=False)
    if bench.failed:
        raise ConfigError(f"failed cells: {', '.join(bench.failed)}; their errors are in {bench.path}")
    return 0


def _docs(root: Path, results: Path | None, *, check: bool) -> int:
    from robopost.tables import check_docs, render_docs

    paths = [str(path.relative_to(root)) for path in (check_docs if check else render_docs)(root, results)]
    if check and paths:
        raise ConfigError(f"stale tables in {', '.join(paths)}. Fix: robopost bench --render")
    console().print("\n".join(f"rendered {path}" for path in paths) or "tables are up to date", markup=False)
    return 0


def _list(files: dict[str, Path]) -> None:
    import ast

    out = console()
    if not files:
        out.print("benchmarks/ is empty")
    for name, path in files.items():
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        out.print(f"{name:<20}{doc.splitlines()[0] if doc else ''}", markup=False)


def _summary(results: Path, benchmarks: Sequence[str]) -> None:
    from robopost.results import read_results

    found = read_results(results)
    figures = [figure for data in found for figure in data["figures"]]
    missing = [name for name in benchmarks if name not in {data["name"] for data in found}]
    failed = [
        f"{data['name']}: {row['cell']}" for data in found for row in data["rows"] if row["status"] != "ok"
    ]
    for label, names in (("not run yet", missing), ("failed cells", failed)):
        if names:
            console().print(f"{label}: {', '.join(names)}", markup=False)
    if not figures:
        console().print(
            f"no figures in {results}; `robopost bench NAME --tier small` makes some", markup=False
        )
        return
    _figures(figures, str(results))


def _figures(figures: Sequence[dict[str, Any]], title: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from robopost.results import status

    table = Table(title=escape(title), title_justify="left")
    for column in ("figure", "value", "interval", "unit", "target", "tier", "status"):
        side = "right" if column in ("value", "interval", "target") else "left"
        table.add_column(column, justify=side, overflow="fold")
    colours = {"holds": "green", "misses": "red", "empty": "yellow"}
    for figure in figures:
        state = status(figure)
        sign = ">=" if figure["better"] == "higher" else "<="
        bounds = figure.get("interval")
        row = (
            escape(figure["name"]),
            "" if figure["value"] is None else f"{figure['value']:.4g}",
            f"{bounds[0]:.4g} - {bounds[1]:.4g}" if bounds else "",
            escape(figure["unit"]),
            "" if figure["target"] is None else f"{sign} {figure['target']:g}",
            figure.get("tier", ""),
        )
        table.add_row(*row, f"[{colours[state]}]{state}[/]" if state in colours else state)
    console().print(table)
