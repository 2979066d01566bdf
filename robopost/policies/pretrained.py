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


@dataclass
class PretrainedConfig(PolicyConfig):
    """Config of `policy=pretrained`: `path` decides everything else; `execute` alone may be changed."""

    name: str = "pretrained"
    path: str = ""  # run folder, checkpoint, policy folder or npz actor
    normalise_obs: str = "identity"

    def __post_init__(self) -> None:
        if not self.path or Path(self.path).suffix == ".npz":
            return
        # Loops read horizon and history from the config before the policy exists.
        stored = load_json(find_policy(self.path) / "policy.json")["config"]
        for item in fields(PolicyConfig):
            if item.name in stored and item.name != "name" and not (item.name == "execute" and self.execute):
                setattr(self, item.name, stored[item.name])


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
    policy = load_pretrained(config.path, spec)
    if config.execute:
        if config.execute > policy.horizon:
            raise ConfigError(
                f"policy.execute={config.execute} must lie in 1..{policy.horizon} (horizon of {config.path})"
            )
        policy.execute = policy.config.execute = config.execute
    return policy


def load_pretrained(path: str | Path, spec: Spec | None = None, device: torch.device | str = "cpu") -> Policy:
    """Load a policy from any source robopost knows.

    Args:
        path: run folder, checkpoint, policy folder or npz actor.
        spec: the environment it will act in, checked against the policy's; needed for an npz actor.
        device: where the policy goes.

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
        check_fits(policy, spec, str(path))
    policy.normaliser_fixed = True
    return policy


def check_fits(policy: Policy, spec: Spec, what: str) -> None:
    """Raise ConfigError where `policy` can't act in `spec`: other keys, shapes or actions."""
    for key in policy.obs_keys:
        if key in policy.own_keys:
            continue
        wanted = tuple(policy.spec.obs[key][0])
        if key not in spec.obs:
            raise ConfigError(f"{what} observes {key!r}, the environment offers {', '.join(spec.obs)}")
        if tuple(spec.obs[key][0]) != wanted:
            raise ConfigError(
                f"{what} observes {key!r} of shape {wanted}, here it is {tuple(spec.obs[key][0])}"
            )
    if policy.spec.action_dim != spec.action_dim:
        raise ConfigError(
            f"{what} has {policy.spec.action_dim} actions, the environment has {spec.action_dim}"
        )


pretrained.has_log_prob = False  # type: ignore[attr-defined]  # it depends on what is loaded
