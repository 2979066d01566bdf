# SPDX-License-Identifier: Apache-2.0
"""The newest rollouts of an on-policy algorithm that learns from more than one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from robopost.data.batch import Batch


class RolloutWindow(nn.Module):
    """The newest `rollouts` rollouts of T steps in N environments, in the order of time: (up to rollouts * T, N).

    The last step of every rollout is marked as truncated. Experience on its two sides belongs to different policies
    (and maybe episodes), so an advantage is bootstrapped there with the true next observation and goes no further.
    The tensors are buffers of this module, so that they are saved with the algorithm.
    """

    def __init__(self, rollouts: int) -> None:
        super().__init__()
        self.rollouts = rollouts

    @property
    def batch(self) -> Batch | None:
        """All that is held, oldest first; None before the first rollout."""
        return _from_tensors(dict(self.named_buffers())) if self._buffers else None

    def push(self, rollout: Batch) -> Batch:
        """Add a (T, N) rollout, evict the oldest beyond `rollouts`, and return all that is held."""
        truncated = rollout.truncated.clone()
        truncated[-1] = True
        rollout = replace(rollout, truncated=truncated)
        held = self.newest(rollout, self.rollouts * len(rollout))
        for name, tensor in _to_tensors(held).items():
            self.register_buffer(name, tensor)
        return held

    def newest(self, rows: Batch | None, count: int) -> Batch:
        """The last `count` steps (or all, where there are fewer) of what is held followed by `rows` (t, N).

        At least one of the two must be there.
        """
        held = self.batch
        if held is None or rows is None:
            batch = rows if held is None else held
            assert batch is not None
            return batch.map(lambda tensor: tensor[-count:])
        first, second = _to_tensors(held), _to_tensors(rows)
        return _from_tensors({key: torch.cat([first[key], second[key]])[-count:] for key in first})

    def allocate(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the shapes of saved tensors, before their values are loaded."""
        self._buffers.clear()
        for name, tensor in tensors.items():
            self.register_buffer(name, torch.zeros_like(tensor))


def _to_tensors(batch: Batch) -> dict[str, Tensor]:
    """Tensors of a batch by name, those of observations as `obs/<key>`."""
    found: dict[str, Tensor] = {}
    for item in fields(Batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            found[item.name] = value
        elif isinstance(value, dict):
            found |= {f"{item.name}/{key}": tensor for key, tensor in value.items()}
    return found


def _from_tensors(tensors: dict[str, Tensor]) -> Batch:
    """Reverse `_to_tensors`."""
    joined: dict[str, Any] = {"obs": {}, "next_obs": {}}
    for name, tensor in tensors.items():
        field, _, key = name.partition("/")
        if key:
            joined.setdefault(field, {})[key] = tensor
        else:
            joined[field] = tensor
    return Batch(**joined)
