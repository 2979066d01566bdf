# SPDX-License-Identifier: Apache-2.0
"""`robopost demo`: the main job from end to end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from robopost.cli.console import add_overrides, console, make_parser, setup_logging
from robopost.cli.notes import settings

EXAMPLES = (
    "robopost demo",
    "robopost demo out=runs/demo_1 seed=1",
    "robopost demo out=/tmp/quick finetune_steps=4000",
)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = make_parser(
        "demo",
        "Records imperfect demonstrations of a scripted expert on arm_push, clones a flow policy from them,\n"
        "improves it by reinforcement learning on real physics, evaluates both on the same start states,\n"
        "and writes an HTML report with a side-by-side video. Interrupted, the same command goes on with the\n"
        "stage it stopped in.",
        EXAMPLES,
        notes=settings("demo") if {"-h", "--help"} & set(argv) else "",
    )
    add_overrides(parser)
    args = parser.parse_intermixed_args(argv)

    from robopost.compose import compose
    from robopost.demo import run_demo

    setup_logging()
    config = compose(args.overrides, "demo", config_dirs=args.config_dir)
    out = console()
    try:
        run_demo(config, say=lambda text: out.print(text, markup=False, highlight=False))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"resume with: robopost demo {shlex.join(argv)}") from None
    out.print(f"folder  {config.out}", markup=False)
    return 0
