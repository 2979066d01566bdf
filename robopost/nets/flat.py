# SPDX-License-Identifier: Apache-2.0
"""All trainable parameters of a network as one tensor: one kernel for Adam, one for a Polyak step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError

if TYPE_CHECKING:
    from robopost.nets.sharded import Sharded


class Flat:
    """Makes the trainable parameters of `modules` views of one tensor, `data`.

    Parameters keep their identity, names and shapes; only their storage moves, so state dicts and in-place
    loads work as before. Moving a module to another device or dtype afterwards would break the views: build
    networks on their device first. Optimisers own `param`, a single parameter over the same memory.

    Attributes:
        processes: over which it is spread: 1, see `Sharded`.
        params: the trainable parameters, in module order.
        data: (P,) the memory all of them share.
        param: (P,) parameter over `data`, with a preallocated `grad`.

    Raises:
        ConfigError: nothing to train, or parameters of several devices or dtypes.
    """

    processes = 1

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
        self.pull_back([loss], None)

    def pull_back(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        """As `backward` for a loss of `outputs` whose gradient in each of them is known.

        A closed form takes a handful of operations where the graph of a loss has dozens, each with its own overhead.
        """
        grads = torch.autograd.grad(outputs, self.params, gradients, allow_unused=True)
        torch.cat(flattened(self.params, grads), out=self.grad)

    def add_backward(self, loss: Tensor) -> None:
        """As `backward`, added to what `grad` holds: for a loss in parts."""
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        self.grad.add_(torch.cat(flattened(self.params, grads)))

    def clip(self, max_norm: float) -> Tensor:
        """Scale `grad` to a norm of at most `max_norm`; returns the norm before, a scalar tensor."""
        norm = self.grad.norm()
        # 1e-6 as in torch.nn.utils.clip_grad_norm_.
        self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def share(self, means: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """`means` that weigh samples by `weight`; see `Sharded.share`, where a batch has several owners."""
        return means

    def most(self, count: int) -> int:
        """`count`; see `Sharded.most`."""
        return count

    def optimizer(self, **options: Any) -> torch.optim.Adam:
        """Adam over `param`."""
        return FlatAdam([self.param], **options)

    @property
    def device(self) -> torch.device:
        """Of all parameters."""
        return self.data.device

    def lerp(self, source: Flat, weight: float) -> None:
        """Polyak step in place: `data <- (1 - weight) data + weight source`."""
        with torch.no_grad():
            self.data.lerp_(source.data, weight)


def backward(loss: Tensor, *flats: Flat) -> None:
    """`Flat.backward` of one loss for several networks, in a single pass through its graph."""
    grads = torch.autograd.grad(loss, [p for flat in flats for p in flat.params], allow_unused=True)
    for flat in flats:
        mine, grads = grads[: len(flat.params)], grads[len(flat.params) :]
        torch.cat(flattened(flat.params, mine), out=flat.grad)


def flattened(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients as vectors, zeros for parameters without one."""
    return [
        torch.zeros_like(p).view(-1) if g is None else g.reshape(-1)
        for p, g in zip(params, grads, strict=True)
    ]


class FlatAdam(torch.optim.Adam):
    """torch's fused Adam, the same to the bit, without its bookkeeping for many parameters on many devices.

    That takes longer than the update of a small network. The state is torch's own, and so is every step that is not
    a plain one on a CPU: the first, on a GPU, compiled, or with an option that `adam` does not set.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step from the gradients at hand."""
        if (
            closure is not None
            or torch.compiler.is_compiling()
            or not all(map(self._plain, self.param_groups))
        ):
            return super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                self._update(group)
        return None

    # torch wraps `step` for its profiler and for hooks, which nothing here registers.
    step.hooked = True  # type: ignore[attr-defined]

    def _plain(self, group: dict[str, Any]) -> bool:
        p = group["params"][0]
        usual = group["fused"] and not (group["amsgrad"] or group["maximize"] or group["capturable"])
        return usual and len(group["params"]) == 1 and p.grad is not None and bool(self.state.get(p))

    def _update(self, group: dict[str, Any]) -> None:
        p = group["params"][0]
        state = self.state[p]
        state["step"].add_(1)
        moments = (state["exp_avg"], state["exp_avg_sq"])
        fused_adam(
            p,
            p.grad,
            moments,
            state["step"],
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
        )


def fused_adam(
    data: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    step: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> None:
    """One step of Adam in place, with torch's kernel (AdamW's where `decoupled`); `step` () counts from 1."""
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_  # pyright: ignore[reportPrivateImportUsage]
    kernel(
        [data],
        [grad],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        amsgrad=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def adam(flat: Flat | Sharded, lr: float, *, scheduled: bool = False, **options: Any) -> torch.optim.Adam:
    """Fused Adam over `flat`. With `scheduled`, `set_lr` also works under a captured graph."""
    cuda = flat.device.type == "cuda"
    rate = torch.tensor(lr, device=flat.device) if cuda and scheduled else lr
    return flat.optimizer(lr=rate, fused=True, capturable=cuda, **options)


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


def flat_of(policy: nn.Module) -> Any:
    """The trainable parameters of `policy`: its `Sharded` where it is spread over processes, else a new `Flat`."""
    return getattr(policy, "shards", None) or Flat(policy)


def whole(tensor: Tensor) -> Tensor:
    """`tensor`; one that is spread over processes as a whole on the CPU of the first, as an empty one elsewhere."""
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    full = gather()
    return full.cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0)


def frozen_copy(module: nn.Module) -> tuple[Any, Any]:
    """Target network: a deep copy without gradients, and its `Flat` (or `Sharded`) in the original's order."""
    shards = getattr(module, "shards", None)
    if shards is not None:
        return shards.frozen_copy()
    target = copy.deepcopy(module)
    flat = Flat(target)
    return target.requires_grad_(False), flat
