# SPDX-License-Identifier: Apache-2.0
"""`torch.vmap` for whole updates, and a way out of it for what has to see all slices at once.

`torch.vmap` and custom functions with a vmap rule are the documented way to do both, at several times the cost of
the eager operations they wrap: each call flattens nested arguments and inspects signatures. On a CPU that would
eat what small networks gain, so the same steps are taken directly with the functions torch itself builds vmap
from. They are not documented, so they are checked against the documented ones before first use and left alone
where they are missing or disagree.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

core: Any = None
nesting: Any = None
popped: Any = None
with contextlib.suppress(ImportError, AttributeError):  # another version of torch
    core = importlib.import_module("torch._C")._functorch
    nesting = importlib.import_module("torch._functorch.vmap").vmap_increment_nesting
    popped = importlib.import_module("torch._functorch.pyfunctorch").temporarily_pop_interpreter_stack

Whole = Callable[..., Tensor | tuple[Tensor, ...]]
_override: bool | None = None
_running = 0  # calls of `vectorise` around the present one


def force(direct: bool | None) -> None:
    """Choose the direct calls or the documented ones; None = decide by `available`. For tests."""
    global _override
    _override = direct


def vectorise(fn: Callable[..., dict[str, Tensor]], *groups: Sequence[Tensor]) -> dict[str, Tensor]:
    """`fn` applied to every slice of the leading dimension at once.

    Args:
        fn: called once with as many sequences of tensors as there are `groups`; without random numbers of its own.
        groups: tensors that all lead with the same dimension N.

    Returns:
        What `fn` returns, each tensor with a leading N.
    """
    global _running
    _running += 1
    try:
        return _direct_vectorise(fn, groups) if _direct() else _plain_vectorise(fn, groups)
    finally:
        _running -= 1


def escape(fn: Whole, *tensors: Tensor) -> Any:
    """Inside `vectorise`: call `fn` outside of it with the whole `tensors` (N, ...).

    Args:
        fn: returns one tensor or a tuple of them, each (N, ...): their slices are the result in here. Gradients
            flow through it.
        tensors: at least one that differs between slices.
    """
    return _direct_escape(fn, tensors) if _direct() else _Escape.apply(fn, *tensors)


def by_rows(fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`fn` of rows, called once on the rows of all slices; outside of `vectorise` just `fn(*tensors)`.

    For what torch.vmap can't see through, e.g. a search in an index.

    Args:
        fn: (B, ...) tensors to one (B, ...), row by row.
        tensors: (B, ...) each, at least one of which differs between slices.
    """
    if not _running:
        return fn(*tensors)

    def whole(*parts: Tensor) -> Tensor:
        return fn(*(part.flatten(0, 1) for part in parts)).unflatten(0, parts[0].shape[:2])

    return escape(whole, *tensors)


def _direct() -> bool:
    return available() if _override is None else _override


@functools.cache
def available() -> bool:
    """True when the direct calls exist in this torch and do what the documented ones do."""
    if core is None or nesting is None or popped is None:
        return False
    w, x = torch.arange(6.0).view(2, 3).sin().requires_grad_(), torch.arange(8.0).view(2, 4).cos()

    def probe(a: Sequence[Tensor], b: Sequence[Tensor]) -> dict[str, Tensor]:
        outer = a[0][:, None] * b[0]
        scaled = escape(lambda whole: whole / whole.detach().square().sum(), outer)
        return {"sum": scaled.sum(), "one": torch.ones(()), "head": scaled.amax(0)}

    results = []
    global _override
    before = _override
    try:
        for _override in (False, True):  # the documented way first: it loads torch's decompositions
            out = vectorise(probe, [w], [x])
            results.append([*out.values(), *torch.autograd.grad(out["sum"].prod(), w)])
        return all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    except (AttributeError, RuntimeError, TypeError):
        return False
    finally:
        _override = before


# -- documented -------------------------------------------------------------------------------------------------------


def _plain_vectorise(
    fn: Callable[..., dict[str, Tensor]], groups: Sequence[Sequence[Tensor]]
) -> dict[str, Tensor]:
    keys: list[str] = []

    def one(*slices: list[Tensor]) -> tuple[Tensor, ...]:
        out = fn(*slices)
        keys[:] = out
        return tuple(out.values())

    values = torch.vmap(one, randomness="error")(*(list(group) for group in groups))
    return dict(zip(keys, values, strict=True))


class _Escape(torch.autograd.Function):
    """Calls a function with the whole tensors behind its arguments."""

    @staticmethod
    def forward(fn: Whole, *tensors: Tensor) -> Any:
        raise RuntimeError("escape: no argument differs between slices")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Required beside `vmap`; never reached."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], fn: Whole, *tensors: Tensor) -> Any:
        """The rule that torch.vmap calls in place of `forward`: in here, tensors are plain again."""
        pairs = zip(tensors, in_dims[1:], strict=True)
        out = fn(*(_lead(tensor, dim, info.batch_size) for tensor, dim in pairs))
        return out, (0,) * len(out) if isinstance(out, tuple) else 0


def _lead(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The batch dimension in front; made where there is none."""
    if dim is None:
        return tensor.unsqueeze(0).expand(size, *tensor.shape)
    return tensor if dim == 0 else tensor.movedim(dim, 0)


# -- direct -----------------------------------------------------------------------------------------------------------


def _direct_vectorise(
    fn: Callable[..., dict[str, Tensor]], groups: Sequence[Sequence[Tensor]]
) -> dict[str, Tensor]:
    size = groups[0][0].shape[0]
    if any(tensor.shape[0] != size for group in groups for tensor in group):
        raise ValueError(f"every tensor must lead with {size} slices")
    with nesting(size, "error") as level:
        slices = [[core._add_batch_dim(tensor, 0, level) for tensor in group] for group in groups]
        out = fn(*slices)
        return {key: core._remove_batch_dim(value, level, size, 0) for key, value in out.items()}


def _direct_escape(fn: Whole, tensors: Sequence[Tensor]) -> Any:
    level = core.maybe_current_level()
    dims = [
        core.maybe_get_bdim(tensor)
        if core.is_batchedtensor(tensor) and core.maybe_get_level(tensor) == level
        else None
        for tensor in tensors
    ]
    whole = [
        tensor if dim is None else core.get_unwrapped(tensor)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    size = next(tensor.shape[dim] for tensor, dim in zip(whole, dims, strict=True) if dim is not None)
    with popped():
        out = fn(*(_lead(tensor, dim, size) for tensor, dim in zip(whole, dims, strict=True)))
    if isinstance(out, tuple):
        return tuple(core._add_batch_dim(item, 0, level) for item in out)
    return core._add_batch_dim(out, 0, level)
