# SPDX-License-Identifier: Apache-2.0
"""Three loops, one per data regime, and `train`, which picks the one an algorithm asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from robopost.accel import configure, startup_frozen
from robopost.config import TrainConfig
from robopost.errors import ConfigError
from robopost.loops.offline import check_online, run_offline
from robopost.loops.offpolicy import run_offpolicy
from robopost.loops.onpolicy import run_onpolicy
from robopost.loops.ranks import Ranks, join
from robopost.loops.run import Run, with_seed
from robopost.loops.stacked import train_stacked
from robopost.registry import ALGOS

LOOPS: dict[str, Callable[[Run], None]] = {
    "offline": run_offline,
    "offpolicy": run_offpolicy,
    "onpolicy": run_onpolicy,
}


@startup_frozen()
def train(config: TrainConfig, command: str = "") -> Path:
    """Train as `config` says, going on from the run folder's latest checkpoint if there is one.

    Returns:
        The run folder. With `seeds > 1` it holds one run per seed in `seed_<n>/`.

    Raises:
        ConfigError: pieces that don't fit; nothing was written then.
        RobopostError: bad data, a misbehaving environment, divergence, a full disk.
    """
    if config.algo is None or config.policy is None:
        raise ConfigError(
            "a run needs algo and policy. Fix: robopost train algo=<name> policy=<name> env=<name>"
        )
    if config.seeds < 1:
        raise ConfigError(f"seeds={config.seeds} must be at least 1")
    with join(config) as ranks:
        return _train(config, command, ranks)


def _train(config: TrainConfig, command: str, ranks: Ranks) -> Path:
    assert config.algo is not None
    configure(config.accel)
    if config.resume and not Path(config.resume).is_dir():
        raise ConfigError(f"resume={config.resume!r} is not a run folder")
    folder = Path(ranks.agree(config.resume or config.out or str(default_folder(config))))
    if not config.resume and holds_run(folder):
        raise ConfigError(
            f"out={folder} already holds a run. Fix: resume={folder} to go on with it, or another out="
        )
    if config.env is None and ALGOS.get(config.algo.name).target.regime != "offline":
        raise ConfigError(
            f"algo={config.algo.name} learns in an environment and env is empty. Fix: env=<name>"
        )
    if config.loop.online_steps:
        check_online(config)
    ranks.wait()  # before one of them makes the folder a run
    # algo.needs may depend on the built algorithm; the regime doesn't, and picks the loop before anything is built.
    loop = LOOPS[ALGOS.get(config.algo.name).target.regime]
    seeds = range(config.seed, config.seed + config.seeds)

    def new_run(seed: int) -> Run:
        place = folder / f"seed_{seed}" if config.seeds > 1 else folder
        return Run(
            replace(with_seed(config, seed), out=str(place)), place, command, config.seeds, ranks=ranks
        )

    if train_stacked([new_run(seed) for seed in seeds]) and not config.loop.online_steps:
        return folder
    for run in map(new_run, seeds):
        try:
            loop(run)
        except Exception:
            run.close()
            run.discard()
            raise
        finally:
            run.close()
    return folder


def holds_run(folder: Path) -> bool:
    """True where `folder` is a run folder, or one of a run over several seeds."""
    return (folder / "config.json").exists() or any(folder.glob("seed_*/config.json"))


def default_folder(config: TrainConfig) -> Path:
    """`runs/<algo>-<env or data>-<time>`."""
    where = config.env.name if config.env is not None else Path(config.data.path).stem
    return Path("runs") / f"{config.algo.name}-{where}-{time.strftime('%Y%m%d-%H%M%S')}"
