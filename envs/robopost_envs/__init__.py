# SPDX-License-Identifier: Apache-2.0
"""Environments of robopost, registered on import."""
