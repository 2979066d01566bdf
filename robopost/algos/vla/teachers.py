# SPDX-License-Identifier: Apache-2.0
"""Frozen policies that score what another one did: loading them, and checking that their numbers can be compared."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.norm import Normaliser
from robopost.policies.base import Policy
from robopost.policies.chain import ChainPolicy
from robopost.policies.diffusion import Diffusion
from robopost.policies.pretrained import load_pretrained
from robopost.policies.tokens import TokenPolicy

log = logging.getLogger(__name__)
Play = Callable[[Policy, int], float | None]


class Teacher:
    """A frozen policy beside the trained one. No module: its weights belong to no checkpoint of the student.

    Args:
        policy: the frozen policy.
        student: whose normalised observations it will be shown.
        what: names it in errors, e.g. `algo.teacher=runs/x`.

    Raises:
        ConfigError: its log-probabilities can't be compared with the student's.
    """

    def __init__(self, policy: Policy, student: Policy, what: str) -> None:
        check_comparable(policy, student, what)
        self.policy = policy.eval().requires_grad_(False)
        self.what = what
        self._student = student.normaliser

    @classmethod
    def load(cls, key: str, path: str, student: Policy, spec: Spec, device: torch.device) -> Teacher:
        """The policy at `path`, which the config's `key` names.

        Raises:
            ConfigError: no path; made for another task; not comparable with `student`.
            CheckpointError: nothing usable at the path.
        """
        what = f"{key}={path}"
        if not path:
            raise ConfigError(
                f"{key} is empty. Fix: {key}=<run folder, checkpoint or policy folder of the teacher>"
            )
        return cls(load_pretrained(path, spec, device, what=what), student, what)

    @property
    def tokens(self) -> TokenPolicy:
        """The policy, where it is a token policy."""
        assert isinstance(self.policy, TokenPolicy)
        return self.policy

    def observes(self, obs: Obs) -> Obs:
        """What the student's normaliser gave for observations, as the teacher's own gives it."""
        return translated(obs, self._student, self.policy.normaliser)

    def check_success(self, play: Play, episodes: int) -> None:
        """Play `episodes` greedy ones; silent where the task has no success predicate.

        Raises:
            ConfigError: none succeeds: there is nothing to learn from this teacher here.
        """
        if not episodes:
            return
        success = play(self.policy, episodes)
        if success == 0.0:
            raise ConfigError(
                f"{self.what} succeeds in 0 of {episodes} greedy episodes here: its advice leads nowhere. "
                "Fix: a teacher trained in this environment, or algo.check_teacher=0"
            )
        if success is not None:
            log.info("%s succeeds in %.0f %% of %d greedy episodes", self.what, 100 * success, episodes)


def translated(obs: Obs, source: Normaliser, target: Normaliser) -> Obs:
    """Observations that `source` has normalised, as `target` would have. Untouched where both do the same."""
    out = dict(obs)
    for key in source.keys:
        if key not in obs or key not in target.keys:
            continue
        ours, theirs = (
            [getattr(n, f"obs_{part}_{key}") for part in ("shift", "scale")] for n in (source, target)
        )
        if not all(torch.equal(a, b.to(a.device)) for a, b in zip(ours, theirs, strict=True)):
            raw = obs[key] * ours[1] + ours[0]
            out[key] = (raw - theirs[0].to(raw.device)) / theirs[1].to(raw.device)
    return out


def kind(policy: Policy) -> type[Policy] | None:
    """Of what class policies are whose distributions can be compared in closed form; None = of no such class."""
    if isinstance(policy, TokenPolicy):
        return TokenPolicy
    # The steps of a diffusion policy's chain differ in their variance, and samplers differ in their steps.
    return ChainPolicy if isinstance(policy, ChainPolicy) and not isinstance(policy, Diffusion) else None


def action_map(policy: Policy) -> list[Tensor]:
    """What turns a normalised action into an executed one: shift, scale and bounds."""
    norm = policy.normaliser
    return [
        item.detach().cpu()
        for item in (norm.action_shift, norm.action_scale, norm.action_low, norm.action_high)
    ]


def check_comparable(teacher: Policy, student: Policy, what: str) -> None:
    """Raise ConfigError where log-probabilities of one and the same chunk mean different actions.

    Checked are the kind of policy, the shape of a chunk, the action map (the "normalisation key" of OpenVLA: with
    another one the same tokens are other movements) and, where both have one, the tokenizer.
    """
    fix = "Fix: a teacher trained from the same base policy, on the same data"
    if kind(student) is None or kind(student) is not kind(teacher):
        raise ConfigError(
            f"{what} is a {teacher.registry_name} policy and can't score policy={student.registry_name}: both must be "
            "token policies, or both flow policies. Fix: a teacher of the student's kind"
        )
    shape: dict[str, tuple[object, object]] = {"policy.horizon": (teacher.horizon, student.horizon)}
    shape["actions"] = (teacher.spec.action_dim, student.spec.action_dim)
    shape["policy.history"] = (teacher.history, student.history)
    if isinstance(teacher, TokenPolicy) and isinstance(student, TokenPolicy):
        shape["policy.bins"] = (teacher.bins, student.bins)
    if isinstance(teacher, ChainPolicy) and isinstance(student, ChainPolicy):
        shape["policy.steps"] = (teacher.num_steps, student.num_steps)
        grids = [getattr(item, "grid", None) for item in (teacher, student)]
        shape["policy.solver"] = (getattr(grids[0], "solver", ""), getattr(grids[1], "solver", ""))
    for name, (theirs, ours) in shape.items():
        if theirs != ours:
            raise ConfigError(
                f"{what} has {name}={theirs}, the student has {ours}: they can't be compared. {fix}"
            )
    for theirs, ours in zip(action_map(teacher), action_map(student), strict=True):
        same = torch.isclose(theirs, ours, rtol=1e-5, atol=1e-6) | (theirs == ours)
        if not same.all():
            at = int(torch.nonzero(~same)[0])
            sources = [item.normaliser.provenance.get("source", "?") for item in (teacher, student)]
            raise ConfigError(
                f"{what} and the student normalise actions differently (action {at}: {theirs[at]:g} from {sources[0]}, "
                f"{ours[at]:g} from {sources[1]}): the same token would be two movements. {fix}"
            )
    hashes = [getattr(item, "tokenizer_hash", None) for item in (teacher, student)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise ConfigError(
            f"{what} has another tokenizer than the student ({hashes[0]} and {hashes[1]}): instructions would be read "
            f"differently. {fix}"
        )
