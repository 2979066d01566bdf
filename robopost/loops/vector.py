# SPDX-License-Identifier: Apache-2.0
"""Moved to robopost.vector."""

from robopost.vector import *  # noqa: F403
from robopost.vector import VecEnv, Step, make_vec, to_torch, make_spec  # noqa: F401
