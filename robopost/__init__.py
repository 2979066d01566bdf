# SPDX-License-Identifier: Apache-2.0
"""robopost: post-training for robot policies."""

__version__ = "0.1.0"
