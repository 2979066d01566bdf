# SPDX-License-Identifier: Apache-2.0
"""Policies: raw observations in, executable actions out."""
