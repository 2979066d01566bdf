# SPDX-License-Identifier: Apache-2.0
"""The frame of methods that learn from whole episodes of executed chunks: rows of decisions, epochs, one optimiser."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.accel import resolve
from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.algos.generative.chunk_ppo import blocks
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Obs, Spec, below
from robopost.errors import ConfigError, DataError
from robopost.nets.flat import adam, flat_of
from robopost.policies.base import Policy
from robopost.policies.tokens import TokenPolicy, taken

SCORED = 512  # decisions, or steps of a dataset, whose log-probabilities are evaluated at once


@dataclass
class StepConfig(AlgoConfig):
    """What the configs of all gradient steps on token policies share."""

    batch_size: int = 128  # decisions of a minibatch
    lr: float = 3e-4
    weight_decay: float = 0.01  # decoupled
    max_grad_norm: float = 1.0
    temperature: float = 0.0  # of sampling and of every log-probability, teachers' too; 0 = the policy's own

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"algo.batch_size={self.batch_size} must be at least 1")
        for name in ("lr", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        for name in ("weight_decay", "temperature"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")


@dataclass
class EpisodesConfig(StepConfig):
    """What the configs of methods that learn from whole episodes share; minibatches split an epoch evenly."""

    episodes: int = 1  # per environment and rollout
    group: int = 8  # neighbouring environments that play the same episode, a divisor of env.num_envs
    epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("episodes", "group", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be at least 1")


@dataclass
class Decisions:
    """The n executed decisions of a rollout.

    Attributes:
        obs: normalised observations (n, ...).
        chain: what the policy sampled, see `Action.chain`; (n, K, H, A).
        mask: (n, H) bool, steps that were executed.
        episode: (n,) which of the M episodes a decision belongs to.
        depth: (n,) its place in it.
        success: (M,) outcome of the episodes, 0 or 1.
        returns: (M,) sum of their rewards.
        longest: decisions of the longest episode.
    """

    obs: Obs
    chain: Tensor
    mask: Tensor
    episode: Tensor
    depth: Tensor
    success: Tensor
    returns: Tensor
    longest: int

    @property
    def tokens(self) -> Tensor:
        """(n, H, A) bins of a token policy."""
        return self.chain[:, 0]

    @property
    def valid(self) -> Tensor:
        """(n, H, A) bool, slots of executed steps."""
        return self.mask.unsqueeze(-1).expand(-1, -1, self.chain.shape[-1])

    def columns(self) -> dict[str, Tensor]:
        """What every loss needs: `obs/*` and `valid`."""
        return {f"obs/{key}": value for key, value in self.obs.items()} | {"valid": self.valid}

    def __len__(self) -> int:
        return len(self.mask)

    def keep(self, rows: Tensor) -> Decisions:
        """The decisions where `rows` (n,) bool is True."""
        at = torch.nonzero(rows).flatten()
        pick = lambda tensor: tensor.index_select(0, at)  # noqa: E731
        return Decisions(
            {key: pick(value) for key, value in self.obs.items()},
            pick(self.chain),
            pick(self.mask),
            pick(self.episode),
            pick(self.depth),
            self.success,
            self.returns,
            self.longest,
        )

    @classmethod
    def of(cls, batch: Batch) -> Decisions:
        """The decisions of a rollout (D, M) that executed anything.

        Raises:
            DataError: the rollout has no chains, masks or outcomes.
        """
        if batch.chain is None or batch.chunk_mask is None or "success" not in (batch.extra or {}):
            raise DataError(
                "a rollout of whole episodes with chain, chunk_mask and extra['success'] is needed"
            )
        assert batch.extra is not None
        deep, episodes = batch.chunk_mask.shape[:2]
        device = batch.chunk_mask.device
        rows = cls(
            {key: value.flatten(0, 1) for key, value in batch.obs.items()},
            batch.chain.flatten(0, 1),
            batch.chunk_mask.flatten(0, 1),
            torch.arange(episodes, device=device).repeat(deep),
            torch.arange(deep, device=device).repeat_interleave(episodes),
            batch.extra["success"][0],
            batch.extra["return"][0],
            deep,
        )
        return rows.keep(rows.mask.any(-1))  # the one wait for the device in a rollout


class EpisodeAlgorithm(Algorithm):
    """AdamW on minibatches of decisions. Subclasses say what a minibatch needs and what its loss is."""

    regime = "onpolicy"
    steps = ("minibatch_step",)
    sharded_by = ("log_probs",)
    config: EpisodesConfig

    def __init__(
        self,
        config: EpisodesConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        self._flat = flat_of(policy)
        self.optimizer = adam(
            self._flat, config.lr, weight_decay=config.weight_decay, decoupled_weight_decay=True
        )
        self._one_shape = False  # minibatches must all have `batch_size` rows

    @property
    def needs(self) -> Needs:
        """Whole episodes of executed chunks."""
        cfg = self.config
        return Needs(chunks=True, batch_size=cfg.batch_size, episodes=cfg.episodes, group=cfg.group)

    def accelerate(self, mode: str) -> None:
        """See `Algorithm.accelerate`."""
        self._one_shape = resolve(mode, self.device) != "eager"
        super().accelerate(mode)

    @abstractmethod
    def prepare(self, rows: Decisions) -> tuple[dict[str, Tensor], Metrics]:
        """What `loss` needs of the rollout's decisions, evaluated before the first step; no gradients.

        Returns:
            (columns of n rows, which may be fewer than the rollout's: `obs/*`, `valid` (n, H, A) bool, more; metrics).
        """

    @abstractmethod
    def loss(self, rows: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Loss of a minibatch of `prepare`'s columns and detached metrics; a pure function of tensors."""

    def update(self, batch: Batch) -> Metrics:
        """All epochs over one rollout of whole episodes (D, M)."""
        cfg = self.config
        rows = Decisions.of(batch)
        with self.whole_policy():
            data, metrics = self.prepare(rows)
        self.updates += 1
        total = len(data["valid"])
        sums: Metrics = {}
        count = 0
        for _ in range(cfg.epochs):
            for part in self._minibatches(data, total):
                for key, value in self.minibatch_step(part).items():
                    sums[key] = sums[key] + value if key in sums else value
                count += 1
        return metrics | {key: value / count for key, value in sums.items()}

    def _minibatches(self, data: dict[str, Tensor], total: int) -> list[dict[str, Tensor]]:
        """The rows in random order, in parts of nearly one size; none where there are no rows.

        Steps that are compiled or captured get `batch_size` rows each, filled up with rows that count for nothing.
        Processes that train together take equally many parts: one that has too few rows for it fills up likewise.
        """
        parts = self._flat.most(-(-total // (self.config.batch_size // self._flat.processes)))
        if not parts:
            return []
        order = torch.randperm(total, generator=self.generator, device=self.device)
        found = []
        for chosen in order.tensor_split(parts):
            rows = {key: value.index_select(0, chosen) for key, value in data.items()}
            if not len(chosen):
                rows = {key: value.new_zeros(1, *value.shape[1:]) for key, value in data.items()}
            missing = self.config.batch_size - len(chosen)
            if self._one_shape and missing:
                rows = {
                    key: torch.cat([value, value[:1].expand(missing, *value.shape[1:])])
                    for key, value in rows.items()
                }
                rows["valid"][len(chosen) :] = False
            found.append(rows)
        return found

    def minibatch_step(self, rows: dict[str, Tensor]) -> Metrics:
        """One gradient step; a pure function of the minibatch."""
        loss, metrics = self.loss(rows)
        metrics = self._flat.share(metrics | {"whole": loss}, rows["valid"])
        self._flat.backward(metrics.pop("whole"))
        norm = self._flat.clip(self.config.max_grad_norm)
        self.optimizer.step()
        return metrics | {"grad/norm": norm}


def tokens_only(policy: Policy, algo: str) -> TokenPolicy:
    """`policy`, which has to be a token policy.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(policy, TokenPolicy):
        raise ConfigError(
            f"algo={algo} fine-tunes a token policy, policy={policy.registry_name} is none. "
            "Fix: policy=pretrained policy.path=<run of a token policy>, or policy=token"
        )
    return policy


def set_temperature(policy: TokenPolicy, temperature: float) -> None:
    """Sample and score at `temperature` from now on, in what is exported too; 0 changes nothing."""
    if temperature:
        policy.temperature = policy.config.temperature = temperature


@torch.no_grad()
def score(policy: TokenPolicy, obs: Obs, tokens: Tensor) -> Tensor:
    """Log-probabilities (n, H, A, bins) of a whole rollout in float32, in blocks."""
    rows = {f"obs/{key}": value for key, value in obs.items()} | {"tokens": tokens}
    parts = blocks(rows, SCORED)
    return torch.cat([policy.log_probs(below(part, "obs/"), part["tokens"]).float() for part in parts])


@torch.no_grad()
def score_taken(policy: TokenPolicy, obs: Obs, tokens: Tensor) -> Tensor:
    """Log-probabilities (n, H, A) of `tokens` of a whole rollout in float32, in blocks."""
    rows = {f"obs/{key}": value for key, value in obs.items()} | {"tokens": tokens}
    parts = blocks(rows, SCORED)
    found = [taken(policy.log_probs(below(p, "obs/"), p["tokens"]).float(), p["tokens"]) for p in parts]
    return torch.cat(found)
