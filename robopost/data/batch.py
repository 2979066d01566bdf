# SPDX-License-Identifier: Apache-2.0
"""`Batch`, the one shape of experience every algorithm reads, and `Spec`, what an environment or a dataset offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from robopost.errors import DataError

Obs = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """Shapes of one environment or dataset, without batch dimension.

    Attributes:
        obs: observation key -> (shape, dtype name). `state` is float32 (D,), images are uint8 (H, W, C),
            `instruction` is UTF-8 bytes, uint8 (64,), padded with zeros.
        action_dim: size of one action.
        action_low, action_high: bounds in environment units; +-inf where the environment has none.
        max_steps: time limit in environment steps, 0 when unknown.
        choices: number of discrete actions, 0 where actions are continuous. A discrete action is its index 0 ..
            choices - 1 as a float, with action_dim 1.
    """

    obs: dict[str, tuple[tuple[int, ...], str]]
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_steps: int = 0
    choices: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form; `from_json` reverses it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Spec:
        """Rebuild a Spec from `to_json` output."""
        obs = {key: (tuple(shape), dtype) for key, (shape, dtype) in data["obs"].items()}
        return cls(
            obs,
            data["action_dim"],
            tuple(data["action_low"]),
            tuple(data["action_high"]),
            data.get("max_steps", 0),
            data.get("choices", 0),
        )

    @property
    def bounded(self) -> bool:
        """True when every action dimension has finite bounds."""
        return all(abs(v) != float("inf") for v in (*self.action_low, *self.action_high))


@dataclass(frozen=True)
class Batch:
    """A batch of transitions. Leading dimension(s) B; rollouts of on-policy loops lead with (T, N).

    Bootstrapping is decided here, once: the target of every temporal-difference method is
    `reward + discount * value(next_obs)`, where `discount` is already 0 on `terminated` and gamma^k for the true
    k steps an n-step return covers. `truncated` never cuts a bootstrap.

    Attributes:
        obs: per key (B, ...); with an observation history (B, history, ...).
        action: executed action (B, A), or executed chunk (B, H, A).
        reward: (B,); the discounted n-step sum where n > 1.
        next_obs: true final observation at an episode's end, never the first one of the next episode. Empty for
            behaviour cloning, which needs none.
        terminated, truncated: (B,) bool, kept apart.
        discount: (B,) float.
        chunk_mask: (B, H) bool, False on padding after an episode's end.
        chain: what the policy sampled to get the action, see `robopost.policies.base.Action.chain`.
        log_prob: (B,) of `chain` under the policy that collected it.
        extra: further per-sample tensors an algorithm has asked for (e.g. `return_to_go`).
    """

    obs: Obs
    action: Tensor
    reward: Tensor
    next_obs: Obs
    terminated: Tensor
    truncated: Tensor
    discount: Tensor
    chunk_mask: Tensor | None = None
    chain: Tensor | None = None
    log_prob: Tensor | None = None
    policy_version: Tensor | None = None
    is_intervention: Tensor | None = None
    instruction: Tensor | None = None
    extra: Obs | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `fn` to every tensor (moving to a device, indexing, reshaping)."""
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = fn(value)
            elif isinstance(value, dict):
                changed[item.name] = {key: fn(tensor) for key, tensor in value.items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def __len__(self) -> int:
        return self.action.shape[0]


def bootstrap_discount(terminated: Tensor, gamma: float, steps: Tensor | int = 1) -> Tensor:
    """`gamma^k` where the episode goes on or was cut by a time limit, 0 where it terminated. Shape of `terminated`."""
    if isinstance(steps, int) and steps == 1:
        return torch.where(terminated, 0.0, gamma)
    power = torch.as_tensor(gamma, dtype=torch.float32, device=terminated.device) ** steps
    return torch.where(terminated, torch.zeros((), device=terminated.device), power)


def stack(rows: Sequence[Batch]) -> Batch:
    """Stack T batches of N rows into one (T, N) batch; all must carry the same fields."""
    joined: dict[str, Any] = {}
    for item in fields(Batch):
        first = getattr(rows[0], item.name)
        if isinstance(first, Tensor):
            joined[item.name] = torch.stack([getattr(row, item.name) for row in rows])
        elif isinstance(first, dict):
            joined[item.name] = {
                key: torch.stack([getattr(row, item.name)[key] for row in rows]) for key in first
            }
    return Batch(**joined)


def below(columns: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries whose names begin with `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in columns.items() if key.startswith(prefix)}


def concat(first: Batch, second: Batch) -> Batch:
    """Concatenate two batches along the batch dimension; both must carry the same fields."""
    return _join(first, second, lambda a, b: torch.cat([a, b]))


def choose(mask: Tensor, first: Batch, second: Batch) -> Batch:
    """The samples of `first` where `mask` (B,) bool, those of `second` elsewhere; both must carry the same fields."""
    return _join(first, second, lambda a, b: torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b))


def _join(first: Batch, second: Batch, fn: Callable[[Tensor, Tensor], Tensor]) -> Batch:
    joined: dict[str, Any] = {}
    for item in fields(Batch):
        a, b = getattr(first, item.name), getattr(second, item.name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            joined[item.name] = fn(a, b)
        elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            joined[item.name] = {key: fn(a[key], b[key]) for key in a}
        elif a is None and b is None:
            joined[item.name] = None
        else:
            raise DataError(
                f"cannot join batches: field {item.name!r} is present or keyed differently in one of them"
            )
    return Batch(**joined)
