# SPDX-License-Identifier: Apache-2.0
"""`robopost train`: compose the config, create the run folder, run the loop the algorithm asks for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from robopost.cli.console import add_overrides, console, make_parser, pluck, setup_logging
from robopost.cli.notes import available
from robopost.errors import CheckpointError, ConfigError
from robopost.progress import progress_bar

if TYPE_CHECKING:
    from robopost.config import TrainConfig

EXAMPLES = (
    "robopost train recipe=arm_push/flow_bc",
    "robopost train algo=sac env=HalfCheetah-v5 steps=50000 seed=1",
    "robopost train algo=bc policy=flow data=data/push.zarr env=arm_push algo.lr=3e-4",
    "robopost train resume=runs/<run> loop.steps=100000",
    "robopost train resume=runs/<offline run> loop.online_steps=50000    # go on in the environment",
    "robopost train algo=td3_bc data=<path> seeds=8 accel.stack_seeds=on     # offline seeds, all at once",
    "robopost train algo=ppo --help          # settings of ppo",
)
GROUPS = ("algo", "policy", "env", "data", "track", "recipe")
# What may change when a run goes on: lengths, intervals and where it is shown. All else would be another run.
RESUMABLE = (
    "loop.steps",
    "loop.online_steps",
    "loop.log_every",
    "loop.eval_every",
    "loop.eval_episodes",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "track.",
    "device",
    "accel.stack_seeds",
    "accel.fsdp",
)
# What only the online phase uses, of an offline run that has none yet.
BEFORE_ONLINE = ("loop.online_sampling", "loop.buffer_size", "env.num_envs")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    words = list(argv)
    dirs = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config-dir"]
    parser = make_parser(
        "train",
        "Train a policy. group=name chooses a piece, key=value changes a setting.",
        EXAMPLES,
        notes=available(GROUPS, dirs) if {"-h", "--help"} & set(words) else "",
    )
    add_overrides(parser)
    parser.add_argument(
        "--explain", action="store_true", help="print the settings of the named pieces and stop"
    )
    parser.add_argument(
        "--show", action="store_true", help="print the whole resolved config as YAML and stop"
    )
    if {"-h", "--help"} & set(words) and any(
        word.startswith(("algo=", "policy=", "env=", "recipe=")) for word in words
    ):
        words = [word for word in words if word not in ("-h", "--help")] + ["--explain"]
    args = parser.parse_intermixed_args(words)
    if args.explain:
        from robopost.cli.explain import explain

        explain(args.overrides, "train", args.config_dir)
        return 0
    config = resolve(args.overrides, args.config_dir)
    if args.show:
        import yaml

        from robopost.compose import to_dict

        console().print(yaml.safe_dump(to_dict(config), sort_keys=False), markup=False, end="")
        return 0
    return _run(config, "robopost train " + shlex.join(argv))


def resolve(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> TrainConfig:
    """The config of a new run, or with `resume=<run>` the stored one with the few changes that may be made.

    Raises:
        ConfigError: anything wrong with the words.
        CheckpointError: `resume` names no run.
    """
    from robopost.compose import compose, override
    from robopost.registry import ALGOS

    resume = pluck(overrides, "resume")
    if not resume:
        return compose(overrides, config_dirs=config_dirs)
    stored, seeds = _stored(Path(resume))
    rest = [word for word in overrides if not word.startswith("resume=")]
    allowed = RESUMABLE
    if ALGOS.get(stored.algo.name).target.regime == "offline" and not stored.loop.online_steps:
        allowed += BEFORE_ONLINE
        if stored.env is None:  # trained on data alone: the environment may come now
            place = [word for word in rest if word.startswith(("env=", "env."))]
            stored = replace(stored, env=compose(place, config_dirs=config_dirs).env)
            rest = [word for word in rest if word not in place]
    try:
        config = override(stored, rest, allowed=allowed)
    except ConfigError as error:
        raise ConfigError(f"resume={resume}: {error}") from error
    return replace(config, resume=resume, out=resume, seeds=seeds)


def _stored(run: Path) -> tuple[TrainConfig, int]:
    from robopost.artefacts.checkpoint import load_json
    from robopost.compose import from_dict

    if not run.is_dir():
        raise CheckpointError(f"resume={run} is not a run folder")
    path = run / "config.json"
    seeds = 1
    if not path.exists():
        # A run over several seeds keeps one run per seed.
        folders = sorted(run.glob("seed_*/config.json"), key=lambda item: int(item.parent.name[5:]))
        if not folders:
            raise CheckpointError(f"resume={run} holds no config.json: it is not a run folder")
        # A run that was killed has no folder yet for its last seeds.
        path = folders[0]
        seeds = int(load_json(path.with_name("provenance.json")).get("seeds", len(folders)))
    config = from_dict(load_json(path))
    return config, seeds


def _run(config: TrainConfig, command: str) -> int:
    from robopost.collect import ensure_data
    from robopost.loops import default_folder, train
    from robopost.loops.ranks import join

    setup_logging()
    for name in ("algo", "policy"):
        if getattr(config, name) is None:
            raise ConfigError(
                f"{name} is not chosen. Fix: add {name}=<name>; `robopost train --help` lists them"
            )
    with join(config) as ranks:
        if not config.out:
            config = replace(config, out=ranks.agree(str(default_folder(config))))
        try:
            # A folder that holds a run is refused by `train`, before anything is written into it.
            if config.data.collect and not (Path(config.out) / "config.json").exists():
                with (
                    ranks.first_alone(),
                    progress_bar("recording demonstrations", config.data.collect) as update,
                ):
                    config = ensure_data(config, Path(config.out), update)
            folder = train(config, command)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"resume with: robopost train resume={shlex.quote(config.out)}") from None
        if ranks.first:
            _print_summary(folder)
    return 0


def _print_summary(folder: Path) -> None:
    out = console()
    out.print(f"run: {folder}", markup=False)
    out.print(f"evaluate: robopost eval policy={shlex.quote(str(folder))}", markup=False)
    out.print(f"report:   robopost report {shlex.quote(str(folder))}", markup=False)
