# SPDX-License-Identifier: Apache-2.0
"""`robopost collect`: record episodes of an expert, a policy or random actions into a store."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from robopost.cli.console import add_overrides, console, make_parser, pluck, setup_logging
from robopost.cli.notes import available, settings
from robopost.errors import ConfigError
from robopost.progress import progress_bar

EXAMPLES = (
    "robopost collect env=arm_push episodes=200 out=data/push.zarr quality=0.5",
    "robopost collect env=arm_push policy=runs/<run> episodes=50 out=data/push_run.zarr noise=0.1",
    "robopost collect env=Hopper-v5 policy=random episodes=100 out=data/hopper.zarr num_envs=32",
    "robopost collect suite=mujoco_v5/hopper-medium      # a set of a suite, into data/mujoco_v5/",
)
SUITE_KEYS = ("suite", "out", "scale", "num_envs", "device")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = make_parser(
        "collect",
        "Record episodes into a store. Episode i starts from seed + i; executed actions, final observations\n"
        "and success are kept. An interrupted collection goes on when the command is repeated.",
        EXAMPLES,
        notes=f"{settings('collect')}\n\n{available(('env',))}" if {"-h", "--help"} & set(argv) else "",
    )
    add_overrides(parser)
    args = parser.parse_intermixed_args(argv)

    from robopost.collect import collect
    from robopost.compose import compose

    setup_logging()
    if pluck(args.overrides, "suite"):
        return _suite(args.overrides, args.config_dir, "robopost collect " + shlex.join(argv))
    config = compose(args.overrides, "collect", config_dirs=args.config_dir)
    try:
        with progress_bar("recording", config.episodes) as update:
            result = collect(config, progress=update)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"resume with: robopost collect {shlex.join(argv)}") from None
    out = console()
    if not result.recorded:
        out.print(f"{result.path} holds {result.episodes} episodes already", markup=False)
        return 0
    mean = sum(result.returns) / len(result.returns)
    line = f"{result.path}: {result.episodes} episodes, {result.steps} steps, mean return {mean:.2f}"
    if result.successes:
        line += f", success {sum(result.successes) / len(result.successes):.0%}"
    out.print(f"{line}, {result.seconds:.1f} s", markup=False)
    return 0


def _suite(words: Sequence[str], dirs: Sequence[str], command: str) -> int:
    """Record the sets that `suite=` names."""
    from robopost.compose import compose
    from robopost.suite import collect_set, load_set, set_names

    for word in words:
        if word.partition("=")[0] not in SUITE_KEYS:
            raise ConfigError(
                f"{word}: a set of a suite has its own. Beside suite=: {', '.join(SUITE_KEYS[1:])}"
            )
    config = compose([*([] if pluck(words, "out") else ["out="]), *words], "collect")
    out = console()
    for name in set_names(config.suite, dirs):
        wanted = load_set(name, dirs)
        folder = Path(config.out or Path("data") / wanted.suite)
        try:
            with progress_bar(f"recording {name}", max(1, int(wanted.steps * config.scale))) as update:
                result = collect_set(
                    wanted,
                    folder,
                    scale=config.scale,
                    num_envs=config.num_envs,
                    device=config.device,
                    progress=update,
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"resume with: {command}") from None
        done = f"{result.recorded} recorded" if result.recorded else "complete already"
        out.print(f"{result.path}: {result.episodes} episodes, {result.steps} steps, {done}", markup=False)
    return 0
