# SPDX-License-Identifier: Apache-2.0
# MuJoCo's compiled module has no type stubs.
# pyright: reportAttributeAccessIssue=false
"""The vector environment of the arm family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from robopost.errors import ConfigError, EnvError

from ..mujoco_vec import MujocoVectorEnv
from ..rendering import FrameRenderer, fast_model
from .config import TIMESTEP, WORKSPACE, ArmConfig
from .instructions import BYTES, INSTRUCTIONS
from .kinematics import FINGER_TRAVEL, HOME, JOINT_HIGH, JOINT_LOW, JOINT_SPAN, inverse
from .tasks import SCALE, TASKS, Scene, place, spread

Array = np.ndarray
ASSETS = Path(__file__).parent / "assets"
JOINTS = 6
LOW = np.array([WORKSPACE[0], WORKSPACE[2], 0.012])  # m, of the commanded fingertip position
HIGH = np.array([WORKSPACE[1], WORKSPACE[3], 0.35])
LEASH = 0.08  # m, the commanded position stays this close to the true one
JOINT_STEP = 0.2  # rad per control step a commanded joint angle moves at most
LIFTED = 0.05  # m, object height that counts as carried
FRAME = 256  # pixels, side of frames for videos


class ArmVectorEnv(MujocoVectorEnv):
    """N tabletop arms; see `docs/environments.md` for the observation and action tables.

    `info["success"]` (N,) bool is the task's predicate at the step just done; an episode counts as solved
    when it held at any of its steps. `arm_language` adds `info["instruction"]`, the texts of the returned
    observation.

    Args:
        config: task and options.
        num_envs: N.
        render: "rgb_array" makes `render` available.
        autoreset: see `MujocoVectorEnv`.
    """

    def __init__(
        self, config: ArmConfig, num_envs: int, *, render: str | None = None, autoreset: bool = True
    ) -> None:
        if render not in (None, "rgb_array"):
            raise ConfigError(f"render={render!r} must be 'rgb_array' or None")
        self.config, self.render_mode = config, render
        self.task = TASKS[config.name](config)
        model = mujoco.MjModel.from_xml_path(str(ASSETS / self.task.scene))
        if config.fast_render:
            fast_model(model)
        self._language = self.task.goals > 1
        self._delta = config.control == "delta_ee"
        self._allocate(model, num_envs)
        spaces = self._observation_spaces()
        missing = [key for key in config.obs_keys if key not in spaces]
        if missing:
            raise ConfigError(
                f"env.obs_keys names {missing[0]!r}, env.obs={config.obs} offers {', '.join(spaces)}"
            )
        self._keys = list(config.obs_keys) or list(spaces)
        actions = (3 if self._delta else JOINTS) + self.task.gripper
        super().__init__(
            model,
            num_envs,
            round(1.0 / (config.control_hz * TIMESTEP)),
            observation_space=gym.spaces.Dict({key: spaces[key] for key in self._keys}),
            action_space=gym.spaces.Box(-1.0, 1.0, (actions,), np.float32),
            max_steps=config.max_steps,
            nthread=config.threads,
            autoreset=autoreset,
        )
        self.metadata["motion"] = {"state": (0, 3)}  # the fingertips' position
        self._ramp = (np.arange(self.physics.nstep) + 1.0)[None, :, None] / self.physics.nstep
        self._render_data = mujoco.MjData(model)
        self._renderers: dict[int, FrameRenderer] = {}
        self.wanted: Array | None = None  # (N,) bool, see `robopost.vector.VecEnv.want_images`
        self._images = np.zeros(0)
        self._refresh()

    def _allocate(self, model: mujoco.MjModel, n: int) -> None:
        count = self.task.objects
        starts = [
            int(model.jnt_qposadr[model.body_jntadr[model.body(f"object{k}").id]]) for k in range(count)
        ]
        speeds = [int(model.jnt_dofadr[model.body_jntadr[model.body(f"object{k}").id]]) for k in range(count)]
        self._object_qpos = np.array([np.arange(s, s + 7) for s in starts], int).reshape(count, 7)
        self._object_qvel = np.array([np.arange(s, s + 6) for s in speeds], int).reshape(count, 6)
        self._mocap = [int(model.body_mocapid[model.body(f"goal{g}").id]) for g in range(self.task.goals)]
        self._ee = slice(int(model.sensor("ee").adr[0]), int(model.sensor("ee").adr[0]) + 3)
        speed = int(model.sensor("ee_velocity").adr[0])
        self._ee_velocity = slice(speed, speed + 3)
        self._target = np.zeros((n, 3))  # commanded fingertip position
        self._ctrl = np.zeros((n, JOINTS + 2))  # last commanded joint angles and finger positions
        self._goal = np.zeros((n, self.task.goals, 3))
        self._lifted = np.zeros(n, bool)
        self._command = np.zeros(n, np.int64)

    def _observation_spaces(self) -> dict[str, gym.Space[Any]]:
        config = self.config
        dummy = self._dummy_scene()
        arm = (9 if self._delta else 18) + self.task.gripper
        full = config.obs.startswith("state")
        size = arm + (sum(part.shape[1] for part in self.task.features(dummy)) if full else 0)
        spaces: dict[str, gym.Space[Any]] = {}
        spaces["state"] = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        if config.image_size:
            spaces["image"] = gym.spaces.Box(0, 255, (config.image_size, config.image_size, 3), np.uint8)
        if self._language:
            spaces["instruction"] = gym.spaces.Box(0, 255, (BYTES.shape[1],), np.uint8)
        return spaces

    def _dummy_scene(self) -> Scene:
        k, g = self.task.objects, self.task.goals
        vector, flat = np.zeros((1, k, 3)), np.zeros((1, k))
        one = np.zeros(1)
        return Scene(
            np.zeros((1, 3)),
            one,
            vector,
            vector,
            flat,
            flat,
            np.zeros((1, g, 3)),
            one > 0,
            one.astype(np.int64),
        )

    def _extra_state(self) -> dict[str, Array]:
        return {
            "target": self._target,
            "ctrl": self._ctrl,
            "goal": self._goal,
            "lifted": self._lifted,
            "command": self._command,
        }

    def set_state(self, state: dict[str, Array]) -> None:
        """Restore `get_state` output; the continuation is bitwise the same."""
        super().set_state(state)
        self._images = np.zeros(0)
        self._refresh()

    def _refresh(self) -> None:
        """Read the scene out of physics state and sensors."""
        physics = self.physics
        velocity = physics.sensordata[:, self._ee_velocity]
        # Sensors describe the beginning of the last physics step: carry the position over it.
        ee = physics.sensordata[:, self._ee] + TIMESTEP * velocity
        self._speed = velocity
        pose, twist = physics.qpos[:, self._object_qpos], physics.qvel[:, self._object_qvel]
        w, x, y, z = (pose[:, :, 3 + i] for i in range(4))
        position = pose[:, :, :3]
        if self.task.objects:
            self._lifted |= position[:, 0, 2] > LIFTED
        self.scene = Scene(
            ee=ee,
            opening=physics.qpos[:, JOINTS : JOINTS + 2].mean(axis=1) / FINGER_TRAVEL,
            position=position,
            velocity=twist[:, :, :3],
            yaw=np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
            spin=twist[:, :, 5],
            goal=self._goal,
            lifted=self._lifted,
            command=self._command,
        )

    def _reset_envs(self, indices: Array) -> None:
        task, n = self.task, len(indices)
        uniform = np.stack([self.rngs[i].random(task.draws + 3) for i in indices])
        x0, x1, y0, y1, z0, z1 = task.start
        tip = spread(uniform[:, :2], [x0, x1, y0, y1])
        tip[:, 2] = z0 + uniform[:, 2] * (z1 - z0)
        start, yaw, goal, command = task.layout(uniform[:, 3:])
        joints = inverse(tip)
        opening = FINGER_TRAVEL if task.gripper else 0.0
        qpos = np.tile(self.physics.model.qpos0, (n, 1))
        qpos[:, :JOINTS] = joints
        qpos[:, JOINTS : JOINTS + 2] = opening
        for k in range(task.objects):
            columns = self._object_qpos[k]
            qpos[:, columns[:3]] = start[:, k]
            qpos[:, columns[3]], qpos[:, columns[6]] = np.cos(yaw[:, k] / 2), np.sin(yaw[:, k] / 2)
        self.physics.set_physics(indices, qpos, np.zeros((n, self.physics.model.nv)))
        self._target[indices] = tip
        self._ctrl[indices] = qpos[:, : JOINTS + 2]
        self._goal[indices] = goal
        self._command[indices] = command
        self._lifted[indices] = False
        self._refresh()

    def _control(self, action: Array) -> Array:
        scene, ctrl = self.scene, np.empty_like(self._ctrl)
        if self._delta:
            target = self._target + action[:, :3] * self.config.step_size
            # A blocked arm must not wind its command up, nor push without limit.
            target = np.clip(target, scene.ee - LEASH, scene.ee + LEASH)
            self._target[:] = np.clip(target, LOW, HIGH)
            ctrl[:, :JOINTS] = inverse(self._target)
        else:
            old = self._ctrl[:, :JOINTS]
            wanted = np.clip(HOME + action[:, :JOINTS] * JOINT_SPAN, JOINT_LOW, JOINT_HIGH)
            ctrl[:, :JOINTS] = old + np.clip(wanted - old, -JOINT_STEP, JOINT_STEP)
        grip = (action[:, -1:] + 1) / 2 if self.task.gripper else 0.0
        ctrl[:, JOINTS:] = grip * FINGER_TRAVEL
        path = self._ctrl[:, None] + self._ramp * (ctrl - self._ctrl)[:, None]
        self._ctrl[:] = ctrl
        return path

    def _evaluate(self, action: Array) -> tuple[Array, Array, dict[str, Any]]:
        self._refresh()
        success = self.task.success(self.scene)
        dense = self.config.reward == "dense"
        reward = self.task.progress(self.scene, success) if dense else success.astype(np.float64)
        terminated = success.copy() if self.config.terminate_on_success else np.zeros(self.num_envs, bool)
        return reward, terminated, {"success": success}

    def step(self, actions: Array) -> tuple[dict[str, Array], Array, Array, Array, dict[str, Any]]:
        """Advance every arm by one control step, see `MujocoVectorEnv.step`."""
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, reward, terminated, truncated, {**info, **self._reset_info()}

    def _reset_info(self) -> dict[str, Any]:
        return {"instruction": [INSTRUCTIONS[i] for i in self._command]} if self._language else {}

    def _observe(self, indices: Array | None = None) -> dict[str, Array]:
        rows = slice(None) if indices is None else indices
        obs: dict[str, Array] = {}
        for key in self._keys:
            if key == "state":
                obs[key] = self._state()[rows]
            elif key == "image":
                obs[key] = self._image(indices)
            else:
                obs[key] = BYTES[self._command[rows]]
        return obs

    def _state(self) -> Array:
        scene = self.scene
        parts = [place(scene.ee)]
        if self._delta:
            parts += [(self._target - scene.ee) * SCALE, self._speed * SCALE]
        else:
            joints = self.physics.qpos[:, :JOINTS]
            parts += [self._speed * SCALE, joints, self._ctrl[:, :JOINTS] - joints]
        if self.task.gripper:
            parts.append(scene.opening[:, None])
        if self.config.obs.startswith("state"):
            parts += self.task.features(scene)
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _image(self, indices: Array | None) -> Array:
        """Images of `indices` (None = all); of all, those that nobody wants are the last ones once more."""
        size = self.config.image_size
        if indices is None and self.wanted is not None and len(self._images):
            images = self._images.copy()
            rows = np.flatnonzero(self.wanted | self._done)
            images[rows] = self._frames(rows, size, "front")
        else:
            images = self._frames(range(self.num_envs) if indices is None else indices, size, "front")
        if indices is None:
            self._images = images
        return images

    def _frames(self, indices: Sequence[int] | Array | range, size: int, camera: str) -> Array:
        if size not in self._renderers:
            model = self.physics.model
            self._renderers[size] = FrameRenderer(model, size, size, fast=self.config.fast_render)
        frames = np.empty((len(indices), size, size, 3), np.uint8)
        for row, index in enumerate(indices):
            self._render_data.mocap_pos[self._mocap] = self._goal[index]
            self.physics.load_into(int(index), self._render_data)
            frames[row] = self._renderers[size].frame(self._render_data, camera)
        return frames

    def render(self, indices: Sequence[int] | None = None) -> Array:  # type: ignore[override]
        """Frames (n, 256, 256, 3) uint8 of environments `indices` (None = all) from the video camera.

        Raises:
            EnvError: the environment was made without render="rgb_array", or there is no OpenGL.
        """
        if self.render_mode is None:
            raise EnvError(
                "the environment was made without a render mode. Fix: make it with render='rgb_array'"
            )
        return self._frames(range(self.num_envs) if indices is None else indices, FRAME, "video")

    def close_extras(self, **kwargs: Any) -> None:
        """Free threads and OpenGL contexts."""
        super().close_extras(**kwargs)
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
