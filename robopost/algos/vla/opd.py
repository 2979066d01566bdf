# SPDX-License-Identifier: Apache-2.0
"""VLA-OPD: on-policy distillation, the student acts and a frozen teacher scores what it did (arXiv 2603.26666).

Options of the one objective: exact or sampled reverse KL, other divergences, a GRPO term, reward extrapolation
(G-OPD / ExOPD), routing by outcome (SCOPE, Uni-OPD). Flow policies are distilled along their own noisy chain
(`flow_opd.py`, experimental).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.algos.base import Metrics
from robopost.algos.vla.distill import (
    DTYPES,
    DistillConfig,
    initial_copy,
    load_reference,
    slot_losses,
    slot_metrics,
)
from robopost.algos.vla.flow_opd import FlowDistiller
from robopost.algos.vla.frame import Decisions, EpisodeAlgorithm, score, score_taken, set_temperature
from robopost.algos.vla.grpo import OutcomeConfig, outcome_columns, outcome_loss
from robopost.algos.vla.objectives import (
    episode_means,
    exact_loss,
    later_sum,
    margin_shift,
    reward_gap,
    scope_weights,
    slot_mean,
    truncated_ratio,
)
from robopost.algos.vla.teachers import Play, Teacher
from robopost.data.batch import Batch, Obs, Spec, below
from robopost.errors import ConfigError, unknown
from robopost.policies.base import Action, Policy
from robopost.policies.chain import ChainPolicy
from robopost.policies.tokens import TokenPolicy, taken
from robopost.registry import ALGOS

log = logging.getLogger(__name__)
ROUTINGS = ("none", "scope", "uni_opd")
FAR = 10.0  # |log pi_T - log pi| beyond which Uni-OPD leaves a token out


@dataclass
class VLAOPDConfig(DistillConfig, OutcomeConfig):
    """Config of `VLAOPD`."""

    name: str = "vla_opd"
    group: int = 1
    lambda_opd: float = 1.0
    lambda_outcome: float = 0.0  # of the GRPO term, 0 = none
    routing: str = "none"  # none | scope: successes imitate themselves | uni_opd: outcomes shift the reward
    routing_temperature: float = 1.0  # tau of scope
    margin: float = 0.4  # delta of uni_opd
    return_to_go: bool = False  # count what a token does to the KL of later ones
    is_cap: float = 5.0  # of pi / pi_old of tokens that are used again, 0 = no ratio
    check_teacher: int = 20  # greedy episodes it has to show a success in before training, 0 = no check
    flow_noise: float = 0.1  # flow policies: std of the noise in every step of the student's chain

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        if self.routing not in ROUTINGS:
            raise unknown("algo.routing", self.routing, ROUTINGS)
        for name in ("lambda_opd", "lambda_outcome", "margin", "is_cap", "check_teacher"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")
        if not self.lambda_opd + self.lambda_outcome > 0:
            raise ConfigError("algo.lambda_opd=0 and algo.lambda_outcome=0 leave nothing to learn from")
        for name in ("routing_temperature", "flow_noise"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        if self.lambda_outcome:
            self.needs_groups(f"algo.lambda_outcome={self.lambda_outcome}")
        if self.routing != "none":
            self.needs_groups(f"algo.routing={self.routing}")
        for name, on in (
            ("return_to_go=true", self.return_to_go),
            ("routing=uni_opd", self.routing == "uni_opd"),
        ):
            if on and self.divergence != "reverse":
                raise ConfigError(
                    f"algo.{name} is a reward of the reverse KL, algo.divergence={self.divergence}. "
                    "Fix: algo.divergence=reverse"
                )


@ALGOS.register("vla_opd", config=VLAOPDConfig)
class VLAOPD(EpisodeAlgorithm):
    """On-policy distillation of token policies (and, experimentally, of flow policies) from a frozen teacher."""

    registry_name = "vla_opd"
    config: VLAOPDConfig

    def __init__(
        self,
        config: VLAOPDConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self._teacher = Teacher.load("algo.teacher", config.teacher, policy, spec, device)
        super().__init__(config, policy, spec, device=device, generator=generator)
        self.initial = initial_copy(policy) if config.reference == "student_init" else None
        self._reference = load_reference(config.reference, self.initial, policy, spec, device)
        self._flow = None
        if isinstance(policy, ChainPolicy):
            self._flow = FlowDistiller(config, policy, self._teacher)
            return
        assert isinstance(policy, TokenPolicy)  # the teacher's check let nothing else through
        set_temperature(policy, config.temperature)
        for frozen in (self._teacher, self._reference):
            if frozen is not None:
                set_temperature(frozen.tokens, policy.temperature)

    @property
    def _student(self) -> TokenPolicy:
        assert isinstance(self.policy, TokenPolicy)
        return self.policy

    def before_rollouts(self, play: Play) -> None:
        """Refuse a teacher that never succeeds here."""
        self._teacher.check_success(play, self.config.check_teacher)

    def decide(self, obs: Obs, generator: torch.Generator) -> Action:
        """The policy's own sample; of a flow policy one along a noisy chain."""
        return super().decide(obs, generator) if self._flow is None else self._flow.decide(obs, generator)

    def update(self, batch: Batch) -> Metrics:
        """See `EpisodeAlgorithm.update`."""
        if self.updates == 0 and batch.extra is not None and not bool(batch.extra["success"].any()):
            log.warning(
                "no episode of the first rollout succeeds: a student at 0 % rarely reaches states where the teacher's "
                "advice matters. Fix: more demonstrations before distilling, or a larger algo.group x algo.episodes"
            )
        return super().update(batch)

    def prepare(self, rows: Decisions) -> tuple[dict[str, Tensor], Metrics]:
        """Log-probabilities of the teacher, and of the student where tokens are weighed or used again."""
        metrics: Metrics = {"data/valid": rows.mask.float().mean(), "data/success": rows.success.mean()}
        if self._flow is not None:
            return rows.columns() | self._flow.columns(rows), metrics
        cfg, policy = self.config, self._student
        data = rows.columns() | {"tokens": rows.tokens}
        data["teacher"] = self._scored(self._teacher, rows)
        if self._reference is not None:
            data["reference"] = self._scored(self._reference, rows)
        if cfg.return_to_go or cfg.routing != "none" or cfg.lambda_outcome or cfg.kl_estimator == "sample":
            data["old"] = score_taken(policy, rows.obs, rows.tokens)
        if cfg.return_to_go:
            data["bonus"] = self._later_reward(rows, data)
        if cfg.routing == "scope":
            metrics |= self._route(rows, data)
        elif cfg.routing == "uni_opd":
            metrics |= self._shift(rows, data)
        if cfg.lambda_outcome:
            columns, found = outcome_columns(rows, cfg)
            data |= columns
            metrics |= found
        return data, metrics

    def _scored(self, frozen: Teacher, rows: Decisions) -> Tensor:
        log_probs = score(frozen.tokens, frozen.observes(rows.obs), rows.tokens)
        return log_probs.to(DTYPES[self.config.teacher_dtype])

    def _later_reward(self, rows: Decisions, data: dict[str, Tensor]) -> Tensor:
        """Reward (n, H, A) that follows each token in its episode, of the policy that drew it."""
        cfg, policy = self.config, self._student
        student = score(policy, rows.obs, rows.tokens)
        reference = data["reference"].float() if "reference" in data else None
        gap = reward_gap(student, data["teacher"].float(), reference, cfg.reward_scale, cfg.log_ratio_clamp)
        own = exact_loss(student, gap) if cfg.kl_estimator == "exact" else taken(gap, rows.tokens)
        reward = torch.where(data["valid"], -own, torch.zeros_like(own))
        episodes = len(rows.success)
        at = rows.depth * episodes + rows.episode
        grid = reward.new_zeros((rows.longest * episodes, *reward.shape[1:])).index_copy(0, at, reward)
        later = later_sum(grid.unflatten(0, (rows.longest, episodes)), policy.autoregressive)
        return later.flatten(0, 1)[at]

    def _route(self, rows: Decisions, data: dict[str, Tensor]) -> Metrics:
        """SCOPE: successes imitate themselves, failures are distilled, each by its weight."""
        cfg, solved = self.config, rows.success > 0
        teacher = taken(data["teacher"].float(), rows.tokens)
        own, count = episode_means(data["old"], data["valid"], rows.episode, len(solved))
        theirs, _ = episode_means(teacher, data["valid"], rows.episode, len(solved))
        weight = scope_weights(own, theirs, solved, cfg.group, cfg.routing_temperature)
        # Per token, so that the mean over all valid slots is the mean over groups of the weighted episodes.
        per_slot = weight / count.clamp_min(1) * count.sum() * (cfg.group / len(solved))
        data["weight"] = per_slot[rows.episode][:, None, None]
        data["imitate"] = solved[rows.episode]
        return {"data/imitated": solved.float().mean()}

    def _shift(self, rows: Decisions, data: dict[str, Tensor]) -> Metrics:
        """Uni-OPD: successes and failures of a group are moved apart; tokens far from the teacher are left out."""
        cfg, solved = self.config, rows.success > 0
        reward = taken(data["teacher"].float(), rows.tokens) - data["old"]
        data["valid"] = data["valid"] & (reward.abs() <= FAR)
        mean, _ = episode_means(reward, data["valid"], rows.episode, len(solved))
        shift = margin_shift(mean, solved, cfg.group, cfg.margin)
        bonus = shift[rows.episode][:, None, None].expand_as(reward)
        data["bonus"] = data["bonus"] + bonus if "bonus" in data else bonus
        return {"data/shift": shift.abs().mean()}

    def loss(self, rows: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        """lambda_opd L_OPD + lambda_outcome L_GRPO (VLA-OPD), both means over valid slots."""
        if self._flow is not None:
            return self._flow.loss(rows)
        cfg, policy = self.config, self._student
        tokens, valid = rows["tokens"], rows["valid"]
        log_probs = policy.log_probs(below(rows, "obs/"), tokens).float()
        log_prob = taken(log_probs, tokens)
        ratio: Tensor | float = 1.0
        if cfg.is_cap and "old" in rows:
            ratio = truncated_ratio(log_prob, rows["old"], cfg.is_cap)
        slots = slot_losses(cfg, log_probs, rows, ratio)
        if "imitate" in rows:
            slots = torch.where(rows["imitate"][:, None, None], -log_prob, slots)
        distance = slot_mean(slots, valid, rows.get("weight"))
        metrics = {"loss/opd": distance.detach()}
        loss = cfg.lambda_opd * distance
        if cfg.lambda_outcome:
            outcome, found = outcome_loss(log_prob, rows, cfg)
            loss = loss + cfg.lambda_outcome * outcome
            metrics |= found
        return loss, metrics | slot_metrics(log_probs.detach(), rows["teacher"], tokens, valid)
