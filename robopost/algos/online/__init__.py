# SPDX-License-Identifier: Apache-2.0
"""Algorithms that learn from an environment."""
