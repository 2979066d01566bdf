# SPDX-License-Identifier: Apache-2.0
"""Trackers: JSONL always, TensorBoard by default, the console, and W&B or trackio where asked for."""

from robopost.track.base import MultiTracker, TrackContext, Tracker, make_tracker
from robopost.track.jsonl import read_metrics

__all__ = ["MultiTracker", "TrackContext", "Tracker", "make_tracker", "read_metrics"]
