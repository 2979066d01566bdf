# SPDX-License-Identifier: Apache-2.0
"""`robopost eval`: success and return of a policy over whole episodes, with intervals, video and JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopost.cli.console import add_overrides, console, make_parser, pluck, setup_logging
from robopost.cli.notes import available, settings
from robopost.errors import ConfigError

if TYPE_CHECKING:
    from robopost.evaluate.rollout import EvalResult

EXAMPLES = (
    "robopost eval policy=runs/<run>",
    "robopost eval policy=runs/<run> env=arm_push episodes=100 video=4",
    "robopost eval policy=actor.npz env=HalfCheetah-v5 episodes=20 seed=1000",
)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = make_parser(
        "eval",
        "Evaluate a policy: each episode starts from its own seed and counts once. Prints success with a\n"
        "Wilson interval and return with a bootstrap interval, writes eval.json and, with video=N, an mp4.",
        EXAMPLES,
        notes=f"{settings('eval')}\n\n{available(('env',))}" if {"-h", "--help"} & set(argv) else "",
    )
    add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    name = pluck(args.overrides, "policy")
    if not name:
        raise ConfigError("policy has no value. Fix: policy=<run folder, checkpoint, npz actor or hub id>")

    from robopost.artefacts.source import local, open_policy, trained_env
    from robopost.compose import compose
    from robopost.evaluate.rollout import MAX_PARALLEL, evaluate
    from robopost.evaluate.scores import find_references
    from robopost.loops.run import resolve_device

    setup_logging()
    name = str(local(name))
    words, home = list(args.overrides), trained_env(name)
    if isinstance(home, str) and not pluck(words, "env"):
        words.insert(0, f"env={home}")
    given = {} if isinstance(home, str) else {"env": home}
    config = compose(words, "eval", config_dirs=args.config_dir, given=given)
    if config.env is None:
        raise ConfigError(f"no environment: policy={name} carries none. Fix: add env=<name or Gymnasium id>")
    count = min(config.num_envs, config.episodes) or _even_waves(config.episodes, MAX_PARALLEL)
    device, render = resolve_device(config.device), "rgb_array" if config.video else None
    policy, vec = open_policy(name, config.env, count, device=device, render=render)
    out = Path(config.out) if config.out else _default_folder(name)
    try:
        result = evaluate(
            policy,
            vec,
            episodes=config.episodes,
            seed=config.seed,
            deterministic=config.deterministic,
            video=out / "eval.mp4" if config.video else None,
            video_episodes=config.video,
            draws=config.draws,
            progress=console().is_terminal,
        )
    finally:
        vec.close()
    result.env = config.env.name
    result.references = find_references(config.env)
    _write(out, result, name)
    _show(result, name, config.env)
    console().print(
        f"written: {out / 'eval.json'}" + (f", {out / 'eval.mp4'}" if config.video else ""), markup=False
    )
    return 0


def _even_waves(episodes: int, most: int) -> int:
    """Environments per wave: as few waves as possible, all of nearly the same size."""
    return -(-episodes // -(-episodes // most))


def _default_folder(name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(name)
    return (
        path / "eval" / stamp if (path / "config.json").is_file() else Path("evals") / f"{path.stem}-{stamp}"
    )


def _write(out: Path, result: EvalResult, name: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".eval.json.partial"
    partial.write_text(json.dumps(result.to_json() | {"policy": name}, indent=1))
    partial.replace(out / "eval.json")


def _show(result: EvalResult, name: str, env: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    from robopost.results import number

    label = getattr(env, "id", "") or env.name
    table = Table(
        title=escape(f"{name} in {label}: {result.episodes} episodes, seeds {result.seed}.."),
        title_justify="left",
    )
    for column in ("", "value", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    success = result.success()
    if success is not None and result.successes is not None:
        count = f"{int(result.successes.sum())}/{result.episodes}"
        table.add_row("success", f"{success.value:.1%} ({count})", f"{success.low:.1%} - {success.high:.1%}")
    ret = result.mean_return()
    table.add_row("return", f"{ret.value:.2f}", f"{ret.low:.2f} - {ret.high:.2f}")
    score = result.score()
    if score is not None and result.references is not None:
        name = f"score ({result.references.label})"
        table.add_row(name, f"{score.value:.1f}", f"{score.low:.1f} - {score.high:.1f}")
    table.add_row("length", f"{result.lengths.mean():.1f}", "")
    table.add_row("max reward", f"{result.max_rewards.mean():.3f}", "")
    for label, interval, unit in result.smoothness.rows() if result.smoothness is not None else ():
        low, high = number(interval.low), number(interval.high)
        table.add_row(label, f"{number(interval.value)} {unit}".rstrip(), f"{low} - {high}")
    console().print(table)
