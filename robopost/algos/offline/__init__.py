# SPDX-License-Identifier: Apache-2.0
"""Algorithms that learn from recorded data."""
