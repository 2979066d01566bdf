# SPDX-License-Identifier: Apache-2.0
"""A policy whose parameters, gradients and optimiser state are spread over processes (FSDP2 of torch).

Every tensor is cut along its first dimension, one part per process. Layers named by `Policy.blocks` are put together
one at a time just before they run, forwards and backwards, all other weights once per loss. Imported only by runs with
`accel.fsdp=true`: torch's own modules for this take seconds to load.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from robopost.errors import ConfigError
from robopost.nets.flat import whole


class Sharded:
    """What `Flat` is for one process: the trainable parameters of a sharded policy, and this process's part of them.

    Attributes:
        processes: over which the policy is spread.
        params: the trainable parameters (DTensors), in module order.
        shards: this process's parts as plain parameters over the same memory; optimisers own them.
        device: where they are.
    """

    def __init__(self, twin: nn.Module) -> None:
        """`twin` is the policy's module tree without FSDP's hooks, over the parts of its parameters."""
        self.twin = twin
        self.processes = dist.get_world_size()
        self.params: list[Any] = [p for p in twin.parameters() if p.requires_grad]
        if not self.params:
            raise ConfigError(f"{type(twin).__name__} has no trainable parameters: nothing to optimise")
        self.shards = [nn.Parameter(p.detach().to_local()) for p in self.params]
        self.device = self.shards[0].device

    def share(self, means: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """Means over this process's samples as its shares of the means over all processes' samples.

        Args:
            means: each over what `weight` counts.
            weight: the mask of what counts, any shape.

        Returns:
            `means` x (own count / mean count of a process). Their means over processes, which `backward` takes of
            gradients and a log line of metrics, are those over the whole batch.
        """
        own = weight.detach().sum().to(torch.float32)
        total = own.clone()
        dist.all_reduce(total)
        part = own * self.processes / total.clamp_min(1.0)
        return {name: value * part for name, value in means.items()}

    def most(self, count: int) -> int:
        """The largest `count` of a process: steps have to be as many in all of them."""
        largest = torch.tensor(count, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def everywhere(self, policy: Any) -> Any:
        """An ordinary, whole copy of `policy`, the sharded one, in every process: to act and to score with."""
        weights: Any = self.twin.parameters()
        memo: dict[int, Any] = {id(p): _whole_parameter(p, p.detach().full_tensor()) for p in weights}
        return _like(policy, copy.deepcopy(self.twin, memo))

    def backward(self, loss: Tensor) -> None:
        """Write the mean over processes of d loss / d params into the gradients of `shards`."""
        for p in self.params:
            p.grad = None
        self.add_backward(loss)

    def add_backward(self, loss: Tensor) -> None:
        """As `backward`, added to the gradients at hand."""
        loss.backward()
        for p, shard in zip(self.params, self.shards, strict=True):
            shard.grad = torch.zeros_like(shard) if p.grad is None else p.grad.to_local()

    def clip(self, max_norm: float) -> Tensor:
        """As `Flat.clip`: the norm is that of the whole gradient, the same in every process."""
        grads = [shard.grad for shard in self.shards if shard.grad is not None]
        square = torch.stack([grad.float().square().sum() for grad in grads]).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def lerp(self, source: Sharded, weight: float) -> None:
        """Polyak step in place: `shards <- (1 - weight) shards + weight source.shards`."""
        with torch.no_grad():
            mine, theirs = ([shard.data for shard in item.shards] for item in (self, source))
            torch._foreach_lerp_(mine, theirs, weight)  # pyright: ignore[reportPrivateImportUsage]

    def optimizer(self, **options: Any) -> torch.optim.Adam:
        """Adam over this process's parts."""
        return ShardedAdam(self, **options)

    def frozen_copy(self) -> tuple[Any, Sharded]:
        """A copy that is cut alike, without gradients and without FSDP's hooks: it can be averaged into and saved."""
        memo: dict[int, Any] = {}
        for p in self.twin.parameters():
            memo[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        target = copy.deepcopy(self.twin, memo)
        shards = Sharded(target)
        return target.requires_grad_(False), shards

    def join(self, parts: list[Tensor]) -> Tensor:
        """One tensor per shard to the vector (P,) that `Flat` would have: on the first process, empty elsewhere."""
        found = []
        for p, part in zip(self.params, parts, strict=True):
            like = {"shape": p.shape, "stride": p.stride()}
            full = whole(DTensor.from_local(part, p.device_mesh, p.placements, **like))
            found.append(full.reshape(-1))
        return torch.cat(found)

    def cut(self, vector: Tensor) -> list[Tensor]:
        """`join` reversed, for a vector (P,) that every process has."""
        pieces = vector.split([p.numel() for p in self.params])
        return [part_of(piece.view(p.shape), p) for p, piece in zip(self.params, pieces, strict=True)]


class ShardedAdam(torch.optim.Adam):
    """Adam over `Sharded.shards`, whose state dict is that of Adam over one `Flat.param`."""

    def __init__(self, flat: Sharded, **options: Any) -> None:
        super().__init__(flat.shards, **options)
        self._flat = flat

    def state_dict(self) -> dict[str, Any]:
        """The whole state on the first process; takes all processes."""
        own = super().state_dict()
        groups = [group | {"params": [0]} for group in own["param_groups"]]
        if not own["state"]:
            return {"state": {}, "param_groups": groups}
        slots: dict[str, Any] = {"step": own["state"][0]["step"]}
        for name in ("exp_avg", "exp_avg_sq"):
            slots[name] = self._flat.join(
                [own["state"][index][name] for index in range(len(self._flat.shards))]
            )
        return {"state": {0: slots}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `state_dict` of any number of processes, or of `FlatAdam`.

        Raises:
            ValueError: it is of other parameters.
        """
        count = len(self._flat.shards)
        groups = [group | {"params": list(range(count))} for group in state_dict["param_groups"]]
        state: dict[int, dict[str, Tensor]] = {}
        if state_dict["state"]:
            slots = state_dict["state"][0]
            sizes = sum(p.numel() for p in self._flat.params)
            if slots["exp_avg"].numel() != sizes:
                raise ValueError(f"{slots['exp_avg'].numel()} parameters, here are {sizes}")
            cut = {name: self._flat.cut(slots[name]) for name in ("exp_avg", "exp_avg_sq")}
            for index in range(count):
                state[index] = {name: parts[index] for name, parts in cut.items()}
                state[index]["step"] = slots["step"].clone()
        super().load_state_dict({"state": state, "param_groups": groups})


def shard(policy: Any, entries: tuple[str, ...]) -> None:
    """Cut `policy` over all processes of the default group, in place; afterwards `policy.shards` is its `Sharded`.

    Args:
        policy: the same in every process, on its device.
        entries: methods of it that losses are computed by. They put weights together as they need them; anything else
            that reads weights finds parts.

    Raises:
        ConfigError: it has no such method.
    """
    for entry in entries:
        if not hasattr(policy, entry):
            raise ConfigError(
                f"policy={policy.registry_name} has no {entry}(), by which this algorithm trains with accel.fsdp=true. "
                "Fix: policy=token_vla, or accel.fsdp=false"
            )
    memo: dict[int, Any] = {id(p): p for p in policy.parameters()}
    memo[id(policy.config)] = policy.config
    for module in policy.modules():  # normaliser, prompts: what holds no parameters is one and the same
        if next(module.parameters(), None) is None:
            memo[id(module)] = module
        memo |= {id(buffer): buffer for buffer in module.buffers(recurse=False)}
    twin = copy.deepcopy(policy, memo)
    names = [name for name, _ in policy.named_parameters(remove_duplicate=False)]
    reduce = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # of bfloat16 gradients
    for block in policy.blocks():
        fully_shard(block, mp_policy=reduce)
        if hasattr(block, "run"):
            register_fsdp_forward_method(block, "run")
    fully_shard(policy, mp_policy=reduce)
    for entry in entries:
        register_fsdp_forward_method(policy, entry)
    for name in names:
        path, _, leaf = name.rpartition(".")
        twin.get_submodule(path)._parameters[leaf] = policy.get_parameter(name)
    policy.shards = Sharded(twin)


def gathered(policy: Any) -> Any:
    """An ordinary, whole policy of what a sharded one holds now: on the first process, None elsewhere; takes all."""
    twin: Any = policy if policy.shards is None else policy.shards.twin
    memo: dict[int, Any] = {}
    for p in twin.parameters():
        memo[id(p)] = _whole_parameter(p, whole(p.detach()))
    return _like(policy, copy.deepcopy(twin, memo)) if dist.get_rank() == 0 else None


def _whole_parameter(p: Tensor, full: Tensor) -> nn.Parameter:
    return nn.Parameter(full.to(p.device), requires_grad=p.requires_grad)


def _like(policy: Any, made: Any) -> Any:
    """`made` with what has been set on `policy` since it was sharded, e.g. a temperature."""
    for name, value in vars(policy).items():
        if isinstance(value, (bool, int, float, str)):
            setattr(made, name, value)
    return made.train(policy.training)


def part_of(full: Tensor, like: Any) -> Tensor:
    """This process's part of `full`, which every process has, cut as `like` (a DTensor) is."""
    cut = distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return cut.to_local()


def copy_into(target: Any, full: Tensor) -> None:
    """Write `full`, which every process has, into the sharded `target` (a DTensor)."""
    target.to_local().copy_(part_of(full.to(target.dtype), target))
