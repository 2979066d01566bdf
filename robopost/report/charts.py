# SPDX-License-Identifier: Apache-2.0
"""Inline SVG: learning curves with seeds, interval bars. Colours come from the page's CSS and its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from robopost.evaluate.statistics import Interval, running, t_quantile
from robopost.results import number

COLOURS = 8  # --c0 .. --c7 in style.css
POINTS = 300  # drawn per line; more can't be seen
_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 260, 54, 14, 12, 34


@dataclass
class Curve:
    """One group's curve in a chart.

    Attributes:
        label: shown in tooltips and the legend.
        colour: index into the page's palette.
        x: (n,) steps of the thick line.
        y: (n,) its values.
        low: (n,) lower end of the shaded interval, or None.
        high: (n,) upper end.
        thin: (x, y) of single seeds, or of the unsmoothed values.
        mark: draw a dot with a tooltip at each point.
    """

    label: str
    colour: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    thin: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    mark: bool = False


Series = tuple[np.ndarray, np.ndarray]


def seed_curve(
    label: str, colour: int, seeds: Sequence[Series], bounds: tuple[Series, Series] | None
) -> Curve:
    """Mean over seeds with its 95 % Student-t interval; a single seed keeps its own interval, or is smoothed.

    Args:
        label: of the curve.
        colour: palette index.
        seeds: (steps, values) per seed, none empty.
        bounds: (low, high) series of a single evaluated seed.
    """
    if len(seeds) == 1:
        x, y = seeds[0]
        if bounds is not None and len(bounds[0][0]) == len(x) == len(bounds[1][0]):
            return Curve(label, colour, x, y, bounds[0][1], bounds[1][1], mark=True)
        if len(x) > 60:
            return Curve(label, colour, x, running(y, max(3, len(x) // 25)), thin=[(x, y)])
        return Curve(label, colour, x, y, mark=len(x) <= 30)
    # The mean covers only steps that every seed has reached: a seed that died must not bend it.
    first, last = max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds)
    if max(len(x) for x, _ in seeds) > 60:
        seeds = [(x, running(y, max(3, len(x) // 25))) for x, y in seeds]
    grid = np.unique(np.concatenate([x for x, _ in seeds]))
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) == 0:
        x, y = max(seeds, key=lambda s: len(s[0]))
        return Curve(label, colour, x[:0], y[:0], thin=list(seeds))
    values = np.stack([np.interp(grid, x, y) for x, y in seeds])
    mean = values.mean(axis=0)
    half = t_quantile(0.975, len(seeds) - 1) * values.std(axis=0, ddof=1) / math.sqrt(len(seeds))
    return Curve(label, colour, grid, mean, mean - half, mean + half, thin=list(seeds), mark=len(grid) <= 30)


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    percent: bool = False,
    x_label: str = "step",
    switches: Sequence[int] = (),
) -> str:
    """A chart of curves over steps as one `<figure>`.

    Args:
        title: caption.
        curves: at least one, with values.
        percent: fixes the axis to 0-100 %.
        x_label: unit of the x axis.
        switches: steps at which offline updates end and environment steps follow, marked by dashed lines.
    """
    xs = np.concatenate([part for c in curves for part in (c.x, *(x for x, _ in c.thin))])
    left, right = float(xs.min()), float(xs.max())
    left = 0.0 if 0 < left < 0.25 * right else left
    right = right if right > left else left + 1
    low, high = (0.0, 1.0) if percent else _range(curves)
    sx = lambda v: _LEFT + (np.asarray(v) - left) / (right - left) * (_W - _LEFT - _RIGHT)  # noqa: E731
    sy = lambda v: _TOP + (high - np.asarray(v)) / (high - low) * (_H - _TOP - _BOTTOM)  # noqa: E731
    parts = [f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(title)} over {escape(x_label)}">']
    for tick in ticks(low, high):
        y = float(sy(tick))
        text = f"{tick * 100:.0f} %" if percent else short(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in ticks(left, right, 6):
        x = float(sx(tick))
        anchor = "end" if x > _W - _RIGHT - 12 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{_H - 14}" text-anchor="{anchor}">{short(tick)}</text>'
        )
    for step in switches:
        if left < step < right:
            x = float(sx(step))
            line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_H - _BOTTOM}"'
            parts.append(f'<line class="switch" {line}><title>online from {x_label} {step:,}</title></line>')
    inner = f'x="{_LEFT}" y="{_TOP}" width="{_W - _LEFT - _RIGHT}" height="{_H - _TOP - _BOTTOM}"'
    # A nested svg clips what lies outside the axes without needing an id.
    parts.append(f'<svg {inner} viewBox="{_LEFT} {_TOP} {_W - _LEFT - _RIGHT} {_H - _TOP - _BOTTOM}">')
    for curve in curves:
        parts += _draw(curve, sx, sy)
    parts.append("</svg>")
    for curve in curves:
        parts += _marks(curve, sx, sy, percent, x_label)
    base = _H - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{base}" y2="{base}"/></svg>')
    caption = f'{escape(title)} <span class="dim">over {escape(x_label)}s</span>'
    return f'<figure class="chart"><figcaption>{caption}</figcaption>{"".join(parts)}</figure>'


def interval_bars(rows: Sequence[tuple[str, Interval, str]], *, percent: bool) -> str:
    """Horizontal interval bars on a shared axis; each row is (label, interval, CSS class)."""
    low, high = (0.0, 1.0) if percent else _padded([v for _, i, _ in rows for v in (i.low, i.high)])
    at = lambda v: f"{100 * (v - low) / (high - low):.2f}%"  # noqa: E731
    marks = ticks(low, high, 6)
    parts = [f'<span class="gridline" style="left:{at(tick)}"></span>' for tick in marks]
    for label, interval, kind in rows:
        width = f"{100 * (interval.high - interval.low) / (high - low):.2f}%"
        tip = escape(f"{label}: {interval.text(percent=percent)}", quote=True)
        # The name hangs on the side of the dot that has room.
        side = "end" if interval.value > (low + high) / 2 else "start"
        parts.append(
            f'<div class="bar {escape(kind)}" title="{tip}">'
            f'<span class="name {side}" style="--at:{at(interval.value)}">{escape(label)}</span>'
            f'<span class="span" style="left:{at(interval.low)};width:{width}"></span>'
            f'<span class="dot" style="left:{at(interval.value)}"></span></div>'
        )
    text = [f"{tick * 100:.0f} %" if percent else short(tick) for tick in marks]
    axis = "".join(f'<span style="left:{at(m)}">{t}</span>' for m, t in zip(marks, text, strict=True))
    return f'<div class="bars">{"".join(parts)}<div class="axis-labels">{axis}</div></div>'


def mini_bar(interval: Interval, low: float, high: float, colour: int) -> str:
    """A small interval bar for a table cell."""
    span = high - low if high > low else 1.0
    sx = lambda v: 4 + (min(max(v, low), high) - low) / span * 112  # noqa: E731
    a, b, v = sx(interval.low), sx(interval.high), sx(interval.value)
    return (
        f'<svg class="mini" viewBox="0 0 120 16" style="--c:var(--c{colour % COLOURS})" aria-hidden="true">'
        f'<line class="rail" x1="4" x2="116" y1="8" y2="8"/>'
        f'<rect class="span" x="{a:.1f}" y="5" width="{max(1.0, b - a):.1f}" height="6" rx="3"/>'
        f'<circle class="dot" cx="{v:.1f}" cy="8" r="4"/></svg>'
    )


def shown(interval: Interval, *, percent: bool = False) -> tuple[str, str, str]:
    """Value and ends with the same number of decimals: three figures, or one decimal of a percentage."""
    scale = 100.0 if percent else 1.0
    values = [v * scale for v in (interval.value, interval.low, interval.high)]
    largest = max(abs(v) for v in values)
    decimals = 1 if percent else max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0
    text = (f"{v:,.{decimals}f}" if decimals < 7 else f"{v:.2e}" for v in values)
    value, low, high = (t.replace("-", "\N{MINUS SIGN}") for t in text)
    return value, low, high


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    raw = (high - low) / max(1, count - 1)
    if not math.isfinite(raw) or raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [round(i * step, 12) for i in range(first, first + 3 * count) if i * step <= high + step * 1e-9]
    return found or [low]


def short(value: float) -> str:
    """Axis label: 1500 as 1.5k, 2000000 as 2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return "0" if value == 0 else f"{value:.3g}"


def _draw(curve: Curve, sx: object, sy: object) -> list[str]:
    style = f'style="--c:var(--c{curve.colour % COLOURS})"'
    parts = []
    if curve.low is not None and curve.high is not None and len(curve.x) > 1:
        x, low = _thin_out(curve.x, curve.low)
        _, high = _thin_out(curve.x, curve.high)
        points = _points(np.r_[x, x[::-1]], np.r_[low, high[::-1]], sx, sy)
        parts.append(f'<polygon class="band" {style} points="{points}"/>')
    for x, y in curve.thin:
        parts.append(f'<polyline class="thin" {style} points="{_points(*_thin_out(x, y), sx, sy)}"/>')
    if len(curve.x) > 1:
        points = _points(*_thin_out(curve.x, curve.y), sx, sy)
        parts.append(f'<polyline class="line" {style} points="{points}"/>')
    return parts


def _marks(curve: Curve, sx: object, sy: object, percent: bool, x_label: str) -> list[str]:
    if not curve.mark:
        return []
    parts = [f'<g class="marks" style="--c:var(--c{curve.colour % COLOURS})">']
    for i, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
        cx, cy = float(sx(x)), float(sy(y))  # type: ignore[operator]
        if curve.low is not None and curve.high is not None and len(curve.x) == 1:
            a, b = float(sy(curve.low[i])), float(sy(curve.high[i]))  # type: ignore[operator]
            parts.append(f'<line class="whisker" x1="{cx:.1f}" x2="{cx:.1f}" y1="{a:.1f}" y2="{b:.1f}"/>')
        value = f"{y * 100:.1f} %" if percent else number(float(y))
        place = f"{int(x):,}" if float(x).is_integer() else f"{x:g}"
        tip = f"{curve.label}, {x_label} {place}: {value}"
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3"><title>{escape(tip)}</title></circle>')
    return [*parts, "</g>"]


def _points(x: np.ndarray, y: np.ndarray, sx: object, sy: object) -> str:
    px, py = sx(x), sy(y)  # type: ignore[operator]
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))


def _thin_out(x: np.ndarray, y: np.ndarray) -> Series:
    """At most about POINTS points, with the minimum and maximum of each bin: spikes stay visible."""
    if len(x) <= POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), POINTS // 2):
        keep |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    values = [part for c in curves for part in (c.y, *(y for _, y in c.thin))]
    every = np.concatenate(values)
    every = every[np.isfinite(every)]
    if len(every) > 40:
        # A spike of the first updates must not flatten the rest of the curve; it is clipped at the frame.
        inner = np.quantile(every, [0.01, 0.99])
        if every.max() - every.min() > 4 * (inner[1] - inner[0]) > 0:
            every = inner
    low, high = float(every.min()), float(every.max())
    bands = [part for c in curves for part in (c.low, c.high) if part is not None]
    if bands:
        # The band of two seeds is many times their distance: it may add half the height, not more.
        reach = 0.5 * (high - low) if high > low else float("inf")
        edges = np.concatenate(bands)
        low, high = max(low - reach, min(low, edges.min())), min(high + reach, max(high, edges.max()))
    return _padded([low, high])


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = float(min(values)), float(max(values))
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    pad = 0.06 * (high - low)
    # Quantities that can't be negative keep an honest zero line where it is near.
    bottom = 0.0 if low >= 0 and low < 0.35 * high else low - pad
    return bottom, high + pad
