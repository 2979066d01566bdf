# SPDX-License-Identifier: Apache-2.0
"""A Gaussian policy and its critic as G independent heads: one per step of the episode, or a single one."""

from __future__ import annotations

import torch
from torch import Tensor

from robopost.data.batch import Obs
from robopost.errors import ConfigError
from robopost.nets.rows import StackedQ
from robopost.nets.value import ObsConcat
from robopost.policies.base import Policy
from robopost.policies.family import Family
from robopost.policies.gaussian import HALF_LOG_2PI, Gaussian
from robopost.policies.stepwise import Stepwise


class Heads:
    """Evaluates all heads at once; tensors lead with (G, B), normalised.

    With `Stepwise` head g is the policy of step g, with any other Gaussian policy of single actions G = 1.

    Args:
        policy: acts.
        hidden: layer sizes of the critics.
        samples: actions over which V averages Q.
        generator: of all noise.
        name: of the algorithm, for errors.

    Attributes:
        count: G.
        per_step: True with `Stepwise`.
        critic: Q of every head.

    Raises:
        ConfigError: the policy has no Gaussian distribution over single actions.
    """

    def __init__(
        self, policy: Policy, hidden: list[int], samples: int, generator: torch.Generator, name: str
    ) -> None:
        # A family also learns which of its members acts, which no surrogate of a single action knows of.
        gaussian = isinstance(policy, Gaussian | Stepwise) and not isinstance(policy, Family)
        if not gaussian or policy.horizon != 1:
            raise ConfigError(
                f"algo={name} needs a Gaussian policy of single actions, policy={policy.registry_name} with "
                f"horizon={policy.horizon} is none. Fix: policy=stepwise, or policy=gaussian policy.horizon=1"
            )
        self.policy, self.samples, self.generator = policy, samples, generator
        self._stepwise = policy if isinstance(policy, Stepwise) else None
        self.per_step = self._stepwise is not None
        self.count = self._stepwise.steps if self._stepwise else 1
        self.join = ObsConcat(policy.spec, policy.obs_keys, policy.history)
        self.critic = StackedQ(self.count, self.join.dim, policy.spec.action_dim, hidden)
        self._squash = bool(getattr(policy.config, "squash", False))

    def distribution(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """Mean (G, B, A) and log-std (G, B or 1, A) before squashing or clipping."""
        if self._stepwise is not None:
            return self._stepwise.heads(self.join(obs))
        mean, log_std = self.policy.distribution({key: value[0] for key, value in obs.items()})  # type: ignore[operator]
        return mean.transpose(0, 1), log_std.transpose(0, 1)

    def sample(self, obs: Obs) -> Tensor:
        """One action (G, B, A) per observation, before squashing or clipping."""
        return self._draw(*self.distribution(obs))

    def executed(self, chain: Tensor) -> Tensor:
        """What the environment gets for a sample: squashed, or clipped to its bounds."""
        if self._squash:
            return chain.tanh()
        norm = self.policy.normaliser
        low, high = norm.action(norm.action_low), norm.action(norm.action_high)
        return torch.minimum(torch.maximum(chain, low), high)

    def q(self, obs: Obs, action: Tensor) -> Tensor:
        """Q(s, a) (G, B) of executed actions (G, B, A)."""
        return self.critic(self.join(obs), action)

    def value(self, obs: Obs) -> Tensor:
        """V(s) (G, B): the mean of Q(s, a_i), a_i ~ pi(.|s), i = 1 .. samples."""
        mean, log_std = self.distribution(obs)
        many = mean.unsqueeze(2).expand(-1, -1, self.samples, -1)
        chain = self._draw(many, log_std.unsqueeze(2))
        return self.critic.many(self.join(obs), self.executed(chain)).mean(2)

    def ahead(self, next_obs: Obs) -> Tensor:
        """(G, B, D + A): next states beside one action of the policy that acts there.

        With per-step policies that is head g + 1; the last head's row holds nothing of use.
        """
        x = self.join(next_obs)
        if self._stepwise is None:
            chain = self.sample(next_obs)
        else:
            chain = self._draw(*self._stepwise.heads(x.roll(1, 0))).roll(-1, 0)
        return torch.cat([x, self.executed(chain)], -1)

    @torch.no_grad()
    def entropy(self, obs: Obs) -> Tensor:
        """Of the Gaussian before squashing: mean over states and heads, in nats."""
        _, log_std = self.distribution(obs)
        return (log_std + 0.5 + HALF_LOG_2PI).sum(-1).mean()

    def _draw(self, mean: Tensor, log_std: Tensor) -> Tensor:
        noise = torch.randn(mean.shape, generator=self.generator, device=mean.device, dtype=mean.dtype)
        return mean + log_std.exp() * noise
