# SPDX-License-Identifier: Apache-2.0
"""Closed-form inverse kinematics of the arm with the gripper pointing straight down, and its joint ranges."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

SHOULDER = 0.24  # m, height of joint 2 over the table
UPPER, FOREARM = 0.38, 0.34  # m, joint 2 to joint 3, joint 3 to joint 5
TOOL = 0.18  # m, joint 5 down to the fingertip site `ee`
JOINT_LOW = np.array([-2.6, -1.4, -1.6, -2.0, -2.4, -2.9])
JOINT_HIGH = np.array([2.6, 1.9, 2.3, 2.0, 2.4, 2.9])
FINGER_TRAVEL = 0.04  # m per finger, 0 = closed


def inverse(tip: Array) -> Array:
    """Joint angles that hold the gripper upright, yaw 0, with its tip at `tip`.

    With the gripper vertical, the forearm roll is zero and the wrist sits straight above the tip, which
    leaves a turn of the base and a planar two-link arm; of the two solutions this is the one with the elbow
    up. Points out of reach give the nearest stretched pose.

    Args:
        tip: (N, 3) metres.

    Returns:
        (N, 6) radians.
    """
    radius = np.hypot(tip[:, 0], tip[:, 1])
    height = tip[:, 2] + (TOOL - SHOULDER)
    cosine = (radius**2 + height**2 - UPPER**2 - FOREARM**2) / (2 * UPPER * FOREARM)
    bend = np.arccos(np.clip(cosine, -1.0, 0.999))
    lift = np.arctan2(height, radius) + np.arctan2(FOREARM * np.sin(bend), UPPER + FOREARM * np.cos(bend))
    base = np.arctan2(tip[:, 1], tip[:, 0])
    shoulder = np.pi / 2 - lift
    elbow = bend - np.pi / 2
    joints = np.stack([base, shoulder, elbow, np.zeros_like(base), -shoulder - elbow, -base], axis=1)
    return np.clip(joints, JOINT_LOW, JOINT_HIGH)


HOME = inverse(np.array([[0.42, 0.0, 0.12]]))[0]  # centre of the joint range that position control spans
JOINT_SPAN = np.array([1.0, 0.9, 1.0, 0.6, 0.9, 1.2])  # rad, half of that range
