# SPDX-License-Identifier: Apache-2.0
"""`robopost doctor`: versions, extras, GPU, rendering, video, ROS 2, disk."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from robopost.cli.console import console, make_parser

CORE = ("torch", "numpy", "gymnasium", "mujoco", "hydra-core", "zarr", "safetensors", "tensorboard", "rich")
# extra -> (module that shows it is there, what it enables)
EXTRAS = {
    "diffusers": ("diffusers", "diffusion policies with the schedulers of diffusers"),
    "vla": ("transformers", "vision-language-action models, LoRA"),
    "minari": ("h5py", "Minari, D4RL-style and robomimic HDF5 data"),
    "lerobot-read": ("pyarrow", "reading LeRobot datasets, v2.0 to v3"),
    "lerobot": ("lerobot", "writing LeRobot datasets through the lerobot package"),
    "pusht": ("gym_pusht", "the Push-T environment"),
    "robotics": ("gymnasium_robotics", "Fetch and Adroit hand environments"),
    "isaaclab": ("isaaclab", "Isaac Lab environments"),
    "hub": ("huggingface_hub", "policies by their repository id on the Hugging Face hub"),
    "wandb": ("wandb", "Weights & Biases tracking"),
    "trackio": ("trackio", "trackio tracking"),
}
# One frame of the smallest scene, in a process of its own: a broken GL driver aborts its process.
FRAME = """
import mujoco
scene = '<mujoco><worldbody><light pos="0 0 3"/><geom size=".1"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(scene)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 48, 64) as renderer:
    renderer.update_scene(data)
    frame = renderer.render()
assert frame.max() > 0, "the frame is black"
"""
GL_FIX = "sudo apt-get install -y libosmesa6 (software) or libegl1 (GPU), and set MUJOCO_GL=osmesa or egl"


def main(argv: Sequence[str]) -> int:
    """Run the command. Exit code 1 when a core part does not work."""
    parser = make_parser(
        "doctor",
        "Say what is installed and works here, and the command that mends what does not.",
        ("robopost doctor", "robopost doctor --json"),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    facts = examine()
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    else:
        _show(facts)
    return 0 if facts["ok"] else 1


def examine() -> dict[str, Any]:
    """All findings as JSON values; `ok` says whether the core works."""
    versions = {name: _version(name) for name in ("robopost", *CORE)}
    return {
        "ok": all(versions.values()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
        "extras": {name: _extra(name) for name in EXTRAS},
        "gpu": _gpu(),
        "rendering": {backend: render_check(backend) for backend in _backends()},
        "MUJOCO_GL": os.environ.get("MUJOCO_GL", ""),
        "ffmpeg": _ffmpeg(),
        "ros2": _ros2(),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
    }


def render_check(backend: str) -> dict[str, Any]:
    """Render one frame with MUJOCO_GL=`backend` in a process of its own."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", FRAME],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"works": False, "why": "no frame within 60 s"}
    if done.returncode == 0:
        return {"works": True, "why": ""}
    lines = [
        line.strip()
        for line in done.stderr.splitlines()
        if re.match(r"^[\w.]*(Error|Exception)\b", line.strip())
    ]
    return {"works": False, "why": lines[0] if lines else f"the process ended with code {done.returncode}"}


def _backends() -> list[str]:
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    return [chosen] if chosen else ["egl", "osmesa"]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _extra(name: str) -> dict[str, Any]:
    module, enables = EXTRAS[name]
    found = util.find_spec(module) is not None
    distribution = {"gym_pusht": "gym-pusht", "gymnasium_robotics": "gymnasium-robotics"}.get(module, module)
    return {
        "installed": found,
        "version": _version(distribution) if found else "",
        "enables": enables,
        "install": f"pip install 'robopost[{name}]'",
    }


def _gpu() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken torch raises OSError, ImportError, RuntimeError, ...
        return {"available": False, "why": f"torch does not import: {error}"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {"available": True, "devices": names, "cuda": torch.version.cuda}
    why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver"
    return {"available": False, "why": why}


def _ffmpeg() -> dict[str, Any]:
    try:
        import imageio_ffmpeg

        return {"works": True, "path": imageio_ffmpeg.get_ffmpeg_exe()}
    except (ImportError, RuntimeError) as error:
        return {"works": False, "why": str(error)}


def _ros2() -> dict[str, Any]:
    return {
        "distribution": os.environ.get("ROS_DISTRO", ""),
        "rclpy": util.find_spec("rclpy") is not None,
        "installed": sorted(path.name for path in Path("/opt/ros").glob("*"))
        if Path("/opt/ros").is_dir()
        else [],
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table(title="robopost doctor", title_justify="left", show_header=False, box=None)
    mark = {True: "[green]ok[/]", False: "[yellow]--[/]"}
    table.add_row(mark[True], "python", f"{facts['python']}, {facts['cpus']} CPUs, {facts['platform']}")
    for name, version in facts["versions"].items():
        table.add_row(mark[True] if version else "[red]missing[/]", name, version or f"pip install {name}")
    for name, extra in facts["extras"].items():
        text = (
            f"{extra['version']:<10} {extra['enables']}"
            if extra["installed"]
            else f"{extra['install']}: {extra['enables']}"
        )
        table.add_row(mark[extra["installed"]], f"extra {name}", escape(text))
    gpu = facts["gpu"]
    text = ", ".join(gpu["devices"]) + f", CUDA {gpu['cuda']}" if gpu["available"] else gpu["why"]
    table.add_row(mark[gpu["available"]], "GPU", escape(text))
    for backend, state in facts["rendering"].items():
        text = "renders" if state["works"] else f"{state['why']}. Fix: {GL_FIX}"
        table.add_row(mark[state["works"]], f"GL {backend}", escape(text))
    video = facts["ffmpeg"]
    table.add_row(mark[video["works"]], "ffmpeg", escape(video.get("path") or video["why"]))
    ros = facts["ros2"]
    text = ros["distribution"] or ", ".join(ros["installed"]) or "not found (only needed on a robot)"
    table.add_row(mark[ros["rclpy"]], "ROS 2", escape(text))
    table.add_row(mark[facts["disk_free_gb"] > 2], "disk", f"{facts['disk_free_gb']} GB free here")
    out.print(table)
    if not any(state["works"] for state in facts["rendering"].values()):
        out.print(
            f"no GL backend renders: image observations and videos are off. Fix: {GL_FIX}", markup=False
        )
