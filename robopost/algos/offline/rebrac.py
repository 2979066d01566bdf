# SPDX-License-Identifier: Apache-2.0
"""ReBRAC: TD3 with cloning penalties in actor and critic (Tarasov et al. 2023, arXiv 2305.09836).

Reference implementation: CORL's `algorithms/offline/rebrac.py` (github.com/corl-team/CORL).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robopost.algos.base import Metrics, Needs
from robopost.algos.offline.td3_bc import q_weight
from robopost.algos.online.td3 import TD3, TD3CoreConfig, critic_loss, smoothed_action, td_target
from robopost.data.batch import Batch
from robopost.errors import ConfigError, DataError
from robopost.nets.ensemble import EnsembleLayerNorm, EnsembleLinear
from robopost.nets.value import QEnsemble
from robopost.registry import ALGOS

HIDDEN_BIAS, OUTPUT_BOUND = 0.1, 3e-3  # initial biases and output weights of the critics (An et al. 2021)


@dataclass
class ReBRACConfig(TD3CoreConfig):
    """Config of `ReBRAC`; the actor is the policy's, 256-256-256 in the reference."""

    name: str = "rebrac"
    batch_size: int = 1024
    actor_lr: float = 1e-3
    critic_lr: float = 1e-3
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])  # of the critics
    critic_layernorm: bool = True  # after each activation
    actor_bc_coef: float = 0.01  # beta_1: cloning penalty of the actor, summed over action dimensions
    critic_bc_coef: float = 0.01  # beta_2: cloning penalty in the critics' target
    exploration_noise: float = 0.1  # std, normalised action units; in the online phase

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("actor_bc_coef", "critic_bc_coef", "exploration_noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")


def reshape_critics(critic: QEnsemble) -> QEnsemble:
    """Give critics the reference's form, in place: LayerNorm behind ReLU, its initial values."""
    net = critic.net
    for index in [i for i, layer in enumerate(net) if isinstance(layer, EnsembleLayerNorm)]:
        net[index], net[index + 1] = net[index + 1], net[index]
    linears = [layer for layer in net if isinstance(layer, EnsembleLinear)]
    for layer in linears[:-1]:
        nn.init.constant_(layer.bias, HIDDEN_BIAS)
    nn.init.uniform_(linears[-1].weight, -OUTPUT_BOUND, OUTPUT_BOUND)
    nn.init.uniform_(linears[-1].bias, -OUTPUT_BOUND, OUTPUT_BOUND)
    return critic


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) squared Euclidean distance of actions: a sum over dimensions, where TD3+BC takes the mean."""
    return (a - b).square().sum(-1)


def rebrac_loss(q: Tensor, distance: Tensor, coef: float) -> Tensor:
    """Mean of beta_1 |pi(s) - a|^2 - Q / mean |Q| (Tarasov et al. 2023, section 4; Q normalised as by TD3+BC).

    Args:
        q: (B,) smallest critic at the policy's action.
        distance: (B,) from `squared_distance`.
        coef: beta_1.
    """
    return coef * distance.mean() - q_weight(q, 1.0) * q.mean()


@ALGOS.register("rebrac", config=ReBRACConfig)
class ReBRAC(TD3):
    """ReBRAC: TD3+BC with the penalty in the critics' target too, deeper normalised critics, large batches."""

    registry_name = "rebrac"
    regime = "offline"
    can_go_online = True

    @property
    def needs(self) -> Needs:
        """Transitions with the dataset's next action."""
        cfg = self.config
        return Needs(batch_size=cfg.batch_size, n_step=cfg.n_step, gamma=cfg.gamma, extra=("next_action",))

    def build_critic(self) -> QEnsemble:
        """The reference's critics, see `reshape_critics`."""
        return reshape_critics(super().build_critic())

    def critic_step(self, batch: Batch, noise: Tensor, subset: Tensor | None) -> Metrics:
        """As TD3's, with beta_2 |a~ - a'|^2 taken off the next value (Tarasov et al. 2023, section 4).

        Where no next action was recorded (behind the last step of a truncated episode) nothing is taken off.
        """
        cfg = self.config
        if batch.extra is None or "next_action" not in batch.extra:
            raise DataError(
                "algo=rebrac needs the next action of each transition: Batch.extra['next_action']"
            )
        with torch.no_grad():
            next_action = self.policy_target.sample(batch.next_obs, deterministic=True)[0][:, 0]
            next_action = smoothed_action(next_action, noise, cfg.target_noise, cfg.target_noise_clip)
            distance = squared_distance(next_action, batch.extra["next_action"])
            penalty = cfg.critic_bc_coef * torch.where(batch.extra["next_action_mask"], distance, 0.0)
            next_q = self.critic_target(batch.next_obs, next_action) - penalty
            target = td_target(batch.reward, batch.discount, next_q, subset)
        q = self.critic(batch.obs, batch.action)
        loss = critic_loss(q, target)
        self._critic_flat.backward(loss)
        self.critic_optimizer.step()
        return {
            "loss/critic": loss.detach(),
            "value/q_mean": q.detach().mean(),
            "value/penalty": penalty.mean(),
        }

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """ReBRAC's objective, see `rebrac_loss`."""
        action = self.policy.sample(batch.obs, deterministic=True)[0][:, 0]
        q = self.critic.frozen(batch.obs, action).amin(0)
        distance = squared_distance(action, batch.action)
        loss = rebrac_loss(q, distance, self.config.actor_bc_coef)
        return loss, {
            "loss/bc": distance.detach().mean(),
            "policy/bc_distance": distance.detach().sqrt().mean(),
        }
