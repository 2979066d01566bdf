# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page from run folders: evaluations, curves, videos, configs, provenance."""

from robopost.report.page import Comparison, write_report
from robopost.report.runs import RunData, load_run, load_runs

__all__ = ["Comparison", "RunData", "load_run", "load_runs", "write_report"]
