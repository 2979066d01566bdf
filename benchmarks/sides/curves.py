# SPDX-License-Identifier: Apache-2.0
"""Learning curves of several methods as one SVG that a document can show: over environment steps and over seconds."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from sides.bases import ROOT

from robopost.report.charts import Curve, line_chart, seed_curve

WIDTH, HEIGHT, LEGEND, GAP = 520, 260, 56, 22
AXES = (("step", "environment step"), ("cpu", "CPU second"), ("wall", "wall second"))
COLOURS = ("#2563eb", "#d9541e", "#12805c", "#9333ea", "#b7791f", "#0e7490", "#be185d", "#4d5666")
STYLE = """text{font-family:system-ui,sans-serif;fill:#4d5666}.grid{stroke:#dde2ea}.axis{stroke:#4d5666;opacity:.6}
.tick{font-size:11.5px}.name{font-size:13px}.head{font-size:13px;font-weight:600}.line{fill:none;stroke:var(--c);
stroke-width:2.2;stroke-linejoin:round}.marks circle{fill:#fff;
stroke:var(--c);stroke-width:1.5;r:2px}"""


def write_plot(task: str, methods: dict[str, list[dict[str, Any]]], metric: str) -> Path:
    """docs/images/finetune_<task>.svg from the cells of each method: means over seeds."""
    path = ROOT / "docs" / "images" / f"finetune_{task}.svg"
    path.write_text(plot(task, methods, metric), encoding="utf-8")
    return path


def plot(task: str, methods: dict[str, list[dict[str, Any]]], metric: str) -> str:
    """The SVG: one chart per axis, side by side, and a legend."""
    charts = []
    for key, label in AXES:
        curves = [curve(name, index, cells, key) for index, (name, cells) in enumerate(methods.items())]
        charts.append((line_chart(metric, curves, percent=metric == "success", x_label=label), label))
    width = len(charts) * (WIDTH + GAP)
    palette = ";".join(f"--c{index}:{colour}" for index, colour in enumerate(COLOURS))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + LEGEND}">']
    parts += [
        f"<style>svg{{{palette}}}{STYLE}</style>",
        f'<rect width="{width}" height="{HEIGHT + LEGEND}" fill="#fff"/>',
    ]
    for index, (chart, label) in enumerate(charts):
        x = index * (WIDTH + GAP)
        parts.append(
            f'<text class="head" x="{x + 54}" y="18">{escape(f"{task}: {metric} over {label}s")}</text>'
        )
        inner = re.search(r"<svg.*</svg>", chart, re.DOTALL)
        assert inner is not None, "a chart is an SVG in a figure"
        parts.append(inner[0].replace("<svg ", f'<svg x="{x}" y="24" width="{WIDTH}" height="{HEIGHT}" ', 1))
    at = 54
    for index, name in enumerate(methods):
        y = HEIGHT + LEGEND - 12
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="{at}" y="{y - 9}" width="22" height="4" fill="{colour}"/>')
        parts.append(f'<text class="name" x="{at + 28}" y="{y}">{escape(name)}</text>')
        at += 60 + 8 * len(name)
    return "\n".join([*parts, "</svg>\n"])


def curve(name: str, colour: int, cells: list[dict[str, Any]], key: str) -> Curve:
    """Mean over seeds of the means over episodes; seven bands on top of each other would hide it."""
    series = [
        (
            np.array([float(entry[key]) for entry in cell["curve"]]),
            np.array([float(np.mean(entry["values"])) for entry in cell["curve"]]),
        )
        for cell in cells
    ]
    return replace(seed_curve(name, colour, series, None), low=None, high=None, thin=[])
