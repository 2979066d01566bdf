# SPDX-License-Identifier: Apache-2.0
"""The algorithm contract: a config dataclass and a class with `update(batch) -> metrics`, in one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robopost.accel import CudaGraph, accelerate
from robopost.data.batch import Batch, Spec
from robopost.data.dataset import Dataset
from robopost.errors import CheckpointError, ConfigError
from robopost.nets.flat import whole
from robopost.policies.base import Action, Policy

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of its loop.

    Attributes:
        chunks: True when batches hold action chunks (B, H, A) of the policy's horizon: behaviour cloning, and on-policy
            algorithms whose transitions are the execution of a chunk.
        batch_size: samples per update.
        n_step, gamma: how the sampler forms reward and discount.
        updates_per_step: updates per environment step (UTD); off-policy only.
        warmup_steps: environment steps of random actions before the first update; off-policy only.
        first_updates: updates at once after the warm-up, beside those of `updates_per_step`; off-policy only.
        rollout_steps: steps per environment in one rollout, executed chunks where `chunks`; on-policy only.
        episodes: whole episodes per environment in one rollout, of executed chunks, in place of `rollout_steps`;
            on-policy only.
        group: neighbouring environments that play the same episodes, a divisor of their number; with `episodes`.
        refresh_steps: environment steps (all copies together) after which `behaviour` is asked again who collects; a
            divisor of a rollout's steps, 0 = the policy itself always does; on-policy only.
        demo_fraction: share of each batch drawn from the offline dataset; off-policy only, 0 = none.
        first_updates: updates at once after the warm-up, beside those of `updates_per_step`; off-policy only.
        extra: names of per-step quantities the sampler must add to `Batch.extra` ("return_to_go", "next_action",
            "step": the dataset step each sample begins at).
    """

    chunks: bool = False
    batch_size: int = 256
    n_step: int = 1
    gamma: float = 0.99
    updates_per_step: float = 1.0
    warmup_steps: int = 0
    rollout_steps: int = 0
    episodes: int = 0
    group: int = 1
    refresh_steps: int = 0
    demo_fraction: float = 0.0
    first_updates: int = 0
    extra: tuple[str, ...] = field(default_factory=tuple)


class Algorithm(ABC):
    """Base class of all algorithms.

    A subclass is registered with `@ALGOS.register(name, config=Config)` and built as `cls(config, policy, spec,
    device=..., generator=...)`. It keeps every network as an `nn.Module` attribute, every optimiser as a
    `torch.optim.Optimizer` attribute and every other tensor of its state as a `Tensor` attribute:
    `state_dict` finds them by type. `generator` (on the policy's device) is its only source of randomness.
    """

    registry_name: ClassVar[str] = ""
    regime: ClassVar[str] = ""  # "offline", "offpolicy" or "onpolicy": the loop that runs it
    steps: ClassVar[tuple[str, ...]] = ()  # methods that `accelerate` wraps: pure functions of tensors
    stackable: ClassVar[bool] = (
        True  # False where `update` can't run under torch.vmap, see `robopost.algos.stack`
    )
    # Methods of the policy that losses are computed by where it is sharded (accel.fsdp); empty = it can't be.
    sharded_by: ClassVar[tuple[str, ...]] = ()
    discrete: ClassVar[bool] = False  # True where it also learns in environments with discrete actions
    can_go_online: ClassVar[bool] = (
        False  # offline algorithms that may go on in an environment, see `begin_online`
    )

    def __init__(
        self, config: Any, policy: Policy, spec: Spec, *, device: torch.device, generator: torch.Generator
    ) -> None:
        if spec.choices and not self.discrete:
            raise ConfigError(
                f"algo={self.registry_name} needs continuous actions, here are {spec.choices} discrete ones. "
                "Fix: algo=ppo or algo=props"
            )
        self.config = config
        self.policy = policy
        self.spec = spec
        self.device = device
        self.generator = generator
        self.updates = 0
        self.online = False  # an offline algorithm in its online phase

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What this algorithm asks of its loop; constant over a run."""

    @abstractmethod
    def update(self, batch: Batch) -> Metrics:
        """One update from a batch in normalised units. Returns detached scalar tensors; never syncs with the host."""

    def attach(self, dataset: Dataset) -> None:  # noqa: B027 - most algorithms need nothing but batches
        """Look at the whole dataset (normalised units) once, before the first update, resumed or not.

        For what depends on all of it, e.g. an index of nearest neighbours. Must draw no random numbers.
        """

    def before_rollouts(self, play: Callable[[Policy, int], float | None]) -> None:  # noqa: B027 - see `attach`
        """Called once by the on-policy loop of a fresh run, before its first rollout.

        Args:
            play: plays greedy episodes of a policy in the run's environment and gives the share that succeeded, None
                where the task has no success predicate. Draws from no random stream of the run.
        """

    def begin_online(self) -> None:
        """The offline updates are done, experience of the algorithm's own policy joins its batches from now on.

        Called once, between two updates; a resumed run finds `online` in the algorithm's state instead. Networks,
        optimisers and random streams go on as they are. Captured graphs are dropped: `train_step` and its like may
        look at `online`.
        """
        self.online = True
        self._drop_graphs()

    def behaviour(self, rows: Sequence[Batch]) -> Policy:
        """The policy that collects the next `Needs.refresh_steps` environment steps of an on-policy rollout.

        Asked between vector steps: at the start of a rollout, and whenever the steps of all copies together have
        crossed a multiple of `refresh_steps`.

        Args:
            rows: the rollout so far, one (N,) batch per vector step in environment units, oldest first.
        """
        return self.policy

    def explore(self, obs: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Executed action (B, A) in environment units for collecting; default: a stochastic sample of the policy."""
        return self.policy.act(obs, generator=generator).chunk[:, 0]

    def decide(self, obs: dict[str, Tensor], generator: torch.Generator) -> Action:
        """What an on-policy rollout of chunks executes for raw observations (B, ...); default: the policy's sample."""
        return self.policy.act(obs, generator=generator)

    def accelerate(self, mode: str) -> None:
        """Compile or capture the update steps, see `robopost.accel.accelerate`. Call once, before the first update."""
        if not self.policy.capturable:
            if mode not in ("auto", "eager"):
                raise ConfigError(
                    f"accel.mode={mode}: policy={self.policy.registry_name} works on the host. Fix: accel.mode=eager"
                )
            mode = "eager"
        for name in self.steps:
            fn = getattr(type(self), name).__get__(self)
            wrapped = accelerate(fn, mode, device=self.device, generators=(self.generator,))
            setattr(self, name, wrapped)

    @contextmanager
    def whole_policy(self) -> Iterator[None]:
        """Within this context `policy` can act and score where it is sharded, too: it is a whole copy there.

        Processes need not ask it equally often, as they have to where layers are put together one by one.
        """
        sharded = self.policy
        if sharded.shards is not None:
            self.policy = sharded.shards.everywhere(sharded)
        try:
            yield
        finally:
            self.policy = sharded

    def export_policy(self) -> Policy:
        """The policy to evaluate, checkpoint and deploy (e.g. an EMA copy where the algorithm keeps one)."""
        return self.policy

    def state_dict(self) -> dict[str, Any]:
        """`{"tensors": {name: tensor}, "json": {...}}`: all state of networks, optimisers and plain tensors."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {"updates": self.updates, "online": self.online}
        for name, value in sorted(vars(self).items()):
            if isinstance(value, nn.Module):
                found = value.state_dict()
                tensors |= {f"{name}/{key}": whole(tensor.detach()) for key, tensor in found.items()}
            elif isinstance(value, torch.optim.Optimizer):
                state = value.state_dict()
                for index, slots in state["state"].items():
                    for slot, item in slots.items():
                        tensors[f"{name}/{index}/{slot}"] = torch.as_tensor(item)
                plain[name] = [_plain_group(group) for group in state["param_groups"]]
            elif isinstance(value, Tensor):
                tensors[name] = value.detach()
        return {"tensors": tensors, "json": plain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load `state_dict` output in place: parameters keep their identity, so optimisers go on owning them.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape.
        """
        tensors, plain = dict(state["tensors"]), state["json"]
        self.updates = int(plain["updates"])
        self.online = bool(plain.get("online", False))
        with torch.no_grad():
            for name, value in sorted(vars(self).items()):
                if isinstance(value, nn.Module):
                    for key, target in value.state_dict().items():
                        _copy_into(target, f"{name}/{key}", tensors)
                elif isinstance(value, torch.optim.Optimizer):
                    _load_optimizer(name, value, tensors, plain)
                elif isinstance(value, Tensor):
                    _copy_into(value, name, tensors)
        self._drop_graphs()  # loading has replaced the optimiser state they were captured with
        if tensors:
            raise CheckpointError(
                f"checkpoint holds {sorted(tensors)[0]!r}, which {type(self).__name__} doesn't know"
            )

    def _drop_graphs(self) -> None:
        for value in vars(self).values():
            if isinstance(value, CudaGraph):
                value.reset()


def _copy_into(target: Tensor, name: str, tensors: dict[str, Tensor]) -> None:
    if name not in tensors:
        raise CheckpointError(
            f"checkpoint lacks {name!r}: it belongs to another algorithm, policy or version"
        )
    source = tensors.pop(name)
    if source.shape != target.shape:
        raise CheckpointError(
            f"checkpoint has {name!r} of shape {tuple(source.shape)}, here it is {tuple(target.shape)}"
        )
    if hasattr(target, "full_tensor"):
        from robopost.nets.sharded import copy_into

        copy_into(target, source)
    else:
        target.copy_(source)


def _load_optimizer(
    name: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict
) -> None:
    if name not in plain:
        raise CheckpointError(f"checkpoint lacks the optimiser {name!r}: it belongs to another algorithm")
    slots: dict[int, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.startswith(f"{name}/")]:
        _, index, slot = key.split("/")
        slots.setdefault(int(index), {})[slot] = tensors.pop(key)
    groups = [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in plain[name]]
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict({"state": slots, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(f"optimiser {name!r} of the checkpoint does not fit: {error}") from error
    for rate, group in zip(rates, optimizer.param_groups, strict=True):
        if isinstance(rate, Tensor):  # a learning rate that a captured graph reads
            group["lr"] = rate.fill_(group["lr"])


def _plain_group(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
