# SPDX-License-Identifier: Apache-2.0
"""Evaluation: rollouts, statistics and video."""
