# SPDX-License-Identifier: Apache-2.0
"""Parts of the help texts that come from the config tree and the schema; imports no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from robopost.config_files import file_options, search_dirs

MORE = {
    "policy": ", or a run folder",
    "env": ", or a Gymnasium id such as Hopper-v5",
    "data": ", or a path",
}


def available(groups: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> str:
    """What can be chosen in each config group, one paragraph per group."""
    dirs = search_dirs(config_dirs)
    lines = ["available:"]
    for group in groups:
        text = ", ".join(file_options(group, dirs)) + MORE.get(group, "")
        lines += textwrap.wrap(
            text,
            108,
            initial_indent=f"  {group + '=':<9}",
            subsequent_indent=" " * 11,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def settings(root: str) -> str:
    """The settings of a command, `key=default` and what it means."""
    from robopost import config
    from robopost.cli.explain import rows
    from robopost.merging.config import MergeConfig

    schema = {
        "eval": config.EvalConfig,
        "collect": config.CollectConfig,
        "demo": config.DemoConfig,
        "merge": MergeConfig,
    }[root]
    lines = ["settings:"]
    for key, _, default, note in rows(schema):
        shown = "" if default in ("(must be set)", "null", '""', "[]", "{}") else default
        lines.append(f"  {key + '=' + shown:<22}{note}")
    return "\n".join(lines)
