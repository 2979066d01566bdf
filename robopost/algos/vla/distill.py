# SPDX-License-Identifier: Apache-2.0
"""The objective of on-policy distillation and its options, shared by the online and the cached form."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.algos.base import Metrics
from robopost.algos.vla.objectives import (
    entropy,
    exact_loss,
    hard_cross_entropy,
    jensen_shannon,
    kl,
    restrict,
    reward_gap,
    sampled_loss,
    slot_mean,
)
from robopost.algos.vla.teachers import Teacher
from robopost.data.batch import Spec
from robopost.errors import ConfigError, unknown
from robopost.policies.base import Policy
from robopost.policies.tokens import taken

ESTIMATORS = ("exact", "sample")
DIVERGENCES = ("reverse", "forward", "hard_ce", "jsd")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class DistillConfig:
    """What the online and the cached form share."""

    teacher: str = ""  # run folder, checkpoint or policy folder of the frozen expert
    kl_estimator: str = "exact"  # exact: over all bins of a slot | sample: the taken token alone
    control_variate: bool = False  # sample: subtract the reward's mean, which the bins give exactly
    divergence: str = "reverse"  # reverse | forward | hard_ce | jsd
    jsd_beta: float = 0.5  # of jsd: 0 = forward KL, 1 = reverse KL
    top_k: int = 0  # compare on the teacher's k likeliest bins, renormalised; 0 = on all
    reward_scale: float = 1.0  # lambda of ExOPD: 1 = the teacher, above it beyond the teacher
    reference: str = "none"  # of ExOPD: none | student_init | a path as `teacher`
    log_ratio_clamp: float = 10.0  # bound of log pi_T - log pi_ref where it is extrapolated, inf = none
    teacher_dtype: str = "float32"  # in which its log-probabilities are kept: float32 | float16 | bfloat16

    def check(self) -> None:
        """Raise ConfigError where values are out of range or make no sense together."""
        for name, allowed in (
            ("kl_estimator", ESTIMATORS),
            ("divergence", DIVERGENCES),
            ("teacher_dtype", tuple(DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(f"algo.{name}", getattr(self, name), allowed)
        if not 0 <= self.jsd_beta <= 1:
            raise ConfigError(f"algo.jsd_beta={self.jsd_beta} must lie in [0, 1]")
        if self.top_k < 0 or self.top_k == 1:
            raise ConfigError(f"algo.top_k={self.top_k} must be 0 (all bins) or at least 2")
        if self.reward_scale < 0:
            raise ConfigError(f"algo.reward_scale={self.reward_scale} must be 0 or more")
        if not self.log_ratio_clamp > 0:
            raise ConfigError(f"algo.log_ratio_clamp={self.log_ratio_clamp} must be above 0, inf = none")
        sampled = self.kl_estimator == "sample"
        if self.control_variate and not sampled:
            raise ConfigError(
                "algo.control_variate=true takes noise out of algo.kl_estimator=sample; the exact estimator has none. "
                "Fix: drop one of them"
            )
        if sampled and self.top_k:
            raise ConfigError(
                f"algo.top_k={self.top_k}: the taken token needn't be among the teacher's {self.top_k} likeliest. "
                "Fix: algo.kl_estimator=exact, or algo.top_k=0"
            )
        if self.divergence != "reverse":
            for name, asked in (
                ("kl_estimator=sample", sampled),
                (f"reward_scale={self.reward_scale}", self.reward_scale != 1.0),
            ):
                if asked:
                    raise ConfigError(
                        f"algo.{name} is an option of the reverse KL, algo.divergence={self.divergence}. "
                        "Fix: algo.divergence=reverse"
                    )
        if (self.reward_scale != 1.0) != (self.reference != "none"):
            raise ConfigError(
                f"algo.reward_scale={self.reward_scale} with algo.reference={self.reference}: the scale stretches the "
                "way from the reference to the teacher, and scale 1 ends at the teacher whatever the reference. "
                "Fix: set both (algo.reference=student_init algo.reward_scale=1.25), or neither"
            )


def slot_losses(
    config: DistillConfig,
    log_probs: Tensor,
    rows: dict[str, Tensor],
    ratio: Tensor | float = 1.0,
) -> Tensor:
    """The configured objective of every slot, (B, H, A).

    Args:
        config: which one.
        log_probs: (B, H, A, bins) of the student.
        rows: `teacher` (B, H, A, bins) and `tokens` (B, H, A); `reference` (B, H, A, bins) where there is one, and
            `bonus` (B, H, A), a further reward of the taken tokens.
        ratio: (B, H, A) weights of taken tokens that an older policy drew.
    """
    cfg, student, teacher = config, log_probs, rows["teacher"].float()
    reference = rows["reference"].float() if "reference" in rows else None
    if cfg.top_k:
        index = teacher.topk(cfg.top_k, -1).indices
        if reference is not None:
            (reference,) = restrict(index, reference)
        student, teacher = restrict(index, student, teacher)
    if cfg.divergence == "forward":
        return kl(teacher, student)
    if cfg.divergence == "hard_ce":
        return hard_cross_entropy(student, teacher)
    if cfg.divergence == "jsd":
        return jensen_shannon(student, teacher, cfg.jsd_beta)
    gap = reward_gap(student, teacher, reference, cfg.reward_scale, cfg.log_ratio_clamp)
    if cfg.kl_estimator == "exact":
        loss = exact_loss(student, gap)
    else:
        reward = -taken(gap, rows["tokens"])
        if cfg.control_variate:
            reward = reward + (student.exp() * gap).sum(-1)
        loss = sampled_loss(taken(student, rows["tokens"]), reward, ratio)
    if "bonus" in rows:
        loss = loss + sampled_loss(taken(log_probs, rows["tokens"]), rows["bonus"], ratio)
    return loss


@torch.no_grad()
def slot_metrics(log_probs: Tensor, teacher: Tensor, tokens: Tensor, valid: Tensor) -> Metrics:
    """Distance to the teacher, entropy, also of every action dimension, and what the teacher thinks of the tokens."""
    teacher = teacher.float()
    spread = entropy(log_probs)
    metrics = {
        "policy/kl_teacher": slot_mean(kl(log_probs, teacher), valid),
        "policy/teacher_log_prob": slot_mean(taken(teacher, tokens), valid),
        "policy/entropy": slot_mean(spread, valid),
    }
    for index, (value, there) in enumerate(zip(spread.unbind(-1), valid.unbind(-1), strict=True)):
        metrics[f"policy/entropy_dim{index}"] = slot_mean(value, there)
    return metrics


def initial_copy(policy: Policy) -> Policy:
    """The student as it is now, frozen: the reference `student_init`."""
    initial = copy.deepcopy(policy) if policy.shards is None else policy.shards.everywhere(policy)
    return initial.eval().requires_grad_(False)


def load_reference(
    name: str, initial: Policy | None, policy: Policy, spec: Spec, device: torch.device
) -> Teacher | None:
    """The reference of ExOPD: None, the `initial` student, or the policy at a path."""
    if name == "none":
        return None
    if initial is not None:
        return Teacher(initial, policy, f"algo.reference={name}")
    return Teacher.load("algo.reference", name, policy, spec, device)
