# SPDX-License-Identifier: Apache-2.0
"""PROPS: on-policy learning without on-policy sampling (Corrado and Hanna 2023, arXiv 2311.08290), on PPO.

A behaviour policy collects. It starts from the policy again and again and is pushed away from actions that the newest
experience already holds too many of, so that the actions taken, as a whole, get closer to the policy's probabilities
than independent samples would. PPO then learns from all of that experience as if it were on-policy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robopost.algos.base import Metrics, Needs
from robopost.algos.online.ppo import PPO, PPOConfig, approximate_kl, gae
from robopost.data.batch import Batch, Spec, below, stack
from robopost.data.window import RolloutWindow
from robopost.errors import ConfigError, unknown
from robopost.evaluate.sampling_error import has_closed_form, sampling_error
from robopost.nets.flat import Flat, adam, step_where
from robopost.policies.base import Policy
from robopost.registry import ALGOS

SAMPLING = ("props", "ros")


@dataclass
class PROPSConfig(PPOConfig):
    """Config of `PROPS`; the inherited settings are those of the target policy's updates."""

    name: str = "props"
    buffer_batches: int = 2  # rollouts that PPO learns from and the behaviour policy corrects (b)
    sampling: str = "props"  # props | ros: one gradient step on all samples, as a comparison
    behaviour_steps: int = 1024  # environment steps between updates of the behaviour policy (m)
    behaviour_epochs: int = 16  # 0 = the policy collects itself
    behaviour_minibatches: int = 16  # per epoch
    behaviour_lr: float = 1e-4
    behaviour_clip: float = 0.3
    behaviour_kl_coef: float = 0.3  # lambda
    behaviour_target_kl: float = 0.05  # no more changes beyond it, 0 = off
    advantage_weighted: bool = False  # samples count by |advantage|
    sampling_error: bool = False  # log it with every update; where it has a closed form

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling not in SAMPLING:
            raise unknown("algo.sampling", self.sampling, SAMPLING)
        for name in ("buffer_batches", "behaviour_steps", "behaviour_minibatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be at least 1")
        for name in ("behaviour_lr", "behaviour_clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        if self.advantage_weighted and self.sampling == "ros":
            raise ConfigError("algo.advantage_weighted=true needs algo.sampling=props: ROS has no weights")
        for name in ("behaviour_epochs", "behaviour_kl_coef", "behaviour_target_kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")


def sampling_loss(ratio: Tensor, clip: float, weight: Tensor | None = None) -> Tensor:
    """E[w max(r, clip(r, 1 - eps, 1 + eps))] (Corrado and Hanna 2023, section 5; with weights AW-PROPS).

    Its gradient lowers the probability of all samples, of those above 1 + eps too; at r < 1 - eps, enough is enough.

    Args:
        ratio: (B,) pi_phi(a|s) / pi_theta(a|s).
        clip: eps.
        weight: (B,) or None for ones.
    """
    loss = torch.maximum(ratio, ratio.clamp(1 - clip, 1 + clip))
    return (loss if weight is None else loss * weight).mean()


def advantage_weight(advantage: Tensor) -> Tensor:
    """|A| / std(A): scaled, never centred, so that actions that don't matter weigh nothing."""
    return advantage.abs() / (advantage.std(correction=0) + 1e-8)


@ALGOS.register("props", config=PROPSConfig)
class PROPS(PPO):
    """PPO on the newest rollouts, collected by a behaviour policy that corrects their sampling error."""

    registry_name = "props"
    steps = ("minibatch_step", "behaviour_step")

    def __init__(
        self,
        config: PROPSConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        if not hasattr(policy, "divergence"):
            raise ConfigError(
                f"algo=props needs a divergence between policies, policy={policy.registry_name} has none. "
                "Fix: policy=gaussian or policy=categorical"
            )
        if config.sampling_error and not has_closed_form(policy):
            raise ConfigError(
                f"algo.sampling_error=true needs a closed form, which policy={policy.registry_name} lacks here. "
                "Fix: policy=gaussian policy.state_std=false policy.mean_tanh=false, or algo.sampling_error=false"
            )
        self.window = RolloutWindow(config.buffer_batches)
        self.behaviour_policy: Any = copy.deepcopy(policy)
        self._behaviour_flat = Flat(self.behaviour_policy)
        self.behaviour_optimizer = adam(self._behaviour_flat, config.behaviour_lr, eps=config.adam_eps)
        self._behaviour_keep = torch.ones((), dtype=torch.bool, device=device)
        self._behaviour_sums: Metrics = {}  # since the last update; checkpoints lie right after one
        self._behaviour_updates = 0

    @property
    def needs(self) -> Needs:
        """Rollouts, and to be asked for a new behaviour policy."""
        return replace(super().needs, refresh_steps=self.config.behaviour_steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load `state_dict` output in place, experience included."""
        prefix = "window/"
        held = {key: value for key, value in state["tensors"].items() if key.startswith(prefix)}
        self.window.allocate({key.removeprefix(prefix): value.to(self.device) for key, value in held.items()})
        super().load_state_dict(state)

    def update(self, batch: Batch) -> Metrics:
        """PPO's update over the newest `buffer_batches` rollouts, of which `batch` (T, N) is the last."""
        if batch.chain is None or batch.log_prob is None:
            return super().update(batch)  # which says so
        cfg, metrics = self.config, self._behaviour_metrics()
        held = self.window.push(batch)
        if cfg.sampling_error:
            assert held.chain is not None
            flat = {key: value.flatten(0, 1) for key, value in held.obs.items()}
            metrics["policy/sampling_error"] = sampling_error(
                self.policy, flat, held.chain.flatten(0, 1)
            ).float()
        if cfg.buffer_batches > 1 or cfg.behaviour_epochs:
            # What was recorded belongs to other policies than the one to be updated.
            held = replace(held, log_prob=self._target(held)["log_prob"].view_as(held.reward))
        return super().update(held) | metrics

    def behaviour(self, rows: Sequence[Batch]) -> Policy:
        """The policy, changed so that it makes up for what the newest experience holds too much or too little of."""
        cfg = self.config
        if not cfg.behaviour_epochs:
            return self.policy
        with torch.no_grad():
            self._behaviour_flat.data.copy_(self._flat.data[: len(self._behaviour_flat.data)])
        batch = self.samples(rows)
        if batch is not None and len(batch):
            self._update_behaviour(batch)
        return self.behaviour_policy

    def samples(self, rows: Sequence[Batch]) -> Batch | None:
        """What the behaviour policy corrects, (t, N) normalised: the newest `buffer_batches` rollouts' worth of steps.

        Once there are as many, without the oldest that will be evicted before the next update: they'd not count.
        """
        fresh = self.policy.normaliser.batch(stack(rows)) if rows else None
        if fresh is None and self.window.batch is None:
            return None
        cfg = self.config
        count = cfg.buffer_batches * cfg.rollout_steps
        batch = self.window.newest(fresh, count)
        if len(batch) == count:
            copies, m = batch.reward.shape[1], cfg.behaviour_steps
            done = len(rows)
            following = -(
                -(done * copies // m + 1) * m // copies
            )  # vector steps of the rollout at the next update
            batch = batch.map(lambda tensor: tensor[min(following, cfg.rollout_steps) - done :])
        return batch

    def _update_behaviour(self, batch: Batch) -> None:
        cfg = self.config
        data = self._target(batch)
        self._behaviour_updates += 1
        if cfg.sampling == "ros":
            self._add(self._ros_step(data))
            return
        if cfg.advantage_weighted:
            data["weight"] = advantage_weight(self._advantage(batch)).flatten()
        total = len(data["log_prob"])
        # Of one shape, that of a full window, as soon as there are as many samples: captured graphs ask for it.
        copies = batch.reward.shape[1]
        full = cfg.buffer_batches * cfg.rollout_steps * copies - cfg.behaviour_steps
        size = max(1, full // cfg.behaviour_minibatches)
        step = self.behaviour_step if total >= size else type(self).behaviour_step.__get__(self)
        size = min(size, total)
        self._behaviour_keep.fill_(True)
        for _ in range(cfg.behaviour_epochs):
            order = torch.randperm(total, generator=self.generator, device=self.device)
            shuffled = {key: value.index_select(0, order) for key, value in data.items()}
            for start in range(0, total - size + 1, size):
                self._add(step({key: value[start : start + size] for key, value in shuffled.items()}))
                # As in PPO.update: free on a CPU, masked elsewhere.
                if self.device.type == "cpu" and not self._behaviour_keep:
                    return

    @torch.no_grad()
    def _target(self, batch: Batch) -> dict[str, Tensor]:
        """Samples of a (t, N) batch in a row, with the policy's distribution and log-probability there."""
        assert batch.chain is not None
        policy: Any = self.policy
        obs = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        chain = batch.chain.flatten(0, 1)
        target = policy.distribution(obs)
        return {
            **{f"obs/{key}": value for key, value in obs.items()},
            **{f"target/{index}": value for index, value in enumerate(target)},
            "chain": chain,
            "log_prob": policy.chain_log_prob(chain, *target),
        }

    @torch.no_grad()
    def _advantage(self, batch: Batch) -> Tensor:
        """GAE of a (t, N) batch that may span rollouts, whose last steps are marked as truncated."""
        cfg = self.config
        value, next_value = self.value(batch.obs), self.value(batch.next_obs)
        done = batch.terminated | batch.truncated
        return gae(batch.reward, batch.discount, done, value, next_value, cfg.gamma * cfg.gae_lambda)[0]

    def behaviour_step(self, rows: dict[str, Tensor]) -> Metrics:
        """One gradient step on the behaviour policy; a pure function of the minibatch."""
        cfg, policy = self.config, self.behaviour_policy
        obs = below(rows, "obs/")
        target = tuple(rows[key] for key in sorted(rows) if key.startswith("target/"))
        distribution = policy.distribution(obs)
        log_ratio = policy.chain_log_prob(rows["chain"], *distribution) - rows["log_prob"]
        ratio = log_ratio.exp()
        surrogate = sampling_loss(ratio, cfg.behaviour_clip, rows.get("weight"))
        loss = surrogate
        if cfg.behaviour_kl_coef:
            # Per action dimension, as the published coefficients mean it.
            divergence = policy.divergence(distribution, target).mean() / (
                policy.horizon * policy.spec.action_dim
            )
            loss = loss + cfg.behaviour_kl_coef * divergence
        self._behaviour_flat.backward(loss)
        self._behaviour_flat.clip(cfg.max_grad_norm)
        with torch.no_grad():
            kl = approximate_kl(log_ratio)
            clipped = ((ratio - 1).abs() > cfg.behaviour_clip).float().mean()
        if cfg.behaviour_target_kl:
            self._behaviour_keep.logical_and_(kl <= cfg.behaviour_target_kl)
            step_where(self.behaviour_optimizer, self._behaviour_flat, self._behaviour_keep)
        else:
            self.behaviour_optimizer.step()
        taken = self._behaviour_keep.float()
        return {
            "loss/behaviour": surrogate.detach() * taken,
            "policy/behaviour_kl": kl * taken,
            "policy/behaviour_clip_fraction": clipped * taken,
            "policy/behaviour_steps": taken,
        }

    def _ros_step(self, data: dict[str, Tensor]) -> Metrics:
        """ROS (Zhong et al. 2022, algorithm 2): a plain gradient step that lowers the samples' mean log-probability."""
        obs = below(data, "obs/")
        loss = self.behaviour_policy.log_prob(obs, data["chain"]).mean()
        self._behaviour_flat.backward(loss)
        with torch.no_grad():
            self._behaviour_flat.data.sub_(self.config.behaviour_lr * self._behaviour_flat.grad)
        return {"loss/behaviour": loss.detach(), "policy/behaviour_steps": torch.ones_like(loss).detach()}

    def _add(self, metrics: Metrics) -> None:
        sums = self._behaviour_sums
        self._behaviour_sums = {
            key: sums[key] + value if key in sums else value for key, value in metrics.items()
        }

    def _behaviour_metrics(self) -> Metrics:
        """Means over the gradient steps since the last call, and how many there were per update."""
        sums, updates = self._behaviour_sums, self._behaviour_updates
        self._behaviour_sums, self._behaviour_updates = {}, 0
        if not updates:
            return {}
        taken = sums.pop("policy/behaviour_steps")
        means = {key: value / taken.clamp_min(1) for key, value in sums.items()}
        return means | {"policy/behaviour_steps": taken / updates}
