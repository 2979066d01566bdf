# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: who they are, what each does of a batch, and what they have to agree on.

A run of one process has `ALONE`, which changes nothing. With `accel.fsdp=true` torchrun starts one process per device;
all of them run the same loop, and only the first logs, evaluates and writes.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopost.config import TrainConfig
from robopost.errors import ConfigError, RobopostError
from robopost.registry import ALGOS

LAUNCH = "torchrun --nproc-per-node <devices> -m robopost.cli train ... accel.fsdp=true"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")  # what torchrun tells a process
PATIENCE = timedelta(minutes=10)  # with a process that doesn't show up for a step
LONG = timedelta(days=7)  # an evaluation or a recording may take
NOISY = ("algo", "policy")  # streams of which every process has its own
NOISE_STREAM = 200
SOURCE_LINE = r"^\[[^\]]*\] *"  # that torch's messages begin with
LOST = ("gloo", "nccl", "Connection closed", "Connection reset", "Broken pipe", "TCPStore", "Timed out")


class Ranks:
    """One process on its own; `Joined` is one of several.

    Attributes:
        index, size: which one of how many.
        device: where it works, None = as the config says.
    """

    index, size = 0, 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """True in the process that logs, evaluates and writes."""
        return self.index == 0

    def mine(self, rows: Tensor) -> Tensor:
        """This process's part of the batch `rows`, which all have drawn alike."""
        return rows

    def reseed(self, generators: dict[str, torch.Generator], seed: int, step: int) -> None:
        """Give each process noise of its own from step `step` on; nothing to do for one."""

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes."""
        return values

    def merged(self, lists: dict[str, list[float]]) -> dict[str, list[float]]:
        """The lists of all processes, joined."""
        return lists

    def agree(self, text: str) -> str:
        """What the first process says."""
        return text

    def wait(self) -> None:
        """Until all are here, however long the first evaluates or writes."""

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through, then all others."""
        yield

    def explained(self, error: Exception) -> Exception:
        """`error`, or what it means where another process has ended."""
        return error


ALONE = Ranks()
_current = ALONE  # of the run at hand
_joined: Joined | None = None  # of this process: it can't leave and join once more


class Joined(Ranks):
    """One of the processes that torchrun has started, each with a device of its own.

    Raises:
        ConfigError: the device is not available, or there are more processes than devices.
    """

    def __init__(self, device: str) -> None:
        import torch.distributed as dist

        from robopost.loops.run import resolve_device

        self.index, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        kind = resolve_device(device).type
        self.device = torch.device(kind)
        if kind == "cuda":
            local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= there:
                raise ConfigError(
                    f"accel.fsdp=true: process {self.index} finds {there} GPUs. "
                    f"Fix: --nproc-per-node {there}, or device=cpu"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        bound = self.device if kind == "cuda" else None
        dist.init_process_group("gloo" if bound is None else "nccl", timeout=PATIENCE, device_id=bound)
        self._dist: Any = dist
        self._patient = dist.new_group(backend="gloo", timeout=LONG)
        self._together = True  # until another one is lost
        atexit.register(self._leave)

    def mine(self, rows: Tensor) -> Tensor:
        """See `Ranks.mine`: the parts are neighbouring rows, equally many."""
        each = len(rows) // self.size
        return rows[self.index * each : (self.index + 1) * each]

    def reseed(self, generators: dict[str, torch.Generator], seed: int, step: int) -> None:
        """See `Ranks.reseed`: noise depends on the seed, the step and the process alone, so that it is no state."""
        if self.size > 1:
            for place, name in enumerate(NOISY):
                words = [seed, NOISE_STREAM + place, step, self.index]
                found = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
                generators[name].manual_seed(int(found >> 1))

    def mean(self, values: Tensor) -> Tensor:
        """See `Ranks.mean`."""
        total = values.to(self.device, copy=True)
        self._dist.all_reduce(total)
        return total / self.size

    def merged(self, lists: dict[str, list[float]]) -> dict[str, list[float]]:
        """See `Ranks.merged`."""
        found: list[dict[str, list[float]]] = [{}] * self.size
        self._dist.all_gather_object(found, lists, group=self._patient)
        keys = sorted({key for item in found for key in item})
        return {key: [value for item in found for value in item.get(key, [])] for key in keys}

    def agree(self, text: str) -> str:
        """See `Ranks.agree`."""
        said = [text]
        self._dist.broadcast_object_list(said, src=0, group=self._patient, device=torch.device("cpu"))
        return said[0]

    def wait(self) -> None:
        """See `Ranks.wait`."""
        self._dist.barrier(group=self._patient)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """See `Ranks.first_alone`."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def explained(self, error: Exception) -> Exception:
        """See `Ranks.explained`."""
        told = isinstance(error, self._dist.DistError) or any(word in str(error) for word in LOST)
        self._together = False
        if isinstance(error, RobopostError) or not (isinstance(error, RuntimeError) and told):
            return error
        said = re.sub(SOURCE_LINE, "", str(error)).splitlines()[0][:120]
        return RobopostError(
            f"process {self.index} of {self.size} has lost another one, which has failed or was killed "
            f"({said}). Fix: see its message; go on with resume=<run>"
        )

    def _leave(self) -> None:
        if self._together:
            self._dist.destroy_process_group()


@contextmanager
def join(config: TrainConfig) -> Iterator[Ranks]:
    """The processes of a run with this config; within another `join`, those.

    Raises:
        ConfigError: `accel.fsdp` doesn't go with something else, or torchrun isn't there.
    """
    global _current, _joined
    if _current is not ALONE or not config.accel.fsdp:
        count = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
        if _current is ALONE and count != "1":
            raise ConfigError(
                f"torchrun has started {count} processes, and accel.fsdp=false trains the same in each. "
                "Fix: accel.fsdp=true, or robopost train without torchrun"
            )
        yield _current
        return
    check(config)
    _joined = _joined or Joined(config.device)
    _current = joined = _joined
    try:
        yield joined
        joined.wait()
    except Exception as error:
        raise joined.explained(error) from error
    finally:
        _current = ALONE


def check(config: TrainConfig) -> None:
    """Raise ConfigError where `accel.fsdp=true` doesn't go with how the run was started, or with another setting."""
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise ConfigError(
            f"accel.fsdp=true needs one process per device, and this one is on its own. Fix: {LAUNCH}"
        )
    if config.accel.mode not in ("auto", "eager"):
        raise ConfigError(
            f"accel.mode={config.accel.mode} doesn't go with accel.fsdp=true, whose layers gather their weights in "
            "Python. Fix: accel.mode=eager"
        )
    if config.seeds > 1:
        raise ConfigError(f"seeds={config.seeds} doesn't go with accel.fsdp=true. Fix: one run per seed")
    if config.algo is not None and not ALGOS.get(config.algo.name).target.sharded_by:
        able = ", ".join(entry.name for entry in ALGOS if entry.target.sharded_by)
        raise ConfigError(
            f"algo={config.algo.name} can't train with accel.fsdp=true, which {able} can. Fix: accel.fsdp=false"
        )


def check_batch(ranks: Ranks, batch_size: int) -> None:
    """Raise ConfigError where a batch can't be split evenly over the processes."""
    if batch_size % ranks.size:
        raise ConfigError(
            f"algo.batch_size={batch_size} is that of all {ranks.size} processes together and must be a multiple of "
            f"{ranks.size}. Fix: algo.batch_size={max(1, batch_size // ranks.size) * ranks.size}"
        )
