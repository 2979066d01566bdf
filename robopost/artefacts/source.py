# SPDX-License-Identifier: Apache-2.0
"""`open_policy`: whatever a user may name as a policy, together with the environment it acts in."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from robopost.artefacts.checkpoint import load_json
from robopost.compose import env_config_from_dict
from robopost.config import EnvConfig
from robopost.errors import CheckpointError, require
from robopost.policies.base import Policy
from robopost.policies.pretrained import check_fits, load_pretrained
from robopost.policies.reference import index_entry
from robopost.vector import VecEnv, make_vec

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
HUB_FILES = ("policy.json", "policy.safetensors", "config.json")


def open_policy(
    name: str,
    env: EnvConfig,
    num_envs: int,
    *,
    device: torch.device | str = "cpu",
    render: str | None = None,
) -> tuple[Policy, VecEnv]:
    """Load a policy and make the environments it is to act in, checked against each other.

    Args:
        name: run folder, checkpoint, policy folder, `.npz` actor, or a repository id of the Hugging Face hub.
        env: config of the environment.
        num_envs: parallel copies.
        device: where the policy goes.
        render: render mode of the environment.

    Returns:
        (policy in evaluation mode, environments that stack the history it sees). The caller closes them.

    Raises:
        CheckpointError: nothing at `name`, or corrupt.
        ConfigError: the policy was made for other observations or actions.
        MissingExtraError: a hub id and no hub client.
    """
    path = local(name)
    if path.suffix == ".npz":
        if not path.is_file():
            raise CheckpointError(f"no policy at {name}: it does not exist")
        policy = None
    else:
        policy = load_pretrained(path, device=device)
    vec = make_vec(env, num_envs, history=policy.history if policy else 1, render=render)
    try:
        if policy is None:
            policy = load_pretrained(path, vec.spec, device)
        else:
            check_fits(policy, vec.spec, f"policy={name}")
    except BaseException:
        vec.close()
        raise
    return policy.eval(), vec


def local(name: str) -> Path:
    """The path of a policy: `name` itself, or a download of the hub repository it names."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix == ".npz" or not HUB_ID.match(name) or name.startswith(("runs/", ".")):
        return path
    hub = require("huggingface_hub", "hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:  # its HTTP errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"no folder {name} here, and the hub has no such policy: {reason}") from error


def trained_env(name: str | Path) -> EnvConfig | str | None:
    """Where a policy was trained: a config, a Gymnasium id (of an npz actor's index), or None."""
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return index_entry(path).get("env") if path.is_file() else None
    for folder in (path, *list(path.parents)[:2]):  # the run folder, or a checkpoint two levels below it
        config = folder / "config.json"
        if config.is_file():
            stored = load_json(config).get("env")
            return env_config_from_dict(stored) if stored else None
    return None
