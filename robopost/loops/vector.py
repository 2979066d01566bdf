# SPDX-License-Identifier: Apache-2.0
"""Moved to robopost.vector."""

from robopost.vector import *  # noqa: F403
from robopost.vector import Step, VecEnv, make_spec, make_vec, to_torch  # noqa: F401
