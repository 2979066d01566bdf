# SPDX-License-Identifier: Apache-2.0
"""The offline updates of several seeds at once; each seed's folder is what a run of its own writes.

Seeds at different steps (a run that was killed between two checkpoints) are brought together first: those behind
train until they reach the next, and from there on as one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.accel import resolve
from robopost.algos.base import Algorithm
from robopost.algos.stack import Stack, obstacle, trained_parameters
from robopost.artefacts.checkpoint import latest, load_json
from robopost.config import TrainConfig
from robopost.data.dataset import Dataset
from robopost.errors import ConfigError, RobopostError, unknown
from robopost.loops.offline import batch_at, begin, learn, load, loop_state, online_sampler
from robopost.loops.run import Run
from robopost.registry import ALGOS

log = logging.getLogger(__name__)
CHOICES = ("auto", "on", "off")
# `auto`: trainable parameters of one seed and number of seeds for which stacking is faster. Measured on CPUs
# (benchmarks/stacked_seeds.py); on a GPU, the size at which one seed alone keeps it busy.
LIMITS = {"cpu": (50_000, 4), "cuda": (5_000_000, 2)}


class _NotStackedError(Exception):
    """Why the seeds are trained one after another."""


@dataclass
class _Seat:
    """One seed: its run, its algorithm and the global random stream it would have on its own."""

    run: Run
    algo: Algorithm
    random: Tensor


def train_stacked(runs: Sequence[Run]) -> bool:
    """Do what is left of the offline updates of all runs at once, where that is possible.

    Args:
        runs: one per seed, nothing done with them yet.

    Returns:
        False where the seeds are to be trained one after another: nothing was written then.

    Raises:
        ConfigError: `accel.stack_seeds=on` for what can't be stacked.
        RobopostError: as `robopost.loops.train`.
    """
    config = runs[0].config
    choice = config.accel.stack_seeds
    if choice not in CHOICES:
        raise unknown("accel.stack_seeds", choice, CHOICES)
    waiting = [run for run in runs if _saved_step(run) < config.loop.steps]
    if choice == "off" or len(waiting) < 2:
        return False
    try:
        _check_config(config, waiting[0].device)
        dataset = load(waiting[0])
        stats = dataset.stats_for(config.policy.normalise_action)
        algo = waiting[0].build(dataset.spec, stats, dataset.dataset_id)
        _check_algo(algo)
        if choice == "auto":
            _check_gain(algo, len(waiting))
    except _NotStackedError as reason:
        if choice == "on":
            raise ConfigError(
                f"accel.stack_seeds=on: {reason}. Fix: accel.stack_seeds=off trains the seeds one after another"
            ) from None
        log.info("seeds one after another: %s", reason)
        return False
    for run in waiting[1:]:
        run.quiet = True
    try:
        _train(waiting, dataset)
    except Exception:
        for run in waiting:
            run.close()
            run.discard()
        raise
    finally:
        for run in waiting:
            run.close()
    return True


def _check_config(config: TrainConfig, device: torch.device) -> None:
    if ALGOS.get(config.algo.name).target.regime != "offline":
        raise _NotStackedError(f"algo={config.algo.name} learns in an environment")
    if resolve(config.accel.mode, device) == "compile":
        raise _NotStackedError("accel.mode=compile compiles one seed's update")
    if config.track.also:
        raise _NotStackedError(f"track.also={list(config.track.also)} follows one run at a time")


def _check_algo(algo: Algorithm) -> None:
    why = obstacle(algo)
    if why:
        raise _NotStackedError(why)
    if algo.policy.wraps_env:
        raise _NotStackedError(f"policy={algo.policy.registry_name} adds observations to the data")


def _check_gain(algo: Algorithm, seeds: int) -> None:
    size, kind = trained_parameters(algo), algo.device.type
    largest, fewest = LIMITS["cpu" if kind == "cpu" else "cuda"]
    if size > largest or seeds < fewest:
        raise _NotStackedError(
            f"{seeds} of {size:,} trained parameters each are no faster at once on this device "
            f"(from {fewest} seeds, up to {largest:,} parameters); accel.stack_seeds=on stacks them"
        )


def _train(runs: Sequence[Run], dataset: Dataset) -> None:
    seats = []
    for run in runs:
        algo, _ = begin(run, dataset)
        seats.append(_Seat(run, algo, torch.get_rng_state()))
    first, loop = seats[0].algo, runs[0].config.loop
    _check_normalisers(seats)
    recorded = first.policy.label_demos(dataset)
    dataset = recorded.normalise(first.policy.normaliser)
    if loop.online_steps:
        online_sampler(runs[0], first, recorded)  # what doesn't fit shall show before the updates
    while waiting := [seat for seat in seats if seat.run.step < loop.steps]:
        now = min(seat.run.step for seat in waiting)
        group = [seat for seat in waiting if seat.run.step == now]
        until = min([seat.run.step for seat in waiting if seat.run.step > now], default=loop.steps)
        group[0].algo.attach(dataset)  # depends on the dataset alone: one is enough for all that train as one
        if len(group) == 1:
            torch.set_rng_state(group[0].random)
            learn(group[0].run, group[0].algo, dataset, until)
            group[0].random = torch.get_rng_state()
        else:
            _advance(group, dataset, until)


def _check_normalisers(seats: Sequence[_Seat]) -> None:
    """All seeds read one normalised copy of the data."""
    first, *others = (seat.algo.policy.normaliser.state_dict() for seat in seats)
    if not all(torch.equal(first[key], other[key]) for other in others for key in first):
        raise ConfigError(
            "the seeds' policies normalise differently and can't share one copy of the data. "
            "Fix: accel.stack_seeds=off"
        )


def _advance(seats: Sequence[_Seat], dataset: Dataset, until: int) -> None:
    """Train several seeds at the same step as one."""
    first = seats[0]
    needs, count = first.algo.needs, len(seats)
    names = ", ".join(seat.run.folder.name for seat in seats)
    log.info("%s: %d seeds at once from step %d", names, count, first.run.step)
    stack = Stack([seat.algo for seat in seats], first.run.config.accel.mode)
    totals = _Totals()
    for step in range(first.run.step + 1, until + 1):
        draws = [
            dataset.draw(needs.batch_size, seat.run.generators["data"], chunks=needs.chunks) for seat in seats
        ]
        rows = batch_at(dataset, first.algo, torch.cat(draws))  # one gather for all seeds
        totals.add(stack.update(rows.map(lambda tensor: tensor.unflatten(0, (count, -1)))))
        if first.run.due(step):
            stack.store()
            totals.hand_over(seats)
            _after(seats, step, dataset)
        for seat in seats:
            seat.run.step = step
    stack.store()
    totals.hand_over(seats)


def _after(seats: Sequence[_Seat], step: int, dataset: Dataset) -> None:
    """What every run does at a log, evaluation or checkpoint step, one after another."""
    for seat in seats:
        torch.set_rng_state(seat.random)
        began = time.perf_counter()
        try:
            seat.run.after(step, seat.algo, lambda: loop_state(dataset))
        except RobopostError as error:
            raise type(error)(f"{seat.run.folder.name}: {error}") from error
        seat.random = torch.get_rng_state()
        seconds = time.perf_counter() - began
        for other in seats:
            if other is not seat:
                other.run.pause(seconds)


class _Totals:
    """Sums of the seeds' metrics (N,) since they were last handed over to the runs."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.updates = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """One update of every seed."""
        for key, value in metrics.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()
            self.counts[key] = self.counts.get(key, 0) + 1
        self.updates += 1

    def hand_over(self, seats: Sequence[_Seat]) -> None:
        """Give every run its own share and begin again."""
        for index, seat in enumerate(seats):
            mine = {key: value[index] for key, value in self.sums.items()}
            seat.run.record_sums(mine, self.counts, self.updates)
        self.sums, self.counts, self.updates = {}, {}, 0


def _saved_step(run: Run) -> int:
    checkpoint = latest(run.folder) if run.folder.exists() else None
    return 0 if checkpoint is None else int(load_json(checkpoint / "state.json")["step"])
