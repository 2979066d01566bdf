# SPDX-License-Identifier: Apache-2.0
# MuJoCo's compiled module has no type stubs.
# pyright: reportAttributeAccessIssue=false
"""Offscreen MuJoCo rendering that is fast on a CPU, and the choice of OpenGL without a display."""

from __future__ import annotations

import ctypes.util
import importlib
import os
import sys
from typing import TYPE_CHECKING

import numpy as np

from robopost.errors import EnvError

if TYPE_CHECKING:
    import mujoco

GL_FIX = (
    "Fix: apt-get install -y libegl1 libegl-mesa0 and set MUJOCO_GL=egl, "
    "or apt-get install -y libosmesa6 and set MUJOCO_GL=osmesa"
)


def select_gl() -> None:
    """Set MUJOCO_GL to egl or osmesa where it is unset and there is no display.

    MuJoCo reads the variable when it is first imported, so this runs when `robopost_envs` is.
    """
    if os.environ.get("MUJOCO_GL") or not sys.platform.startswith("linux"):
        return
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = name
            return


def _adopt_gl() -> None:
    """Make `mujoco.Renderer` follow MUJOCO_GL where MuJoCo was imported before `select_gl` ran."""
    import mujoco

    wanted = os.environ.get("MUJOCO_GL", "").lower()
    module = sys.modules[mujoco.Renderer.__module__].gl_context
    present = getattr(module, "GLContext", None)
    if wanted in ("egl", "osmesa") and getattr(present, "__module__", "") == "mujoco.glfw":
        module.GLContext = importlib.import_module(f"mujoco.{wanted}").GLContext


def fast_model(model: mujoco.MjModel) -> None:
    """No shadow map, no multisampling, coarser round shapes; call before any renderer of `model` is made."""
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0
    model.vis.quality.numslices, model.vis.quality.numstacks, model.vis.quality.numquads = 20, 10, 1


class FrameRenderer:
    """Renders states of one model offscreen.

    Args:
        model: prepared with `fast_model` if `fast`.
        width, height: frame size in pixels.
        fast: no shadows, reflections and skybox.

    Raises:
        EnvError: no OpenGL context can be made, with the commands that fix it.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int, *, fast: bool = True) -> None:
        import mujoco

        flags = mujoco.mjtRndFlag
        self._off = [int(f) for f in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX)]
        self.fast = fast
        try:
            _adopt_gl()
            self._renderer = mujoco.Renderer(model, height, width)
        except Exception as error:
            backend = os.environ.get("MUJOCO_GL", "unset")
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EnvError(f"rendering needs OpenGL (MUJOCO_GL is {backend}): {reason}. {GL_FIX}") from error

    def frame(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """(H, W, 3) uint8 picture of `data` from the named camera."""
        self._renderer.update_scene(data, camera)
        if self.fast:
            for flag in self._off:
                self._renderer.scene.flags[flag] = 0
        return self._renderer.render()

    def close(self) -> None:
        """Free the OpenGL context."""
        self._renderer.close()
