# SPDX-License-Identifier: Apache-2.0
"""torch.compile, CUDA graphs and CPU settings: the only place that knows about them.

Algorithms keep the expensive part of `update` in *steps*: methods that are pure functions of their tensor
arguments and of tensors that stay where they are (parameters, flat gradients, optimiser state). `accelerate`
wraps a step; the rest of the update (counters, the choice of step, sampling of Python-side numbers) stays
plain Python.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robopost.config import AccelConfig
from robopost.errors import ConfigError, DataError, unknown

MODES = ("auto", "eager", "compile", "cudagraph")
WARMUP_CALLS = 3


def configure(config: AccelConfig) -> None:
    """Process-wide settings: CPU threads, denormal numbers flushed to zero, and freed memory kept.

    Adam's moments of a dead ReLU decay into denormals, on which CPUs are about a hundred times slower.
    """
    if config.mode not in MODES:
        raise unknown("accel.mode", config.mode, MODES)
    if config.threads < 0:
        raise ConfigError(f"accel.threads={config.threads} must be 0 (torch's choice) or more")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    keep_memory()


def keep_memory() -> bool:
    """Let the C library keep up to 256 MB of freed memory; True where it could be told (glibc).

    Every update allocates its activations anew. Above a megabyte or so glibc would hand them back to the system
    each time and pay for fresh, zeroed pages at the next: a quarter of an update of eight stacked seeds. The usual
    environment variables keep their say.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim, largest = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(trim, 256 << 20) and mallopt(largest, 32 << 20))


@contextmanager
def startup_frozen() -> Iterator[None]:
    """Within this context Python's cycle collector leaves alone what exists at its start.

    Libraries keep some 350,000 objects alive. Every few thousand environment steps the collector would look at all of
    them, 0.2 s that find nothing: a tenth of the time of PPO with one environment.
    """
    if gc.get_freeze_count():  # the caller's own business then
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def resolve(mode: str, device: torch.device) -> str:
    """The mode that `auto` means on `device`.

    Raises:
        ConfigError: an unknown mode, or `cudagraph` on a device without CUDA graphs.
    """
    if mode not in MODES:
        raise unknown("accel.mode", mode, MODES)
    if mode == "auto":
        return "cudagraph" if device.type == "cuda" else "eager"
    if mode == "cudagraph" and device.type != "cuda":
        raise ConfigError(
            f"accel.mode=cudagraph needs device=cuda, this run is on {device.type}. Fix: accel.mode=auto"
        )
    return mode


def accelerate(
    fn: Callable[..., Any], mode: str, *, device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Callable[..., Any]:
    """Wrap a step function.

    Args:
        fn: takes tensors, dicts of tensors, `Batch`es or None, and returns a dict of
            tensors of one shape: scalars, or (N,) for N stacked seeds.
        mode: one of `MODES`.
        device: where `fn` runs.
        generators: random generators that `fn` draws from; a captured graph advances them as eager code
        would.
    """
    mode = resolve(mode, device)
    if mode == "compile":
        return torch.compile(fn, dynamic=False)
    if mode == "cudagraph":
        return CudaGraph(fn, generators)
    return fn


class CudaGraph:
    """Runs `fn` eagerly `WARMUP_CALLS` times, captures it at the next call and replays the graph from then
    on.

    Every call is one real update: the warm-up works on the batches it is given. Outputs are copied out of the
    graph's memory, so that a result stays valid after the next call.

    Raises:
        DataError: an argument changes its structure, shape, dtype or device after the capture.
    """

    def __init__(
        self, fn: Callable[..., dict[str, Tensor]], generators: Sequence[torch.Generator] = ()
    ) -> None:
        self._fn = fn
        self._generators = tuple(generators)
        self._name = getattr(fn, "__name__", "step")
        self.reset()

    def reset(self) -> None:
        """Forget the captured graph: needed when state has moved (optimiser state after a load)."""
        self._graph: Any = None
        self._calls = 0
        self._static: tuple[Any, ...] = ()
        self._leaves: dict[str, Tensor] = {}
        self._keys: list[str] = []
        self._packed: Tensor | None = None

    @property
    def captured(self) -> bool:
        """True once calls replay the graph."""
        return self._graph is not None

    def __call__(self, *args: Any) -> dict[str, Tensor]:
        """One update."""
        if self._graph is None:
            if self._calls < WARMUP_CALLS:
                self._calls += 1
                return self._warm(args)
            self._capture(args)
        self._copy_in(args)
        assert self._graph is not None
        assert self._packed is not None
        self._graph.replay()
        return dict(zip(self._keys, self._packed.clone().unbind(), strict=True))

    def _warm(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        # On a side stream, as capture requires, so that lazily created state does not belong to the default
        # stream.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = self._fn(*args)
        torch.cuda.current_stream().wait_stream(stream)
        return out

    def _capture(self, args: tuple[Any, ...]) -> None:
        self._static = tuple(map_tensors(arg, lambda _, tensor: tensor.clone()) for arg in args)
        self._leaves = leaves(self._static)
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            out = self._fn(*self._static)
            self._keys = list(out)
            self._packed = torch.stack([out[key].detach().float().squeeze() for key in self._keys])
        self._graph = graph

    def _copy_in(self, args: tuple[Any, ...]) -> None:
        new = leaves(args)
        if new.keys() != self._leaves.keys():
            changed = sorted(new.keys() ^ self._leaves.keys())[0]
            state = "is new" if changed in new else "is missing"
            raise DataError(f"{self._name}: input {changed!r} {state} since the CUDA graph was captured")
        for key, target in self._leaves.items():
            source = new[key]
            for what in ("shape", "dtype", "device"):
                was, now = getattr(target, what), getattr(source, what)
                if was != now:
                    raise DataError(
                        f"{self._name}: input {key!r} has {what} {_plain(now)}, the CUDA graph was captured "
                        f"with {_plain(was)}. Fix: keep batches of one {what}, or accel.mode=eager"
                    )
            target.copy_(source, non_blocking=True)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def map_tensors(value: Any, fn: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """Rebuild `value` (tensor, dict, sequence, dataclass, None) with `fn(name, tensor)` for each tensor."""
    if isinstance(value, Tensor):
        return fn(name, value)
    prefix = f"{name}." if name else ""
    if isinstance(value, dict):
        return {key: map_tensors(item, fn, f"{prefix}{key}") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, fn, f"{prefix}{index}") for index, item in enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        items = {item.name: getattr(value, item.name) for item in fields(value)}
        return replace(
            value,
            **{
                k: map_tensors(v, fn, f"{prefix}{k}")
                for k, v in items.items()
                if isinstance(v, (Tensor, dict))
            },
        )
    return value


def leaves(value: Any) -> dict[str, Tensor]:
    """All tensors of `value` by dotted name, e.g. `0.obs.state`."""
    found: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> Tensor:
        found[name] = tensor
        return tensor

    map_tensors(value, add)
    return found
