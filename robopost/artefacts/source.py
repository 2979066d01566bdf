# SPDX-License-Identifier: Apache-2.0
"""`open_policy`: whatever a user may name as a policy, as a `Policy` ready to act."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from robopost.artefacts.checkpoint import load_json, load_policy
from robopost.compose import env_config_from_dict, group_from_dict
from robopost.config import EnvConfig
from robopost.errors import CheckpointError, ConfigError, require
from robopost.policies.base import Policy, build_policy
from robopost.vector import make_vec

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
HUB_FILES = ("policy.json", "policy.safetensors", "config.json")


def open_policy(name: str, env: EnvConfig | None = None, device: torch.device | str = "cpu") -> Policy:
    """Load a policy to act with.

    Args:
        name: run folder, checkpoint, policy folder, `.npz` actor, or the id of a repository on the Hugging Face hub.
        env: the environment it will act in; an `.npz` actor takes its shapes from there.
        device: where the policy goes.

    Raises:
        CheckpointError: nothing there, or corrupt.
        ConfigError: an `.npz` actor without an environment.
        MissingExtraError: a hub id and no hub client.
    """
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise CheckpointError(f"no policy at {name}: it does not exist")
        if env is None:
            raise ConfigError(
                f"policy={name} says nothing about its environment. Fix: add env=<name or Gymnasium id>"
            )
        vec = make_vec(env, 1)
        try:
            config = group_from_dict("policy", {"name": "pretrained", "path": str(path)})
            return build_policy(config, vec.spec).to(device).eval()
        finally:
            vec.close()
    return load_policy(local(name), device)


def local(name: str) -> Path:
    """The folder of a policy: `name` itself, or a download of the hub repository it names."""
    path = Path(name).expanduser()
    if path.exists() or not HUB_ID.match(name) or name.startswith(("runs/", "./", "../")):
        return path
    hub = require("huggingface_hub", "hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:  # its HTTP errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"no folder {name!r} here, and the hub gives no policy of that name: {reason}"
        ) from error


def trained_env(name: str) -> EnvConfig | None:
    """The environment a policy was trained in, where its run folder is at hand."""
    folder = Path(name).expanduser()
    for candidate in (folder, *list(folder.parents)[:2]):
        path = candidate / "config.json"
        if path.is_file():
            stored = load_json(path).get("env")
            return env_config_from_dict(stored) if stored else None
    return None
