# SPDX-License-Identifier: Apache-2.0
"""Adapters of other simulators. Importing this registers names; a simulator is imported when it is made."""

from . import gymnasium, isaaclab, pusht, robotics

__all__ = ["gymnasium", "isaaclab", "pusht", "robotics"]
