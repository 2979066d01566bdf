# SPDX-License-Identifier: Apache-2.0
"""Algorithms, one file each."""
