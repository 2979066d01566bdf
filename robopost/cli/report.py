# SPDX-License-Identifier: Apache-2.0
"""`robopost report`: one self-contained HTML page of one or more runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robopost.cli.console import console, make_parser
from robopost.errors import ConfigError

EXAMPLES = (
    "robopost report runs/<run>",
    "robopost report runs/sac-* out=compare.html title='SAC, three seeds'",
)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = make_parser(
        "report",
        "Write one self-contained HTML page: curves with seeds, tables with intervals, videos.",
        EXAMPLES,
        notes="settings:\n  out=                  the file; default: report.html in the first run folder\n"
        "  title=                heading of the page",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; out= and title= may stand among them"
    )
    args = parser.parse_args(argv)
    runs, values = [], {"out": "", "title": ""}
    for word in args.runs:
        key, equals, value = word.partition("=")
        if equals and key in values and not Path(word).exists():
            values[key] = value
        else:
            runs.append(Path(word))
    if not runs:
        raise ConfigError("no run named. Fix: robopost report runs/<run>")
    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"{run} is not a run folder")
    out = Path(values["out"]) if values["out"] else runs[0] / "report.html"

    from robopost.report import write_report

    write_report(runs, out, title=values["title"] or ", ".join(run.name for run in runs))
    console().print(f"written: {out}", markup=False)
    return 0
