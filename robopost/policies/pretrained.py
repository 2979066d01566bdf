# SPDX-License-Identifier: Apache-2.0
"""A policy that exists already: from a run folder, a checkpoint, a policy folder or an npz actor."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from robopost.artefacts.checkpoint import find_policy, load_json, load_policy
from robopost.config import PolicyConfig
from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.base import Policy
from robopost.policies.reference import load_reference
from robopost.registry import POLICIES

MIN_INSIDE = 0.1  # share of a policy's range of actions that has to lie within the environment's bounds
MIN_COVERED = 0.02  # share of the bounds that it has to cover in at least one dimension


@dataclass
class PretrainedConfig(PolicyConfig):
    """Config of `policy=pretrained`: `path` decides everything else; `execute` alone may be changed.

    Raises:
        ConfigError: another setting is given that the stored policy doesn't have.
    """

    name: str = "pretrained"
    path: str = ""  # run folder, checkpoint, policy folder or npz actor
    normalise_obs: str = "identity"

    def __post_init__(self) -> None:
        if not self.path or Path(self.path).suffix == ".npz":
            return
        # Loops read horizon and history from the config before the policy exists.
        stored = load_json(find_policy(self.path) / "policy.json")["config"]
        plain = PolicyConfig(normalise_obs="identity")
        for item in fields(PolicyConfig):
            given, kept = getattr(self, item.name), stored.get(item.name)
            if item.name not in stored or item.name == "name" or (item.name == "execute" and given):
                continue
            if given not in (kept, getattr(plain, item.name)):
                raise ConfigError(
                    f"policy.{item.name}={given}: {self.path} was trained with {kept}, which is part of it. "
                    f"Fix: drop policy.{item.name}, or train another policy"
                )
            setattr(self, item.name, kept)


@POLICIES.register("pretrained", config=PretrainedConfig)
def pretrained(config: PretrainedConfig, spec: Spec) -> Policy:
    """Load the policy at `config.path` for `spec`, to evaluate, collect with or fine-tune.

    Returns:
        The policy's own class, with the normaliser it was trained with; loops must not refit it.

    Raises:
        ConfigError: no path, or the policy was made for other observations or actions.
        CheckpointError: nothing usable at the path.
    """
    if not config.path:
        raise ConfigError("policy.path is empty. Fix: policy.path=<run folder, checkpoint or npz actor>")
    policy = load_pretrained(config.path, spec, what=f"policy.path={config.path}")
    if config.execute:
        if config.execute > policy.horizon:
            raise ConfigError(
                f"policy.execute={config.execute} must lie in 1..{policy.horizon} (horizon of {config.path})"
            )
        policy.execute = policy.config.execute = config.execute
    return policy


def load_pretrained(
    path: str | Path, spec: Spec | None = None, device: torch.device | str = "cpu", *, what: str = ""
) -> Policy:
    """Load a policy from any source robopost knows.

    Args:
        path: run folder, checkpoint, policy folder or npz actor.
        spec: the environment it will act in, checked against the policy's; needed for an npz actor.
        device: where the policy goes.
        what: what errors call it, default its path.

    Raises:
        ConfigError: the policy doesn't fit `spec`, or an npz actor is given none.
        CheckpointError: nothing usable at the path.
    """
    if Path(path).suffix == ".npz":
        if spec is None:
            raise ConfigError(f"{path}: an npz actor needs an environment. Fix: env=<name>")
        return load_reference(path, spec, device)
    policy = load_policy(path, device)
    if spec is not None:
        check_fits(policy, spec, what or str(path))
    policy.normaliser_fixed = True
    return policy


def check_fits(policy: Policy, spec: Spec, what: str) -> None:
    """Raise ConfigError where `policy` can't act in `spec`: other keys, shapes, actions or ranges of actions.

    Args:
        policy: with the spec and the normaliser it was trained with.
        spec: of the environment, or of the data it is to be trained on.
        what: names the policy in the message, e.g. `policy.path=runs/x`.
    """
    fix = "Fix: the task it was trained in, or a policy of this one"
    for key in policy.obs_keys:
        if key in policy.own_keys:
            continue
        wanted = tuple(policy.spec.obs[key][0])
        if key not in spec.obs:
            raise ConfigError(f"{what} observes {key!r}, the environment offers {', '.join(spec.obs)}. {fix}")
        if tuple(spec.obs[key][0]) != wanted:
            raise ConfigError(
                f"{what} observes {key!r} of shape {wanted}, here it is {tuple(spec.obs[key][0])}. {fix}"
            )
    if policy.spec.choices != spec.choices:
        kinds = [f"{n} discrete" if n else "continuous" for n in (policy.spec.choices, spec.choices)]
        raise ConfigError(
            f"{what} was trained on {kinds[0]} actions, the environment has {kinds[1]} ones. {fix}"
        )
    if policy.spec.action_dim != spec.action_dim:
        raise ConfigError(
            f"{what} has {policy.spec.action_dim} actions, the environment has {spec.action_dim}. {fix}"
        )
    _check_range(policy, spec, what, fix)


def _check_range(policy: Policy, spec: Spec, what: str, fix: str) -> None:
    """Raise ConfigError where the actions of `policy` are in other units than those of `spec`.

    Compared are the range that its normaliser maps to [-1, 1] and the environment's bounds. They needn't be the same:
    demonstrations may use a part of the bounds, data may declare wider ones.
    """
    norm = policy.normaliser
    low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
    first, last = ((norm.action_shift + sign * norm.action_scale).cpu() for sign in (-1, 1))
    known = torch.isfinite(high - low) & (high > low)
    if norm.provenance.get("action", "bounds") == "bounds":
        known &= torch.isfinite(norm.action_high - norm.action_low).cpu()
    elif norm.provenance["action"] == "minmax":
        known &= norm.action_scale.cpu() != 1.0  # what a dimension that never moved in the data gets
    else:
        return  # no range
    shared = (torch.minimum(last, high) - torch.maximum(first, low)).clamp_min(0.0)
    beyond = known & (shared < MIN_INSIDE * (last - first))
    tiny = known & (shared < MIN_COVERED * (high - low))
    if beyond.any() or (known.any() and bool(tiny[known].all())):
        at = int(torch.nonzero(beyond if beyond.any() else tiny)[0])
        raise ConfigError(
            f"{what} acts in [{first[at]:g}, {last[at]:g}] (action {at}), the environment's bounds are "
            f"[{low[at]:g}, {high[at]:g}]: the units differ. {fix}"
        )


pretrained.has_log_prob = False  # type: ignore[attr-defined]  # it depends on what is loaded
