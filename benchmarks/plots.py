"""Charts on logarithmic axes as SVG, without a library: the same figures give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 40, 50  # margins; the legend is on the right
COLOURS = ("#0b6e99", "#c8553d", "#4f772d", "#7b4b94", "#b5838d", "#6c757d", "#d4a017", "#1d3557")


def chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Points], dots: Mapping[str, Points] = {}) -> str:
    """A chart of positive points: `lines` are joined, `dots` are not. A name with points in both has one colour."""
    names = list(dict.fromkeys([*lines, *dots]))
    everything = [point for points in (*lines.values(), *dots.values()) for point in points]
    if not everything:
        raise ValueError("lines, dots: expected points, got none")
    x_low, x_high = _bounds([x for x, _ in everything])
    y_low, y_high = _bounds([y for _, y in everything])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for value in _ticks(x_low, x_high):
        x, y = place(value, 10**y_low)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{_short(value)}</text>')
    for value in _ticks(y_low, y_high):
        x, y = place(10**x_low, value)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for number, name in enumerate(names):
        colour = COLOURS[number % len(COLOURS)]
        if path := lines.get(name, ()):
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in path))
            parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in (place(*point) for point in (*lines.get(name, ()), *dots.get(name, ()))):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        height = TOP + 12 + 18 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{height - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 26}" y="{height}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Logarithms a little beyond the smallest and largest value, at least half a decade apart."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.05 * (high - low), (0.5 - (high - low)) / 2, 0.05)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two logarithms: decades, and what is between them where there are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if high - low < 3 else (1,)
    return [step * 10.0**decade for decade in decades for step in steps if low <= math.log10(step) + decade <= high]


def _short(value: float) -> str:
    """512, 4k, 0.05."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
