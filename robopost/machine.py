# SPDX-License-Identifier: Apache-2.0
"""Public facts about what a number was measured on: versions, revision, CPU, GPU. No hostnames, no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("robopost", "torch", "numpy", "gymnasium", "mujoco")


def versions(extra: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, the core packages and the distributions in `extra`; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *extra):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision(folder: Path | None = None) -> dict[str, Any]:
    """`{"commit": hash or None, "dirty": bool}` of the checkout that holds `folder` (default: this package).

    `results/`, `docs/` and `README.md` don't count as changes: a suite of benchmarks writes them while it
    runs.
    """
    where = folder or Path(__file__).resolve().parent
    commit = _git(where, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": False}
    changed = _git(
        where, "status", "--porcelain", "--untracked-files=no", "--", ":/",
        ":(top,exclude)results", ":(top,exclude)docs", ":(top,exclude)README.md",
    )  # fmt: skip
    return {"commit": commit, "dirty": bool(changed)}


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in GiB, GPU name(s) and threads of torch."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def usable_cores() -> int:
    """Cores this process may use: the affinity mask, cut by a control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes; empty where the system has none."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return []


def scrub(text: str) -> str:
    """Shorten absolute paths in `text` to their last two parts: results are public."""
    return re.sub(
        r"(?<![\w.:/])/(?:[\w.+@-]+/)+[\w.+@-]*",
        lambda m: "/".join(m.group().rstrip("/").split("/")[-2:]),
        text,
    )


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError, AttributeError):
        return None
