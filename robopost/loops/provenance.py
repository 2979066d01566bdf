# SPDX-License-Identifier: Apache-2.0
"""What a run's result needs to be reproduced."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from robopost.config import TrainConfig
from robopost.policies.base import Policy
from robopost.registry import POLICIES


def provenance(config: TrainConfig, command: str, policy: Policy) -> dict[str, Any]:
    """Versions, revision, command and machine class: what a result needs to be reproduced."""
    packages = {}
    for name in ("robopost", "torch", "numpy", "mujoco", "gymnasium", "diffusers", "zarr"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": command or " ".join(["robopost", *sys.argv[1:]]),
        "seed": config.seed,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "packages": packages,
        "revision": git_revision(),
        "normaliser": policy.normaliser.provenance,
        "policies": POLICIES.names(),
    }


def git_revision() -> str:
    """Revision of the checkout robopost runs from, with `+` when it has changes; empty outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        ask = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return ask("rev-parse", "--short=12", "HEAD") + ("+" if ask("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
