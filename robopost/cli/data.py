# SPDX-License-Identifier: Apache-2.0
"""`robopost data`: inspect, verify, import and export datasets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robopost.cli.console import Parser, console, make_parser, setup_logging
from robopost.errors import DataError
from robopost.progress import progress_bar

EXAMPLES = (
    "robopost data info data/push.zarr",
    "robopost data verify demos.hdf5",
    "robopost data import demos.hdf5 --out data/demos.zarr",
    "robopost data export data/push.zarr --format minari --out push.hdf5",
)


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns 1 when `verify` finds errors."""
    parser = make_parser("data", "Inspect, verify, import and export datasets.", EXAMPLES, notes=_formats())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    info = _command(commands, "info", "what a dataset holds: keys, lengths, statistics")
    info.add_argument("--json", action="store_true", help="print JSON")
    verify = _command(commands, "verify", "find what is wrong with it and say where; exit code 1 on errors")
    verify.add_argument("--json", action="store_true", help="print JSON")
    load = _command(commands, "import", "convert a foreign dataset into a robopost store")
    load.add_argument("--out", type=Path, help="store to write, default PATH.robopost.zarr")
    load.add_argument("--overwrite", action="store_true", help="replace an existing store")
    save = _command(commands, "export", "write a store in a foreign format")
    save.add_argument("--out", type=Path, required=True, help="file or folder to write")
    args = parser.parse_args(argv)
    if args.command == "export" and args.format == "auto":
        parser.error("export needs --format NAME")
    setup_logging()
    return {"info": _info, "verify": _verify, "import": _import, "export": _export}[args.command](args)


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a store, or a file or folder of a known format"
    )
    parser.add_argument("--format", default="auto", help="name of the foreign format, default: detect it")
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the format, JSON or plain text; repeat for more",
    )
    return parser


def _formats() -> str:
    from robopost.registry import FORMATS

    width = max(len(name) for name in FORMATS.names()) + 2 if FORMATS.names() else 0
    lines = [
        f"  {e.name:<{width}}{e.summary}{'' if e.target.can_write else ' (import only)'}" for e in FORMATS
    ]
    return "formats:\n" + "\n".join(lines)


def _options(words: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise DataError(f"--option {word!r} is not KEY=VALUE. Fix: --option fps=10")
        try:
            out[key] = json.loads(text)
        except ValueError:
            out[key] = text
    return out


def _info(args: argparse.Namespace) -> int:
    from robopost.data.convert import describe

    facts = describe(args.path, args.format, _options(args.option))
    out = console()
    if args.json:
        out.print_json(json.dumps(facts))
        return 0
    from rich.table import Table

    rate = f"{facts['fps']:g} Hz" if facts["fps"] else "unknown rate"
    out.print(f"{facts['path']}: {facts['episodes']} episodes, {facts['steps']} steps, {rate}")
    out.print(f"source {facts['source']}, id {facts['dataset_id']}, {facts['bytes'] / 1e6:.1f} MB on disk")
    success = facts["success"]
    rated = "no success recorded" if success is None else f"success {success:.1%}"
    lengths = facts["length"]
    out.print(f"length {lengths['min']}..{lengths['max']} (mean {lengths['mean']:.1f}), {rated}")
    returns = facts["return"]
    out.print(
        f"return {returns['min']:.4g}..{returns['max']:.4g} (mean {returns['mean']:.4g}), "
        f"{facts['terminated']} terminated, {facts['truncated']} truncated, "
        f"{facts['without_final_obs']} without a final observation"
    )
    for text, count in facts["instructions"].items():
        out.print(f"instruction {text!r}: {count} episodes")
    table = Table("key", "shape", "dtype", "mean", "std", "min", "max")
    for key, item in facts["keys"].items():
        numbers = [_short(item.get(name)) for name in ("mean", "std", "min", "max")]
        table.add_row(key, str(tuple(item["shape"])), item["dtype"], *numbers)
    out.print(table)
    return 0


def _short(values: Any) -> str:
    if values is None:
        return ""
    flat = values if isinstance(values, list) else [values]
    shown = ", ".join(f"{value:.3g}" for value in flat[:3])
    return f"{shown}, ..." if len(flat) > 3 else shown


def _verify(args: argparse.Namespace) -> int:
    from robopost.data.verify import verify

    problems = verify(args.path, format=args.format, options=_options(args.option))
    errors = [problem for problem in problems if problem.severity == "error"]
    out = console()
    if args.json:
        rows = [vars(problem) for problem in problems]
        out.print_json(json.dumps({"path": str(args.path), "errors": len(errors), "problems": rows}))
        return 1 if errors else 0
    for problem in problems:
        out.print(str(problem), markup=False)
    warnings = len(problems) - len(errors)
    verdict = "fit for training" if not errors else "not fit for training"
    out.print(f"{args.path}: {len(errors)} errors, {warnings} warnings: {verdict}", markup=False)
    return 1 if errors else 0


def _import(args: argparse.Namespace) -> int:
    from robopost.data.convert import import_source
    from robopost.data.formats import open_source
    from robopost.data.store import is_store

    if is_store(args.path):
        raise DataError(f"{args.path} is a robopost store already. Fix: use it as data.path={args.path}")
    source = open_source(args.path, args.format, _options(args.option))
    target = args.out or args.path.with_name(f"{args.path.name}.robopost.zarr")
    with (
        progress_bar("importing", source.count) as update,
        import_source(
            source, target, overwrite=args.overwrite, progress=lambda done, _: update(done)
        ) as store,
    ):
        console().print(f"{target}: {len(store)} episodes, {store.num_steps} steps, id {store.dataset_id}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from robopost.data.convert import export_store, open_any

    with open_any(args.path) as store:
        export_store(store, args.out, args.format, _options(args.option))
        size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file()) or args.out.stat().st_size
        console().print(f"{args.out}: {len(store)} episodes, {store.num_steps} steps, {size / 1e6:.1f} MB")
    return 0
