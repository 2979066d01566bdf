# SPDX-License-Identifier: Apache-2.0
"""The plot of a sweep: old skill, new skill and variations against the coefficient, as one SVG file."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from robopost.report.charts import Curve, line_chart

if TYPE_CHECKING:
    from robopost.merging.sweep import Sweep

COLOURS = ("#2563eb", "#d9541e", "#12805c", "#9333ea")
LABELS = {"old": "old skill", "new": "new skill", "variation": "variations of the new skill"}
STYLE = """text{font-family:system-ui,sans-serif;fill:#4d5666}.grid{stroke:#dde2ea}.axis{stroke:#4d5666;opacity:.6}
.tick{font-size:11.5px}.name{font-size:13px}.head{font-size:13px;font-weight:600}.band{fill:var(--c);opacity:.14}
.line{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round}.marks circle{fill:#fff;stroke:var(--c);
stroke-width:1.8}.whisker{stroke:var(--c);stroke-width:3;opacity:.4}"""
WIDTH, HEIGHT, TOP, LEGEND = 520, 260, 24, 50


def sweep_svg(sweep: Sweep) -> str:
    """The validation scores of the sweep's line of points with 95 % intervals."""
    curves: list[Curve] = []
    measure = "success"
    for task in (name for name in LABELS if name in sweep.tasks):
        cells = [sweep.cell(point, task, "validation") for point in sweep.line]
        found = [cell for cell in cells if cell is not None]
        x, y, low, high = (
            np.array([float(cell[key]) for cell in found]) for key in ("x", "value", "low", "high")
        )
        measure = found[0]["measure"]
        curves.append(Curve(LABELS[task], len(curves), x, y, low, high, mark=True))
    changes = sweep.line[0].changes or {}
    first = next(iter(changes["modules"])) if sweep.config.search else ""
    axis = f"coefficient of {first}" if first else "alpha"
    figure = line_chart(measure, curves, percent=measure == "success", x_label=axis)
    inner = re.search(r"<svg.*</svg>", figure, re.DOTALL)
    assert inner is not None, "a chart is an SVG in a figure"
    height = TOP + HEIGHT + LEGEND
    palette = ";".join(f"--c{index}:{colour}" for index, colour in enumerate(COLOURS))
    title = f"{measure} over {axis}" + (f", chosen: {sweep.chosen}" if sweep.chosen else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f"<style>svg{{{palette}}}{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text class="head" x="54" y="18">{escape(title)}</text>',
        inner[0].replace("<svg ", f'<svg x="0" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" ', 1),
    ]
    at = 54
    for curve in curves:
        y = TOP + HEIGHT + 16
        parts.append(f'<rect x="{at}" y="{y - 9}" width="22" height="4" fill="{COLOURS[curve.colour]}"/>')
        parts.append(f'<text class="name" x="{at + 28}" y="{y}">{escape(curve.label)}</text>')
        at += 56 + 7 * len(curve.label)
    note = "shaded: 95 % intervals; validation episodes, the same for every coefficient"
    parts.append(f'<text class="tick" x="54" y="{height - 8}">{note}</text>')
    return "\n".join([*parts, "</svg>\n"])
