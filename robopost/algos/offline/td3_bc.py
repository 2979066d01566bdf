# SPDX-License-Identifier: Apache-2.0
"""TD3+BC: TD3 with a cloning term in the actor (Fujimoto and Gu 2021, arXiv 2106.06860).

Reference implementations: github.com/sfujim/TD3_BC and CORL's `algorithms/offline/td3_bc.py`. The critic is
TD3's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robopost.algos.base import Metrics, Needs
from robopost.algos.online.td3 import TD3, TD3CoreConfig
from robopost.data.batch import Batch
from robopost.errors import ConfigError
from robopost.registry import ALGOS


@dataclass
class TD3BCConfig(TD3CoreConfig):
    """Config of `TD3BC`."""

    name: str = "td3_bc"
    alpha: float = 2.5  # weight of Q against cloning; 0 = behaviour cloning
    exploration_noise: float = 0.1  # std, normalised action units; in the online phase

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ConfigError(f"algo.alpha={self.alpha} must be 0 (behaviour cloning) or more")
        if self.exploration_noise < 0:
            raise ConfigError(f"algo.exploration_noise={self.exploration_noise} must be 0 or more")


def q_weight(q: Tensor, alpha: float) -> Tensor:
    """Lambda = alpha / mean |Q(s, pi(s))|, without gradient (Fujimoto and Gu 2021, eq. 5)."""
    return alpha / q.detach().abs().mean()


def td3_bc_loss(q: Tensor, action: Tensor, data_action: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """-lambda * mean Q(s, pi(s)) + mean (pi(s) - a)^2 over batch and dimensions (Fujimoto and Gu 2021, eq.
    3).

    Args:
        q: (B,) first critic at the policy's action.
        action: (B, A) the policy's action.
        data_action: (B, A) the dataset's.
        alpha: see `TD3BCConfig`.

    Returns:
        (loss, cloning term).
    """
    cloning = F.mse_loss(action, data_action)
    if alpha == 0:
        return cloning, cloning
    return cloning - q_weight(q, alpha) * q.mean(), cloning


@ALGOS.register("td3_bc", config=TD3BCConfig)
class TD3BC(TD3):
    """TD3+BC: TD3 on a fixed dataset, held near it by a cloning loss."""

    registry_name = "td3_bc"
    regime = "offline"
    can_go_online = True

    @property
    def needs(self) -> Needs:
        """Transitions of the dataset."""
        return Needs(batch_size=self.config.batch_size, n_step=self.config.n_step, gamma=self.config.gamma)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """TD3+BC's objective, see `td3_bc_loss`."""
        action = self.policy.sample(batch.obs, deterministic=True)[0][:, 0]
        q = self.critic.frozen(batch.obs, action, members=1)[0]
        loss, cloning = td3_bc_loss(q, action, batch.action, self.config.alpha)
        return loss, {"loss/bc": cloning.detach(), "policy/bc_distance": _distance(action, batch.action)}


def _distance(action: Tensor, data_action: Tensor) -> Tensor:
    """Mean Euclidean distance between the policy's and the dataset's actions, normalised units."""
    return torch.linalg.vector_norm(action.detach() - data_action, dim=-1).mean()
