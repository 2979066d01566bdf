# SPDX-License-Identifier: Apache-2.0
"""Value functions: an ensemble of Q(s, a) with stacked weights, and V(s)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets import fused
from robopost.nets.ensemble import EnsembleLinear, EnsembleMLP
from robopost.nets.mlp import MLP

BLOCK_ROWS = 1024  # of one forward pass of `many` on a CPU


def float_keys(spec: Spec, keys: Sequence[str]) -> list[str]:
    """The vector observations among `keys`.

    Raises:
        ConfigError: there is none.
    """
    found = [key for key in keys if spec.obs[key][1].startswith("float")]
    if not found:
        raise ConfigError(
            f"value functions read float observations and policy.obs_keys={list(keys)} has none. "
            "Fix: add `state` to the environment's obs_keys"
        )
    return found


class ObsConcat(nn.Module):
    """Joins the float observations of `keys` (a history dimension included) into (..., dim)."""

    def __init__(self, spec: Spec, keys: Sequence[str], history: int = 1) -> None:
        super().__init__()
        self.keys = float_keys(spec, keys)
        self.sizes = {key: math.prod(spec.obs[key][0]) * history for key in self.keys}
        self.ranks = {key: len(spec.obs[key][0]) + (history > 1) for key in self.keys}
        self.dim = sum(self.sizes.values())

    def forward(self, obs: Obs) -> Tensor:
        """Observations with any leading dimensions to (..., dim)."""
        parts = [
            obs[key] if self.ranks[key] == 1 else obs[key].flatten(-self.ranks[key]) for key in self.keys
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class QEnsemble(nn.Module):
    """`members` independent Q(s, a) evaluated as one batched network.

    Args:
        spec: shapes of the task.
        keys: observation keys of the policy; the float ones are used.
        hidden: hidden layer sizes.
        members: size of the ensemble E.
        layernorm: LayerNorm before each activation.
        history: observations stacked by the policy.
        orthogonal: orthogonal weights with gain sqrt(2) and zero biases, instead of torch's default.
        out_gain: orthogonal gain of the output layer.
    """

    def __init__(
        self,
        spec: Spec,
        keys: Sequence[str],
        hidden: Sequence[int],
        members: int = 2,
        *,
        layernorm: bool = False,
        history: int = 1,
        orthogonal: bool = False,
        out_gain: float = math.sqrt(2),
    ) -> None:
        super().__init__()
        self.join = ObsConcat(spec, keys, history)
        self.net = EnsembleMLP(members, self.join.dim + spec.action_dim, hidden, 1, layernorm=layernorm)
        if orthogonal:
            last = self.net[len(self.net) - 1]
            for layer in self.net:
                if isinstance(layer, EnsembleLinear):
                    for weight in layer.weight.data:
                        nn.init.orthogonal_(weight, out_gain if layer is last else math.sqrt(2))
                    nn.init.zeros_(layer.bias)

    def forward(self, obs: Obs, action: Tensor) -> Tensor:
        """(B, ...) observations and actions (B, A), both normalised, to (E, B)."""
        return self.net(torch.cat([self.join(obs), action], -1)).squeeze(-1)

    def many(self, obs: Obs, actions: Tensor) -> Tensor:
        """Several actions (B, n, A) per observation (B, ...): (E, B, n).

        One forward pass on a GPU. On a CPU passes of about `BLOCK_ROWS` rows, whose activations stay in the cache:
        at 256 x 31 rows and 256-wide layers they take 0.7 to 0.9 of the time of a single one.
        """
        state = self.join(obs)[:, None].expand(-1, actions.shape[1], -1)
        rows = torch.cat([state, actions], -1)
        size = max(1, BLOCK_ROWS // actions.shape[1]) if rows.device.type == "cpu" else len(rows)
        parts = [self.net(block.flatten(0, 1)).unflatten(1, block.shape[:2]) for block in rows.split(size)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).squeeze(-1)

    def frozen(self, obs: Obs, action: Tensor, members: int | Tensor | None = None) -> Tensor:
        """As `forward` for the first `members` networks, with a gradient to the inputs alone: (members, B).

        A policy gradient needs no gradient of the critic's weights, which would be a third of the work. A tensor (M,)
        names the members: a minimum over two of ten needs no others.
        """
        x = torch.cat([self.join(obs), action], -1)
        pick = (
            (lambda w: w.index_select(0, members)) if isinstance(members, Tensor) else (lambda w: w[:members])
        )
        weights = {key: pick(value.detach()) for key, value in self.net.named_parameters()}
        if fused.usable(self.net, x):
            return fused.mlp(self.net, x, list(weights.values())).squeeze(-1)
        return torch.func.functional_call(self.net, weights, (x,)).squeeze(-1)


class ValueNet(nn.Module):
    """V(s): (..., ) observations to (...,).

    Args:
        spec: shapes of the task.
        keys: observation keys of the policy; the float ones are used.
        hidden: hidden layer sizes.
        activation: a key of `robopost.nets.mlp.ACTIVATIONS`.
        init: `default` or `orthogonal`.
        out_gain: orthogonal gain of the output layer.
        history: observations stacked by the policy.
    """

    def __init__(
        self,
        spec: Spec,
        keys: Sequence[str],
        hidden: Sequence[int],
        *,
        activation: str = "relu",
        init: str = "default",
        out_gain: float = 1.0,
        history: int = 1,
    ) -> None:
        super().__init__()
        self.join = ObsConcat(spec, keys, history)
        self.net = MLP(self.join.dim, hidden, 1, activation, init=init, out_gain=out_gain)

    def forward(self, obs: Obs) -> Tensor:
        """Normalised observations to values."""
        return self.net(self.join(obs)).squeeze(-1)

    def pair(self, obs: Obs, next_obs: Obs) -> tuple[Tensor, Tensor]:
        """Values (B,) of observations and of those that follow, in one pass."""
        values = self.net(torch.cat([self.join(obs), self.join(next_obs)])).squeeze(-1)
        first, second = values.chunk(2)
        return first, second
