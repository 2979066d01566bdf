# SPDX-License-Identifier: Apache-2.0
"""Observation, reward and termination of Gymnasium's MuJoCo v5 tasks over a whole batch of environments.

Weights, ranges and switches are read from the Gymnasium environment, so keyword arguments of `gym.make`
hold. The order of operations follows Gymnasium's, so the numbers agree to rounding (most of them to the last
bit).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

Views = dict[str, np.ndarray]
FREE_JOINT_DOFS = 6  # qfrc_actuator of the root is left out of the humanoids' observations


class Task(ABC):
    """One task: which fields of MjData it needs and what it makes of them.

    Attributes:
        contact_forces: needs `mj_rnePostConstraint` after each step (`cfrc_ext` is not computed without it).
        carry_dim: size of the per-environment value of `position` before the step, that a reward needs.
    """

    contact_forces: ClassVar[bool] = False
    carry_dim: ClassVar[int] = 1

    def __init__(self, env: Any) -> None:
        self.env = env
        self.dt = float(env.dt)
        self.obs_dim = int(env.observation_space.shape[0])

    def derived(self, data: Any) -> Views:
        """Fields to read after a step besides qpos, qvel and ctrl, as flat views into `data`."""
        return {}

    def position(self, views: Views) -> np.ndarray:
        """(N, carry_dim): what the reward takes a difference of."""
        return views["qpos"][:, : self.carry_dim]

    @abstractmethod
    def observe(self, views: Views, out: np.ndarray) -> None:
        """Write the observations (N, obs_dim) into `out`."""

    @abstractmethod
    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return reward (N,) float64 and terminated (N,) bool.

        Args:
            views: fields after the step.
            before: `position` before the step.
            action: (N, A) as the caller gave it: Gymnasium computes control costs in the action's precision.
        """

    def _never(self, views: Views) -> np.ndarray:
        return np.zeros(len(views["qpos"]), dtype=bool)

    def _forward(self, views: Views, before: np.ndarray) -> np.ndarray:
        velocity = (self.position(views)[:, 0] - before[:, 0]) / self.dt
        return self.env._forward_reward_weight * velocity

    def _control_cost(self, action: np.ndarray) -> np.ndarray:
        return self.env._ctrl_cost_weight * np.square(action).sum(axis=1)


class Locomotion(Task):
    """Shared by the runners: positions without the first `skip`, then velocities."""

    skip: ClassVar[int] = 1
    clip_velocity: ClassVar[float] = 0.0

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._first = self.skip * bool(env._exclude_current_positions_from_observation)

    def observe(self, views: Views, out: np.ndarray) -> None:
        """Positions and velocities, clipped where the task clips them."""
        position, velocity = views["qpos"][:, self._first :], views["qvel"]
        split = position.shape[1]
        out[:, :split] = position
        end = split + velocity.shape[1]
        if self.clip_velocity:
            velocity = np.clip(velocity, -self.clip_velocity, self.clip_velocity)
        out[:, split:end] = velocity

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forward velocity minus control cost."""
        return self._forward(views, before) - self._control_cost(action), self._never(views)


class HalfCheetah(Locomotion):
    """HalfCheetah-v5."""


class Swimmer(Locomotion):
    """Swimmer-v5."""

    skip = 2


class Walker2d(Locomotion):
    """Walker2d-v5."""

    clip_velocity = 10.0

    def healthy(self, views: Views) -> np.ndarray:
        """(N,) bool: height and angle inside their ranges."""
        z, angle = views["qpos"][:, 1], views["qpos"][:, 2]
        low_z, high_z = self.env._healthy_z_range
        low_angle, high_angle = self.env._healthy_angle_range
        return (low_z < z) & (z < high_z) & (low_angle < angle) & (angle < high_angle)

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forward velocity plus the healthy bonus minus control cost."""
        healthy = self.healthy(views)
        gain = self._forward(views, before) + healthy * self.env._healthy_reward
        terminated = ~healthy if self.env._terminate_when_unhealthy else self._never(views)
        return gain - self._control_cost(action), terminated


class Hopper(Walker2d):
    """Hopper-v5."""

    def healthy(self, views: Views) -> np.ndarray:
        """Walker2d's rule, and every other state variable inside its range."""
        low, high = self.env._healthy_state_range
        joints, velocity = views["qpos"][:, 2:], views["qvel"]
        inside = ((low < joints) & (joints < high)).all(axis=1) & ((low < velocity) & (velocity < high)).all(
            axis=1
        )
        return super().healthy(views) & inside


class Ant(Locomotion):
    """Ant-v5."""

    contact_forces = True
    carry_dim = 2
    skip = 2

    def derived(self, data: Any) -> Views:
        """Contact forces and the position of the main body."""
        main = data.body(self.env._main_body).xpos[:2]
        return {"cfrc_ext": data.cfrc_ext.reshape(-1), "main": main}

    def position(self, views: Views) -> np.ndarray:
        """Position of the main body; it lags `qpos` by one substep, as in Gymnasium."""
        return views["main"]

    def observe(self, views: Views, out: np.ndarray) -> None:
        """Positions, velocities and clipped contact forces without the world's."""
        super().observe(views, out)
        if self.env._include_cfrc_ext_in_observation:
            forces = views["cfrc_ext"][:, 6:]
            out[:, -forces.shape[1] :] = np.clip(forces, *self.env._contact_force_range)

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forward velocity plus the healthy bonus minus control and contact cost."""
        qpos = views["qpos"]
        low, high = self.env._healthy_z_range
        finite = np.isfinite(qpos).all(axis=1) & np.isfinite(views["qvel"]).all(axis=1)
        healthy = finite & (low <= qpos[:, 2]) & (qpos[:, 2] <= high)
        forces = np.clip(views["cfrc_ext"], *self.env._contact_force_range)
        contact_cost = self.env._contact_cost_weight * np.square(forces).sum(axis=1)
        gain = self._forward(views, before) + healthy * self.env._healthy_reward
        terminated = ~healthy if self.env._terminate_when_unhealthy else self._never(views)
        return gain - (self._control_cost(action) + contact_cost), terminated


class HumanoidStandup(Locomotion):
    """HumanoidStandup-v5."""

    contact_forces = True
    skip = 2

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        asked = {
            "cinert": env._include_cinert_in_observation,
            "cvel": env._include_cvel_in_observation,
            "qfrc_actuator": env._include_qfrc_actuator_in_observation,
            "cfrc_ext": env._include_cfrc_ext_in_observation,
        }
        self._blocks = [name for name, wanted in asked.items() if wanted is True]

    def derived(self, data: Any) -> Views:
        """The blocks the observation is made of."""
        fields = {
            "cinert": data.cinert[1:].reshape(-1),
            "cvel": data.cvel[1:].reshape(-1),
            "qfrc_actuator": data.qfrc_actuator[FREE_JOINT_DOFS:],
        }
        wanted = {name: fields[name] for name in self._blocks if name in fields}
        return wanted | {"cfrc_ext": data.cfrc_ext.reshape(-1)}

    def observe(self, views: Views, out: np.ndarray) -> None:
        """Positions, velocities, then inertias, velocities, actuator and contact forces where switched on."""
        super().observe(views, out)
        start = views["qpos"].shape[1] - self._first + views["qvel"].shape[1]
        for name in self._blocks:
            block = views[name][:, 6:] if name == "cfrc_ext" else views[name]
            out[:, start : start + block.shape[1]] = block
            start += block.shape[1]

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Height over the timestep minus control and impact cost, plus one."""
        height = (views["qpos"][:, 2] - 0) / self.env.model.opt.timestep
        control = self.env._ctrl_cost_weight * np.square(views["ctrl"]).sum(axis=1)
        impact = self._impact(views, self.env._impact_cost_weight, self.env._impact_cost_range)
        return height - control - impact + 1, self._never(views)

    def _impact(self, views: Views, weight: float, limits: tuple[float, float]) -> np.ndarray:
        return np.clip(weight * np.square(views["cfrc_ext"]).sum(axis=1), *limits)


class Humanoid(HumanoidStandup):
    """Humanoid-v5."""

    carry_dim = 2

    def derived(self, data: Any) -> Views:
        """The blocks, and the centres of the bodies."""
        return super().derived(data) | {"xipos": data.xipos.reshape(-1)}

    def position(self, views: Views) -> np.ndarray:
        """Centre of mass in the plane."""
        mass = self.env.model.body_mass[:, None]
        centres = views["xipos"].reshape(len(views["xipos"]), -1, 3)
        return ((mass * centres).sum(axis=1) / mass.sum())[:, :2]

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forward velocity plus the healthy bonus minus control and contact cost."""
        low, high = self.env._healthy_z_range
        z = views["qpos"][:, 2]
        healthy = (low < z) & (z < high)
        control = self.env._ctrl_cost_weight * np.square(views["ctrl"]).sum(axis=1)
        contact = self._impact(views, self.env._contact_cost_weight, self.env._contact_cost_range)
        gain = self._forward(views, before) + healthy * self.env._healthy_reward
        terminated = ~healthy if self.env._terminate_when_unhealthy else self._never(views)
        return gain - (control + contact), terminated


class Reacher(Task):
    """Reacher-v5."""

    def derived(self, data: Any) -> Views:
        """The two bodies."""
        return {name: data.body(name).xpos for name in ("fingertip", "target")}

    def observe(self, views: Views, out: np.ndarray) -> None:
        """Angles as cosines and sines, target, velocities and the vector to the target."""
        qpos = views["qpos"]
        np.cos(qpos[:, :2], out=out[:, 0:2], casting="same_kind")
        np.sin(qpos[:, :2], out=out[:, 2:4], casting="same_kind")
        split = 4 + qpos.shape[1] - 2
        out[:, 4:split] = qpos[:, 2:]
        out[:, split : split + 2] = views["qvel"][:, :2]
        out[:, split + 2 :] = (views["fingertip"] - views["target"])[:, :2]

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Minus the distance, minus the control cost."""
        distance = (
            -np.linalg.norm(views["fingertip"] - views["target"], axis=1) * self.env._reward_dist_weight
        )
        control = -np.square(action).sum(axis=1) * self.env._reward_control_weight
        return distance + control, self._never(views)


class Pusher(Task):
    """Pusher-v5."""

    def derived(self, data: Any) -> Views:
        """The three bodies."""
        return {name: data.body(name).xpos for name in ("tips_arm", "object", "goal")}

    def observe(self, views: Views, out: np.ndarray) -> None:
        """Joints of the arm and the positions of fingertip, object and goal."""
        out[:, :7] = views["qpos"][:, :7]
        out[:, 7:14] = views["qvel"][:, :7]
        for start, name in ((14, "tips_arm"), (17, "object"), (20, "goal")):
            out[:, start : start + 3] = views[name]

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Minus both distances, minus the control cost."""
        near = -np.linalg.norm(views["object"] - views["tips_arm"], axis=1) * self.env._reward_near_weight
        distance = -np.linalg.norm(views["object"] - views["goal"], axis=1) * self.env._reward_dist_weight
        control = -np.square(action).sum(axis=1) * self.env._reward_control_weight
        return distance + control + near, self._never(views)


class InvertedPendulum(Task):
    """InvertedPendulum-v5."""

    def observe(self, views: Views, out: np.ndarray) -> None:
        """Positions and velocities."""
        split = views["qpos"].shape[1]
        out[:, :split] = views["qpos"]
        out[:, split:] = views["qvel"]

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One per step upright."""
        finite = np.isfinite(views["qpos"]).all(axis=1) & np.isfinite(views["qvel"]).all(axis=1)
        terminated = ~finite | (np.abs(views["qpos"][:, 1]) > 0.2)
        return (~terminated).astype(np.float64), terminated


class InvertedDoublePendulum(Task):
    """InvertedDoublePendulum-v5."""

    def derived(self, data: Any) -> Views:
        """The tip and the force at the cart's limit."""
        return {"tip": data.site_xpos[0], "force": data.qfrc_constraint[:1]}

    def observe(self, views: Views, out: np.ndarray) -> None:
        """Cart, angles as sines and cosines, clipped velocities and force."""
        qpos = views["qpos"]
        n = qpos.shape[1] - 1
        out[:, 0] = qpos[:, 0]
        out[:, 1 : 1 + n] = np.sin(qpos[:, 1:])
        out[:, 1 + n : 1 + 2 * n] = np.cos(qpos[:, 1:])
        out[:, 1 + 2 * n : -1] = np.clip(views["qvel"], -10, 10)
        out[:, -1:] = np.clip(views["force"], -10, 10)

    def reward(self, views: Views, before: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Alive bonus minus distance and velocity penalties."""
        x, y = views["tip"][:, 0], views["tip"][:, 2]
        v1, v2 = views["qvel"][:, 1], views["qvel"][:, 2]
        terminated = y <= 1
        bonus = self.env._healthy_reward * ~terminated
        return bonus - (0.01 * x**2 + (y - 2) ** 2) - (1e-3 * v1**2 + 5e-3 * v2**2), terminated


# Gymnasium class -> task. Keyed by where the class is defined, so that a subclass with other rewards is not
# taken for the original.
TASKS: dict[str, type[Task]] = {
    "gymnasium.envs.mujoco.ant_v5.AntEnv": Ant,
    "gymnasium.envs.mujoco.half_cheetah_v5.HalfCheetahEnv": HalfCheetah,
    "gymnasium.envs.mujoco.hopper_v5.HopperEnv": Hopper,
    "gymnasium.envs.mujoco.humanoid_v5.HumanoidEnv": Humanoid,
    "gymnasium.envs.mujoco.humanoidstandup_v5.HumanoidStandupEnv": HumanoidStandup,
    "gymnasium.envs.mujoco.inverted_double_pendulum_v5.InvertedDoublePendulumEnv": InvertedDoublePendulum,
    "gymnasium.envs.mujoco.inverted_pendulum_v5.InvertedPendulumEnv": InvertedPendulum,
    "gymnasium.envs.mujoco.pusher_v5.PusherEnv": Pusher,
    "gymnasium.envs.mujoco.reacher_v5.ReacherEnv": Reacher,
    "gymnasium.envs.mujoco.swimmer_v5.SwimmerEnv": Swimmer,
    "gymnasium.envs.mujoco.walker2d_v5.Walker2dEnv": Walker2d,
}
