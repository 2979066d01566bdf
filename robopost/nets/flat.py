# SPDX-License-Identifier: Apache-2.0
"""All trainable parameters of a network as one tensor: one kernel for Adam, one for a Polyak step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError


class Flat:
    """Makes the trainable parameters of `modules` views of one tensor, `data`.

    Parameters keep their identity, names and shapes; only their storage moves, so state dicts and in-place
    loads work as before. Moving a module to another device or dtype afterwards would break the views: build
    networks on their device first. Optimisers own `param`, a single parameter over the same memory.

    Attributes:
        params: the trainable parameters, in module order.
        data: (P,) the memory all of them share.
        param: (P,) parameter over `data`, with a preallocated `grad`.

    Raises:
        ConfigError: nothing to train, or parameters of several devices or dtypes.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.params: list[nn.Parameter] = []
        for module in modules:
            self.params += [p for p in module.parameters() if p.requires_grad]
        if not self.params:
            raise ConfigError(f"{type(modules[0]).__name__} has no trainable parameters: nothing to optimise")
        kinds = {(p.device, p.dtype) for p in self.params}
        if len(kinds) > 1:
            raise ConfigError(
                f"trainable parameters must share one device and dtype, got {sorted(map(str, kinds))}"
            )
        self.data = torch.cat([p.detach().reshape(-1) for p in self.params])
        offset = 0
        for p in self.params:
            p.data = self.data[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
        self.param = nn.Parameter(self.data)
        self.param.grad = torch.zeros_like(self.data)

    @property
    def grad(self) -> Tensor:
        """(P,) the gradient the optimiser reads."""
        assert self.param.grad is not None
        return self.param.grad

    def backward(self, loss: Tensor) -> None:
        """Write d loss / d params into `grad`; gradients of anything else are not computed."""
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        pieces = [
            torch.zeros_like(p).view(-1) if g is None else g.reshape(-1)
            for p, g in zip(self.params, grads, strict=True)
        ]
        torch.cat(pieces, out=self.grad)

    def clip(self, max_norm: float) -> Tensor:
        """Scale `grad` to a norm of at most `max_norm`; returns the norm before, a scalar tensor."""
        norm = self.grad.norm()
        # 1e-6 as in torch.nn.utils.clip_grad_norm_.
        self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def lerp(self, source: Flat, weight: float) -> None:
        """Polyak step in place: `data <- (1 - weight) data + weight source`."""
        with torch.no_grad():
            self.data.lerp_(source.data, weight)


def adam(flat: Flat, lr: float, *, scheduled: bool = False, **options: Any) -> torch.optim.Adam:
    """Fused Adam over `flat`. With `scheduled`, `set_lr` also works under a captured graph."""
    cuda = flat.data.is_cuda
    rate = torch.tensor(lr, device=flat.data.device) if cuda and scheduled else lr
    return torch.optim.Adam([flat.param], lr=rate, fused=True, capturable=cuda, **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def step_where(optimizer: torch.optim.Optimizer, flat: Flat, keep: Tensor) -> None:
    """An optimiser step that changes nothing, moments included, where the bool scalar `keep` is False."""
    slots = [flat.data, *(slot for slot in optimizer.state[flat.param].values() if isinstance(slot, Tensor))]
    before = [slot.clone() for slot in slots]
    optimizer.step()
    with torch.no_grad():
        for slot, old in zip(slots, before, strict=True):
            slot.copy_(torch.where(keep.to(slot.device), slot, old))


def frozen_copy(module: nn.Module) -> tuple[Any, Flat]:
    """Target network: a deep copy without gradients, and its flat memory in the original's order."""
    target = copy.deepcopy(module)
    flat = Flat(target)
    return target.requires_grad_(False), flat
