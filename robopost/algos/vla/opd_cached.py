# SPDX-License-Identifier: Apache-2.0
"""Distillation from recorded rollouts of the student, scored by the teacher once (Lightning OPD)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.algos.vla.distill import (
    DTYPES,
    DistillConfig,
    initial_copy,
    load_reference,
    slot_losses,
    slot_metrics,
)
from robopost.algos.vla.frame import SCORED, StepConfig, set_temperature, tokens_only
from robopost.algos.vla.objectives import slot_mean
from robopost.algos.vla.teachers import Teacher
from robopost.data.batch import Batch, Spec, below
from robopost.data.dataset import Dataset
from robopost.errors import DataError
from robopost.nets.flat import adam, flat_of
from robopost.policies.base import Policy
from robopost.policies.tokens import TokenPolicy
from robopost.registry import ALGOS

log = logging.getLogger(__name__)
OFF_CENTRE = 0.02  # of a bin's width: recorded actions that a token policy wrote lie closer to the centre


@dataclass
class CachedOPDConfig(DistillConfig, StepConfig):
    """Config of `CachedOPD`."""

    name: str = "vla_opd_cached"
    teacher_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()


@ALGOS.register("vla_opd_cached", config=CachedOPDConfig)
class CachedOPD(Algorithm):
    """Distillation of a token policy on recorded rollouts, with the teacher's log-probabilities computed once."""

    registry_name = "vla_opd_cached"
    regime = "offline"
    steps = ("fit",)
    sharded_by = ("log_probs",)
    stackable = False  # the cached scores are indexed by the step a sample begins at
    config: CachedOPDConfig
    policy: TokenPolicy

    def __init__(
        self,
        config: CachedOPDConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        student = tokens_only(policy, "vla_opd_cached")
        self._teacher = Teacher.load("algo.teacher", config.teacher, policy, spec, device)
        self.initial = initial_copy(policy) if config.reference == "student_init" else None
        self._reference = load_reference(config.reference, self.initial, policy, spec, device)
        set_temperature(student, config.temperature)
        for frozen in (self._teacher, self._reference):
            if frozen is not None:
                set_temperature(frozen.tokens, student.temperature)
        self._flat = flat_of(policy)
        self.optimizer = adam(
            self._flat, config.lr, weight_decay=config.weight_decay, decoupled_weight_decay=True
        )
        self._scores: dict[str, Tensor] = {}  # by step of the dataset; no state

    @property
    def needs(self) -> Needs:
        """Chunks of recorded actions, and where in the dataset they begin."""
        return Needs(chunks=True, batch_size=self.config.batch_size, extra=("step",))

    @torch.no_grad()
    def attach(self, dataset: Dataset) -> None:
        """Score the chunks of all recorded steps.

        Raises:
            DataError: sampled or autoregressive scores are asked for, and the recorded actions are not what a token
                policy with this normaliser writes.
        """
        frozen = {"teacher": self._teacher} | (
            {} if self._reference is None else {"reference": self._reference}
        )
        found: dict[str, list[Tensor]] = {name: [] for name in frozen}
        by_token = self.config.kl_estimator == "sample" or self.policy.autoregressive
        by_token |= any(item.tokens.autoregressive for item in frozen.values())
        for steps in torch.arange(dataset.num_steps, device=dataset.action.device).split(SCORED):
            batch = dataset.chunks_at(steps, self.policy.horizon, history=self.policy.history)
            tokens = self.policy.encode(batch.action)
            if by_token:
                self._check_centred(batch, tokens, dataset)
            for name, item in frozen.items():
                log_probs = item.tokens.log_probs(item.observes(batch.obs), tokens)
                found[name].append(log_probs.to(DTYPES[self.config.teacher_dtype]))
        self._scores = {name: torch.cat(parts) for name, parts in found.items()}
        if self.config.kl_estimator == "sample":
            within = torch.cat([torch.arange(int(n)) for n in dataset.lengths])
            self._scores["first"] = (within % self.policy.execute == 0).to(self.device)
        size = sum(item.numel() * item.element_size() for item in self._scores.values())
        log.info("scored %d recorded steps, %.0f MB", dataset.num_steps, size / 1e6)

    def _check_centred(self, batch: Batch, tokens: Tensor, dataset: Dataset) -> None:
        width = 2.0 / (self.policy.bins - 1)
        off = ((self.policy.decode(tokens) - batch.action).abs() / width).amax()
        if off > OFF_CENTRE:
            raise DataError(
                f"{dataset.dataset_id} holds actions {float(off):.2f} of a bin away from a bin's centre: they are not "
                "tokens of this student. Fix: record its rollouts (robopost collect policy=<student>), or with a "
                "parallel policy algo.kl_estimator=exact"
            )

    def update(self, batch: Batch) -> Metrics:
        """One gradient step on chunks (B, H, A) in normalised units."""
        assert batch.extra is not None
        assert batch.chunk_mask is not None
        tokens = self.policy.encode(batch.action)
        valid = batch.chunk_mask.unsqueeze(-1).expand_as(tokens)
        scores = {key: value.index_select(0, batch.extra["step"]) for key, value in self._scores.items()}
        if "first" in scores:
            # Only where a decision began was the whole chunk drawn for this observation.
            valid = valid & scores.pop("first")[:, None, None]
        rows = {f"obs/{key}": value for key, value in batch.obs.items()} | scores
        self.updates += 1
        return self.fit(rows | {"tokens": tokens, "valid": valid})

    def fit(self, rows: dict[str, Tensor]) -> Metrics:
        """One step of AdamW; a pure function of tensors."""
        log_probs = self.policy.log_probs(below(rows, "obs/"), rows["tokens"]).float()
        metrics = {"loss/opd": slot_mean(slot_losses(self.config, log_probs, rows), rows["valid"])}
        metrics |= slot_metrics(log_probs.detach(), rows["teacher"], rows["tokens"], rows["valid"])
        metrics = self._flat.share(metrics, rows["valid"])
        loss = metrics.pop("loss/opd")
        self._flat.backward(loss)
        norm = self._flat.clip(self.config.max_grad_norm)
        self.optimizer.step()
        return metrics | {"loss/opd": loss.detach(), "grad/norm": norm}
