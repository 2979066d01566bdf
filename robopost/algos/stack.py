# SPDX-License-Identifier: Apache-2.0
"""`Stack`: N seeds of an algorithm updated as one, by running its ordinary update under `vectorise`.

No algorithm knows about seeds. `Stack` finds an algorithm's state by type, as checkpoints do, lays the N copies
of every tensor out as one (N, ...), and puts each seed's slice where the algorithm expects its own: parameters
and buffers into its modules, `StackedFlat` in place of `Flat`, one optimiser over the memory of all seeds. What
must see all seeds at once, and how noise stays each seed's own, is in `robopost/nets/seeds.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from robopost.accel import CudaGraph, accelerate, leaves, map_tensors, resolve
from robopost.algos.base import Algorithm, Metrics
from robopost.data.batch import Batch
from robopost.errors import ConfigError
from robopost.nets import fused
from robopost.nets.flat import Flat, FlatAdam
from robopost.nets.seeds import SeedNoise, StackedFlat
from robopost.nets.transformer import ChunkTransformer
from robopost.nets.vectorise import escape, vectorise

# Elementwise: one step over the memory of all seeds is every seed's own.
OPTIMIZERS = (FlatAdam, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
# Whose random numbers or running statistics torch.vmap doesn't carry over to several seeds, or whose kernels it
# would call seed by seed.
UNSTACKABLE = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.conv._ConvNd,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    ChunkTransformer,
)


def obstacle(algo: Algorithm) -> str:
    """Why seeds of `algo` can't be trained as one, in a few words; empty where they can."""
    if not algo.stackable:
        return f"algo={algo.registry_name} can't run under torch.vmap"
    owned = {id(value.param) for value in vars(algo).values() if isinstance(value, Flat)}
    for name, value in vars(algo).items():
        if isinstance(value, nn.Module):
            for module in value.modules():
                if isinstance(module, UNSTACKABLE):
                    return f"{name} has a layer {type(module).__name__}"
        elif isinstance(value, torch.optim.Optimizer):
            if type(value) not in OPTIMIZERS:
                return f"{name} is {type(value).__name__}, which isn't known to work element by element"
            if any(id(p) not in owned for group in value.param_groups for p in group["params"]):
                return f"{name} owns parameters outside `Flat`"
        elif isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            if any(isinstance(item, (nn.Module, torch.optim.Optimizer, Flat, Tensor)) for item in items):
                return f"{name} holds state in a {type(value).__name__}"
    return ""


def trained_parameters(algo: Algorithm) -> int:
    """Parameters that the algorithm's optimisers move."""
    optimizers = [value for value in vars(algo).values() if isinstance(value, torch.optim.Optimizer)]
    return sum(p.numel() for item in optimizers for group in item.param_groups for p in group["params"])


class Stack:
    """N algorithms of one config, trained together.

    They keep their own memory: `store` writes the common state back into them, to evaluate or save them.

    Args:
        algos: fresh, or restored at the same update; not accelerated.
        mode: `auto`, `eager` or `cudagraph`, see `robopost.accel`.

    Raises:
        ConfigError: an `obstacle`, a mode that isn't offered, or algorithms at different updates.
    """

    def __init__(self, algos: Sequence[Algorithm], mode: str = "eager") -> None:
        first = algos[0]
        why = obstacle(first)
        if why:
            raise ConfigError(f"seeds can't be stacked: {why}. Fix: accel.stack_seeds=off")
        if len({algo.updates for algo in algos}) > 1:
            raise ConfigError("seeds can't be stacked: they have done different numbers of updates")
        self.algos = list(algos)
        self._noise = SeedNoise([algo.generator for algo in algos])
        self._flats: dict[str, StackedFlat] = {}
        self._leaves: list[Tensor] = []
        self._owners: list[list[Tensor]] = []  # per leaf the tensor of each seed
        self._slots: list[tuple[dict[str, Any], str, int]] = []  # where a leaf is put while the update runs
        self._template = copy.copy(first)
        self._within = False
        self._stack_flats()
        self._stack_tensors()
        self._optimizers = {
            name: self._stack_optimizer(name)
            for name, value in vars(first).items()
            if isinstance(value, torch.optim.Optimizer)
        }
        vars(self._template).update(self._flats | self._optimizers)
        for name, value in vars(first).items():
            if isinstance(value, MethodType) and value.__self__ is first:
                setattr(self._template, name, MethodType(value.__func__, self._template))
        self._graphs: list[CudaGraph] = []
        self._accelerate(mode)

    def __len__(self) -> int:
        return len(self.algos)

    @property
    def graphs(self) -> list[CudaGraph]:
        """The captured steps, one graph each for all seeds; empty in eager mode."""
        return self._graphs

    def update(self, batch: Batch) -> Metrics:
        """One update of every seed.

        Args:
            batch: (N, B, ...), what each seed's own sampler drew.

        Returns:
            Metrics (N,).
        """
        return self._run(self._template.update, (batch,))

    def store(self) -> None:
        """Write the state of every seed into its algorithm."""
        with torch.no_grad():
            for leaf, owners in zip(self._leaves, self._owners, strict=True):
                for seed, owner in enumerate(owners):
                    owner.copy_(leaf[seed])
        for seed, algo in enumerate(self.algos):
            for name, value in vars(self._template).items():
                if isinstance(value, (bool, int, float, str)):
                    setattr(algo, name, value)  # counters
            for name, optimizer in self._optimizers.items():
                self._store_optimizer(optimizer, getattr(algo, name), seed)

    # -- laying out -----------------------------------------------------------------------------------------------

    def _stack_flats(self) -> None:
        for name, value in vars(self.algos[0]).items():
            if isinstance(value, Flat):
                self._flats[name] = StackedFlat([getattr(algo, name) for algo in self.algos])

    def _stack_tensors(self) -> None:
        first, index = self.algos[0], {}
        stacked = {
            id(p): leaf
            for name, flat in self._flats.items()
            for p, leaf in zip(getattr(first, name).params, flat.leaves, strict=True)
        }

        def place(holders: list[dict[str, Any]], name: str) -> None:
            owners = [holder[name] for holder in holders]
            key = id(owners[0])
            if key not in index:  # shared tensors, e.g. a normaliser's, are one leaf
                index[key] = len(self._leaves)
                leaf = stacked.get(key)
                self._leaves.append(torch.stack([o.detach() for o in owners]) if leaf is None else leaf)
                self._owners.append(owners)
            target = vars(self._template) if holders[0] is vars(first) else holders[0]
            self._slots.append((target, name, index[key]))

        for name, value in vars(first).items():
            if isinstance(value, nn.Module):
                for modules in zip(*(getattr(algo, name).modules() for algo in self.algos), strict=True):
                    for kind in ("_parameters", "_buffers"):
                        holders = [getattr(module, kind) for module in modules]
                        for key, tensor in holders[0].items():
                            if tensor is not None:
                                place(holders, key)
            elif isinstance(value, Tensor):
                place([vars(algo) for algo in self.algos], name)

    def _stack_optimizer(self, name: str) -> torch.optim.Optimizer:
        ours = [getattr(algo, name) for algo in self.algos]
        first = self.algos[0]
        homes = {id(getattr(first, key).param): flat for key, flat in self._flats.items()}
        groups, states = [], []
        for position, group in enumerate(ours[0].param_groups):
            flats = [homes[id(p)] for p in group["params"]]
            groups.append(_copied(group) | {"params": [flat.param for flat in flats]})
            for slot, flat in enumerate(flats):
                mine = [optimizer.param_groups[position]["params"][slot] for optimizer in ours]
                states.append((flat, [o.state.get(p, {}) for o, p in zip(ours, mine, strict=True)]))
        optimizer = type(ours[0])(groups, **_copied(ours[0].defaults))
        for flat, each in states:
            if each[0]:
                optimizer.state[flat.param] = {
                    key: flat.join([state[key] for state in each]) if _is_vector(value) else _clone(value)
                    for key, value in each[0].items()
                }
        return optimizer

    def _store_optimizer(
        self, source: torch.optim.Optimizer, target: torch.optim.Optimizer, seed: int
    ) -> None:
        flats = {id(flat.param): flat for flat in self._flats.values()}
        for ours, theirs in zip(source.param_groups, target.param_groups, strict=True):
            theirs |= {key: _clone(value) for key, value in ours.items() if key != "params"}
            for p, q in zip(ours["params"], theirs["params"], strict=True):
                flat = flats[id(p)]
                target.state[q] = {
                    key: flat.part(value, seed) if _is_vector(value) else _clone(value)
                    for key, value in source.state.get(p, {}).items()
                }

    # -- running --------------------------------------------------------------------------------------------------

    def _accelerate(self, mode: str) -> None:
        """Capture the steps of the update, all seeds in one graph; the rest of it stays plain Python."""
        template = self._template
        for name in template.steps:
            vars(template).pop(name, None)  # bound to the first seed's algorithm
        mode = resolve(mode, template.device)
        if mode == "compile":
            raise ConfigError("seeds can't be stacked: accel.mode=compile. Fix: accel.stack_seeds=off")
        if mode == "eager":
            return
        for name in template.steps:
            step = getattr(template, name)
            whole = lambda *args, step=step: self._run(step, args)  # noqa: E731
            fast = accelerate(whole, mode, device=template.device, generators=self._noise.generators)
            self._graphs += [fast] if isinstance(fast, CudaGraph) else []
            setattr(template, name, _outside(fast))

    def _run(self, fn: Callable[..., Metrics], args: tuple[Any, ...]) -> Metrics:
        """`fn` once for all seeds; every tensor in `args` is (N, ...)."""
        given = leaves(args)

        def one(states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Metrics:
            mine = dict(zip(given, inputs, strict=True))
            with self._placed(states):
                return fn(*map_tensors(args, lambda name, _: mine[name]))

        return vectorise(one, self._leaves, list(given.values()))

    @contextmanager
    def _placed(self, states: Sequence[Tensor]) -> Iterator[None]:
        """Put the slices of `vectorise` where the algorithm looks for its tensors."""
        before = [holder[name] for holder, name, _ in self._slots]
        anchor, within = self._noise.anchor, self._within
        for holder, name, index in self._slots:
            holder[name] = states[index]
        self._noise.anchor, self._within = states[0], True
        try:
            if within:  # a captured step within an update: the mode is on already
                yield
            else:
                with self._noise, fused.stacked():
                    yield
        finally:
            for (holder, name, _), value in zip(self._slots, before, strict=True):
                holder[name] = value
            self._noise.anchor, self._within = anchor, within


def _outside(step: Callable[..., Metrics]) -> Callable[..., Metrics]:
    """A step of whole (N, ...) tensors, called from inside `vectorise`."""

    def call(*args: Any) -> Metrics:
        given, keys = leaves(args), []
        names = list(given)

        def whole(*tensors: Tensor) -> tuple[Tensor, ...]:
            ours = dict(zip(names, tensors, strict=True))
            metrics = step(*map_tensors(args, lambda name, _: ours[name]))
            keys[:] = metrics
            return tuple(metrics.values())

        values = escape(whole, *given.values())
        return dict(zip(keys, values, strict=True))

    return call


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _clone(value) for key, value in values.items() if key != "params"}
