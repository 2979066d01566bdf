# SPDX-License-Identifier: Apache-2.0
"""`robopost merge`: interpolate the weights of a model and its fine-tuned children, streamed and checked."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from robopost.cli.console import console, make_parser, setup_logging
from robopost.cli.notes import settings
from robopost.merging.config import METHODS, TASKS, MergeConfig, parse_words
from robopost.progress import progress_bar

EXAMPLES = (
    "robopost merge base=runs/<pretrained> finetuned=runs/<tuned> alpha=0.75 out=merged",
    "robopost merge base=pi0/ finetuned=pi0_mugs/ modules=vision:1,language:0.8,action:1 out=pi0_merged",
    "robopost merge base=a finetuned=b,c method=ties keep=0.3 alpha=0.7 dtype=float32 out=merged",
    "robopost merge base=runs/<pretrained> finetuned=runs/<tuned> alpha=0:1:0.25 out=sweep choose=variation \\\n"
    "      old='env=arm_language env.split=train' new='env=<task>' variation='env=<task> env.<key>=<value>'",
)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = make_parser(
        "merge",
        "Merge the weights of a pre-trained model and of what was fine-tuned from it: the merged policy keeps the\n"
        "old skills and often does better on variations of the new one than either parent (RETAIN). Parents are\n"
        "robopost runs and policies, folders with config.json and safetensors (one file or shards), or files. They\n"
        "are streamed: memory does not grow with the model. What does not go together (shapes, tokenizers,\n"
        "normalisers, ...) is refused before anything is written, and the output folder appears whole or not at all.",
        EXAMPLES,
        notes=_notes() if {"-h", "--help"} & set(argv) else "",
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="parents, method and coefficients")
    args = parser.parse_intermixed_args(argv)
    setup_logging()
    config = parse_words(args.words)
    if config.sweep or config.method == "greedy_soup":
        return _sweep(config, argv)

    from robopost.merging.merge import merge

    with progress_bar("merging, percent", 100) as update:
        result = merge(config, progress=lambda done, total: update(100 * done // total))
    rate = result.read / 1e9 / result.seconds
    out = console()
    out.print(
        f"{result.folder}: {result.written / 1e9:.3g} GB merged from {len(config.finetuned) + 1} parents in "
        f"{result.seconds:.1f} s ({rate:.2f} GB of parents per second)",
        markup=False,
    )
    out.print(f"written: {result.folder / 'README.md'} (parents, hashes, coefficients)", markup=False)
    return 0


def _sweep(config: MergeConfig, argv: Sequence[str]) -> int:
    from rich.markup import escape
    from rich.table import Table

    from robopost.merging.sweep import CHOSEN, FILE, rows, run_sweep

    tasks = sum(bool(getattr(config, name)) for name in TASKS)
    points = len(config.alpha) or 1
    parents = 2 + len(config.finetuned)
    total = points * (tasks - bool(config.test)) + (parents * tasks if config.choose else 0)
    try:
        with progress_bar("evaluations", max(1, total)) as update:
            sweep = run_sweep(config, update)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"resume with: robopost merge {shlex.join(argv)}") from None
    out = console()
    if not sweep.tasks:
        out.print(f"{config.out}: {len(sweep.line)} merged checkpoints, one per alpha", markup=False)
        return 0
    for split in ("validation", "test"):
        lines = rows(sweep, split)
        if not lines:
            continue
        table = Table(title=f"{split} episodes, {config.episodes} per cell", title_justify="left")
        columns = list(dict.fromkeys(key for line in lines for key in line))
        for column in columns:
            table.add_column(column, justify="left" if column == "policy" else "right")
        for line in lines:
            table.add_row(*(escape(str(line.get(column, ""))) for column in columns))
        out.print(table)
    out.print(f"written: {sweep.folder / FILE}", markup=False)
    if sweep.chosen:
        out.print(f"chosen: {sweep.chosen} -> {sweep.folder / CHOSEN}", markup=False)
    return 0


def _notes() -> str:
    width = max(map(len, METHODS)) + 2
    listed = "\n".join(f"  {name:<{width}}{text}" for name, text in METHODS.items())
    return f"{settings('merge')}\n\nmethods:\n{listed}"
