# SPDX-License-Identifier: Apache-2.0
"""The policy contract: raw observations in, executable actions out, normaliser inside."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.norm import Normaliser
from robopost.registry import POLICIES

if TYPE_CHECKING:
    from robopost.data.dataset import Dataset
    from robopost.vector import VecEnv


EPISODE_STEP = "episode_step"  # key under which `StepPolicy` tells a policy with `reads_step` where it is


@dataclass
class Action:
    """What a policy returns.

    Attributes:
        chunk: (B, H, A) in environment units, clipped to the bounds where there are any. H = 1 for step policies.
        log_prob: (B,) log-probability of `chain` under the policy, or None.
        chain: (B, K, H, A) the sampled path in normalised units whose log-probability `log_prob` is: K = 1 for a
            Gaussian (the sample before clipping), K = steps + 1 for flow and diffusion (x_0 .. x_K).
    """

    chunk: Tensor
    log_prob: Tensor | None = None
    chain: Tensor | None = None


class Policy(nn.Module, ABC):
    """Base class of all policies.

    Subclasses live in `robopost/policies/<name>.py`, are registered with `@POLICIES.register(name, config=Config)`,
    are built as `cls(config, spec)`, and work in normalised units in everything but `act`:
    observations standardised, actions mapped to [-1, 1]. `act` is the only place that converts.
    """

    registry_name: ClassVar[str] = ""
    has_log_prob: ClassVar[bool] = False
    normaliser_fixed: bool = (
        False  # True where the normaliser came with loaded weights and must not be refitted
    )
    wraps_env: ClassVar[bool] = False  # True where the policy adds observations, see `wrap_env`
    reads_step: bool = (
        False  # True where actions depend on the step within the episode: obs[EPISODE_STEP] (B,)
    )
    capturable: ClassVar[bool] = (
        True  # False where its networks work on the host: no CUDA graphs, no torch.compile
    )
    discrete: ClassVar[bool] = False  # True where it chooses among `Spec.choices` actions
    shards: Any = None  # `robopost.nets.sharded.Sharded` where its weights are spread over processes
    own_keys: ClassVar[tuple[str, ...]] = ()  # the observations it adds, which no environment has to offer

    def __init__(self, config: Any, spec: Spec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        if bool(spec.choices) != self.discrete:
            offered = f"{spec.choices} discrete" if spec.choices else f"{spec.action_dim} continuous"
            fix = "policy=categorical with algo=ppo or algo=props" if spec.choices else "policy=gaussian"
            raise ConfigError(
                f"policy={self.registry_name} can't act where there are {offered} actions. Fix: {fix}"
            )
        self.horizon: int = int(getattr(config, "horizon", 1))
        self.execute: int = int(getattr(config, "execute", 0)) or self.horizon
        self.history: int = int(getattr(config, "history", 1))
        for name in ("horizon", "history"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy.{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.execute <= self.horizon:
            raise ConfigError(
                f"policy.execute={self.execute} must lie in 1..{self.horizon} (policy.horizon). "
                "Fix: lower execute or raise horizon"
            )
        keys = list(getattr(config, "obs_keys", None) or spec.obs)
        missing = [key for key in keys if key not in spec.obs]
        if missing:
            raise ConfigError(
                f"policy.obs_keys names {missing[0]!r}, the environment or dataset offers {', '.join(spec.obs)}"
            )
        self.obs_keys: list[str] = keys
        self.normaliser = Normaliser(spec)

    @abstractmethod
    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Draw a chunk for normalised observations.

        Returns:
            (chunk (B, H, A) normalised, log_prob (B,) or None, chain (B, K, H, A) or None).
        """

    def log_prob(self, obs: Obs, chain: Tensor) -> Tensor:
        """Log-probability (B,) of `chain` (B, K, H, A) given normalised observations, differentiable.

        Raises:
            ConfigError: the policy class has no log-probability (`has_log_prob` is False).
        """
        raise ConfigError(
            f"policy {self.registry_name!r} has no log-probability, which this algorithm needs. "
            f"Policies that have one: {', '.join(e.name for e in POLICIES if e.target.has_log_prob)}"
        )

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Behaviour-cloning loss of this policy class, a scalar.

        Args:
            obs: normalised observations.
            chunk: (B, H, A) normalised demonstrated actions.
            mask: (B, H) bool, False on padding, which must not contribute.
            generator: source of the loss's own randomness (flow time, diffusion step).
        """
        raise ConfigError(
            f"policy={self.registry_name} can't be trained by behaviour cloning. "
            "Fix: policy=deterministic, gaussian, flow or diffusion"
        )

    @torch.no_grad()
    def act(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> Action:
        """Raw observations (B, ...) on the policy's device to an `Action` in environment units."""
        if len(self.obs_keys) < len(self.spec.obs):
            # What it doesn't read may have another shape here than where it was trained.
            known = self.spec.obs
            obs = {key: value for key, value in obs.items() if key in self.obs_keys or key not in known}
        chunk, log_prob, chain = self.sample(
            self.normaliser.obs(obs), generator=generator, deterministic=deterministic
        )
        return Action(self.normaliser.unnormalise_action(chunk), log_prob, chain)

    def random_action(self, obs: Obs, generator: torch.Generator) -> Tensor:
        """Uniform action (B, A) in environment units for warm-up, given raw observations."""
        low, high = self.normaliser.action_low, self.normaliser.action_high
        rows = next(iter(obs.values())).shape[0]
        noise = torch.rand(rows, len(low), generator=generator, device=low.device)
        return low + (high - low) * noise

    def blocks(self) -> list[nn.Module]:
        """Large layers that run one after another, each through `forward` or a method `run`.

        Where the policy is spread over processes, they are put together one at a time; all else once per loss.
        """
        return []

    def wrap_env(self, env: VecEnv) -> VecEnv:
        """Wrap a `VecEnv` so that its observations hold what `sample` needs beyond the environment's own."""
        return env

    def label_demos(self, demos: Dataset) -> Dataset:
        """Add to a `Dataset` of demonstrations what `wrap_env` adds to observations."""
        return demos

    @property
    def device(self) -> torch.device:
        """Device of the policy's parameters (or buffers, for a policy that has none)."""
        # Lazily: listing all of them takes longer than a small network's forward pass.
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")


def build_policy(config: Any, spec: Spec) -> Policy:
    """Build the policy that `config.name` selects for `spec`; weights come from torch's global generator."""
    return POLICIES.get(config.name).target(config, spec)
