# SPDX-License-Identifier: Apache-2.0
"""The model card of a merge: parents with hashes, method, coefficients, dtype, warnings, evaluation."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from robopost import __version__
from robopost.merging.config import METHODS

if TYPE_CHECKING:
    from robopost.merging.merge import Plan


def model_card(plan: Plan, hashes: dict[str, dict[str, str]], evaluation: dict[str, Any] | None) -> str:
    """README.md in Markdown with the front matter that the Hugging Face hub reads.

    Args:
        plan: of the merge.
        hashes: parent -> file -> SHA-256; empty where they were not computed.
        evaluation: a sweep's outcome: "rows" (list of dicts), "split" (how the coefficient was chosen).
    """
    config = plan.config
    codes = Counter(entry.code for entry in plan.entries.values())
    lines = ["---", "library_name: robopost", "tags: [robopost, merge]", "base_model:"]
    lines += [f"- {parent.name}" for parent in plan.parents]
    lines += ["---", "", "# Merged weights", "", f"`{config.method}`: {METHODS[config.method]}.", ""]
    lines += ["| setting | value |", "|---|---|"]
    if config.alpha:
        lines.append(f"| alpha | {config.alpha[0]:g} |")
    for module in sorted(set(plan.groups.values())):
        names = [name for name, group in plan.groups.items() if group == module]
        lines.append(f"| {module} ({len(names)} tensors) | {plan.alphas[names[0]]:g} |")
    if plan.family:
        lines.append(f"| module table | {plan.family} |")
    if config.weights:
        lines.append(f"| weights | {', '.join(f'{w:g}' for w in config.weights)} |")
    if config.method == "ties":
        lines.append(f"| kept of each task vector | {config.keep:g} |")
    if config.method == "dare":
        lines.append(f"| dropped of each task vector | {config.drop:g} (seed {config.seed}) |")
    if config.fresh:
        lines.append(f"| taken from {plan.parents[1].name} unmerged | {', '.join(config.fresh)} |")
    stored = config.dtype if config.dtype != "base" else ", ".join(sorted(codes))
    lines += [
        f"| dtype | {stored}, computed in float32 |",
        f"| tensors | {len(plan.entries)}, of which {len(plan.copied)} are not merged |",
        f"| made with | robopost {__version__} |",
        "",
        "## Parents",
        "",
    ]
    for position, parent in enumerate(plan.parents):
        role = "base" if position == 0 else "fine-tuned"
        lines.append(f"- {role}: `{parent.name}` ({parent.shards.nbytes / 1e9:.3g} GB)")
        lines += [f"    - `{file}` sha256 `{digest}`" for file, digest in hashes.get(parent.name, {}).items()]
    if plan.warnings:
        lines += ["", "## Warnings", "", *(f"- {line}" for line in plan.warnings)]
    if evaluation:
        lines += ["", "## Evaluation", "", *table(evaluation["rows"]), "", evaluation["split"]]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Dicts as a Markdown table; the keys of all of them are its columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
