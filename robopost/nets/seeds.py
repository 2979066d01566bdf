# SPDX-License-Identifier: Apache-2.0
"""Several seeds of one network at once: what code that was written for one seed needs to run under `vectorise`.

Under `vectorise` over a leading seed dimension N, every operation of an algorithm becomes one batched operation.
Three things must see all seeds at once, and leave it through `escape`:

- gradients: seeds are independent, so the gradient of the sum of their losses holds each seed's own;
- optimisers and Polyak steps: elementwise, so one over the memory of all seeds is exact;
- noise: every seed draws from its own generator what it would draw alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robopost.nets.flat import Flat, FlatAdam, flattened
from robopost.nets.vectorise import escape


class StackedFlat:
    """`Flat` for N seeds: the same calls, made once for all of them.

    The memory holds one parameter of all seeds after the other, each a contiguous (N, ...), so that batched
    products need no copies.

    Attributes:
        leaves: one (N, ...) parameter per parameter of the `Flat`s, views of `data`.
        data: (N * P,) the memory of all seeds.
        param: parameter over `data`, with a preallocated `grad`, for one optimiser.
    """

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.seeds = len(flats)
        self._shapes = [p.shape for p in flats[0].params]
        self.data = self.join([flat.data for flat in flats])
        self.param = nn.Parameter(self.data)
        self.param.grad = torch.zeros_like(self.data)
        self.leaves: list[nn.Parameter] = []
        for p, part in zip(flats[0].params, self._blocks(self.data), strict=True):
            # As in `Flat`: a storage of its own version, an optimiser step must not disturb a later backward.
            leaf = nn.Parameter(part.new_empty(0), requires_grad=p.requires_grad)
            leaf.data = part
            self.leaves.append(leaf)
        self._anchor: Tensor | None = None  # lets `clip` back in

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.data.device

    def optimizer(self, **options: Any) -> torch.optim.Adam:
        """Adam over `param`."""
        return FlatAdam([self.param], **options)

    @property
    def grad(self) -> Tensor:
        """(N * P,) the gradient the optimiser reads."""
        assert self.param.grad is not None
        return self.param.grad

    def join(self, vectors: Sequence[Tensor]) -> Tensor:
        """Vectors (P,) of single seeds, laid out as their `Flat` is, to one (N * P,) in this layout."""
        sizes = [shape.numel() for shape in self._shapes]
        parts = zip(*(vector.split(sizes) for vector in vectors), strict=True)
        return torch.cat([torch.stack(part).reshape(-1) for part in parts])

    def part(self, vector: Tensor, seed: int) -> Tensor:
        """The vector (P,) of one seed out of (N * P,): `join` reversed."""
        return torch.cat([block[seed].reshape(-1) for block in self._blocks(vector)])

    def backward(self, loss: Tensor) -> None:
        """Write every seed's own gradient into `grad`; `loss` is a scalar in here, (N,) in truth."""
        self.pull_back([loss], None)

    def pull_back(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        """As `backward` for losses of `outputs` whose gradient in each of them is known."""
        self._anchor = escape(self._backward, *outputs, *(gradients or []))

    def clip(self, max_norm: float) -> Tensor:
        """Scale every seed's gradient to a norm of at most `max_norm`; returns the norm before.

        Call it in the same step as `backward`, before the optimiser.
        """
        anchor, self._anchor = self._anchor, None
        assert anchor is not None, "clip follows backward"
        return escape(lambda _: self._clip(max_norm), anchor)

    def share(self, means: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """As `Flat.share`: every seed has its batch to itself."""
        return means

    def lerp(self, source: StackedFlat, weight: float) -> None:
        """Polyak step in place: `data <- (1 - weight) data + weight source`."""
        with torch.no_grad():
            self.data.lerp_(source.data, weight)

    def _blocks(self, vector: Tensor) -> list[Tensor]:
        sizes = [self.seeds * shape.numel() for shape in self._shapes]
        pieces = zip(vector.split(sizes), self._shapes, strict=True)
        return [piece.view(self.seeds, *shape) for piece, shape in pieces]

    def _backward(self, *tensors: Tensor) -> Tensor:
        """Of the losses alone, or of outputs followed by their gradients."""
        half = len(tensors) // 2
        outputs, given = ([tensors[0].sum()], None) if half == 0 else (tensors[:half], tensors[half:])
        grads = torch.autograd.grad(outputs, self.leaves, given, allow_unused=True)
        torch.cat(flattened(self.leaves, grads), out=self.grad)
        return tensors[0].detach()

    def _clip(self, max_norm: float) -> Tensor:
        blocks = self._blocks(self.grad)
        norm = torch.stack([block.flatten(1).norm(dim=1) for block in blocks]).norm(dim=0)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for block in blocks:
            block.mul_(scale.view(-1, *[1] * (block.dim() - 1)))
        return norm


class SeedNoise(TorchFunctionMode):
    """Within this mode, inside `vectorise`, a draw from the first of `generators` is one from each, stacked.

    Covers the functions that return what they draw (`torch.randn`, `rand`, `randint`, `randperm`, `bernoulli`,
    `normal`, `multinomial`) with `generator=` as a keyword. A draw from any other source, torch's global stream
    included, is refused by vmap: seeds must not share noise.

    Attributes:
        anchor: a tensor of the running `vectorise`, through which draws get in.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = tuple(generators)
        self.anchor: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not kwargs:
            return func(*args)
        if kwargs.get("generator") is not self.generators[0]:
            return func(*args, **kwargs)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]

        def draw(_: Tensor, *whole: Tensor) -> Tensor:
            rows = []
            for seed, generator in enumerate(self.generators):
                own = iter(tensor[seed] for tensor in whole)
                mine = [next(own) if isinstance(arg, Tensor) else arg for arg in args]
                rows.append(func(*mine, **{**kwargs, "generator": generator}))
            return torch.stack(rows)

        assert self.anchor is not None, "SeedNoise works inside vectorise"
        return escape(draw, self.anchor, *tensors)
