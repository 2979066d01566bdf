# SPDX-License-Identifier: Apache-2.0
"""Recorded experience: episodes, stores, datasets, replay buffers and foreign formats."""
