"""Pictures as SVG, written by hand. Colours are the page's own variables, so dark mode and print follow by themselves.

Every function takes plain numbers and texts and returns markup in which all texts are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Pair = tuple[float, float]
WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44


@dataclass(frozen=True)
class Point:
    """A point of a scatter: place, interval, a text shown on hover, and how it looks."""

    x: float
    y: float
    interval: Pair | None = None
    title: str = ""
    style: str = "other"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten (Heckbert 1990)."""
    if not high > low:
        return [low]
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def number(value: float) -> str:
    """Write a number for an axis: short, and exact enough."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.0e}"
    if size < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"


def padded(values: Sequence[float], share: float = 0.06) -> Pair:
    """Return the range of values with some air."""
    low, high = min(values), max(values)
    air = (high - low) * share or abs(high) * share or 1.0
    return low - air, high + air


class Scale:
    """Values -> pixels, straight or logarithmic."""

    def __init__(self, domain: Pair, pixels: Pair, log: bool = False) -> None:
        self.log = log
        self.low, self.high = (math.log10(domain[0]), math.log10(domain[1])) if log else domain
        self.start, self.end = pixels

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        at = math.log10(value) if self.log else value
        share = (at - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Return the values to mark."""
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
        if len(powers) < 2:
            steps = [
                factor * 10.0**power
                for power in range(math.floor(self.low), math.ceil(self.high) + 1)
                for factor in (1, 2, 5)
            ]
            return [each for each in steps if self.low - 1e-9 <= math.log10(each) <= self.high + 1e-9]
        every = max(1, -(-len(powers) // 5))
        return [10.0**power for power in powers if (power - powers[0]) % every == 0]


def figure(inside: str, title: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """Wrap drawing instructions in an SVG with an accessible name."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{inside}</svg>"
    )


def axes(x: Scale, y: Scale, x_label: str, y_label: str, x_names: Sequence[str] | None = None) -> str:
    """Draw grid, ticks and labels; ``x_names`` replaces numbers on the x axis, at 0, 1, 2, ..."""
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5}" text-anchor="end">{number(value)}</text>')
    marks = list(enumerate(x_names)) if x_names is not None else [(value, number(value)) for value in x.ticks()]
    for value, name in marks:
        short = name if len(name) <= 12 else name[:11] + "…"
        parts.append(
            f'<text class="tick" x="{x(value)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(short)}'
            f"<title>{escape(name)}</title></text>"
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    across = (TOP + base) / 2
    parts.append(
        f'<text class="label" x="12" y="{across}" text-anchor="middle" transform="rotate(-90 12 {across})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    title: str,
    *,
    log: bool = False,
    names: Sequence[str] | None = None,
    lines: Sequence[tuple[str, Sequence[Point]]] = (),
) -> str:
    """Draw points with their intervals; ``lines`` join points of one series each, and name it at its end."""
    every = [*points, *(point for _, series in lines for point in series)]
    heights = [end for point in every for end in (point.interval or (point.y, point.y))] + [point.y for point in every]
    y = Scale(padded(heights), (HEIGHT - BOTTOM, TOP))
    spread = [point.x for point in every]
    if names is not None:
        domain = (-0.5, len(names) - 0.5)
    elif log:
        low, high = min(spread), max(spread)
        domain = (low / 1.3, high * 1.3) if high > low else (low / 3, high * 3)
    else:
        domain = padded(spread)
    x = Scale(domain, (LEFT, WIDTH - RIGHT), log)
    parts = [axes(x, y, x_label, y_label, names)]
    for at, (name, series) in enumerate(lines):
        path = " ".join(f"{x(point.x)},{y(point.y)}" for point in series)
        parts.append(f'<polyline class="series s{at % 5}" points="{path}"><title>{escape(name)}</title></polyline>')
        parts += [_dot(point, x, y, f"s{at % 5}") for point in series]
    order = {"other": 0, "group": 1, "chosen": 2}
    parts += [_dot(point, x, y, point.style) for point in sorted(points, key=lambda each: order.get(each.style, 0))]
    return figure("".join(parts), title)


def _dot(point: Point, x: Scale, y: Scale, style: str) -> str:
    whisker = ""
    if point.interval is not None:
        ends = f'y1="{y(point.interval[0])}" y2="{y(point.interval[1])}"'
        whisker = f'<line class="whisker {style}" x1="{x(point.x)}" x2="{x(point.x)}" {ends}/>'
    radius = 5 if style == "chosen" else 3.5
    dot = f'<circle class="dot {style}" cx="{x(point.x)}" cy="{y(point.y)}" r="{radius}">'
    return f"{whisker}{dot}<title>{escape(point.title)}</title></circle>"


def interval_bar(value: float, ends: Pair | None, domain: Pair, style: str) -> str:
    """Draw one row of a leaderboard: the interval as a line, the score as a dot, on an axis that all rows share."""
    x = Scale(domain, (4, 156))
    bar = ""
    if ends is not None:
        low, high = (min(max(end, domain[0]), domain[1]) for end in ends)
        bar = f'<line class="whisker {style}" x1="{x(low)}" x2="{x(high)}" y1="8" y2="8"/>'
    said = f"{value:.4f}" if ends is None else f"{value:.4f}, interval {ends[0]:.4f} to {ends[1]:.4f}"
    line = '<line class="grid" x1="4" x2="156" y1="8" y2="8"/>'
    return figure(f'{line}{bar}<circle class="dot {style}" cx="{x(value)}" cy="8" r="3.5"/>', said, 160, 16)


def grid(values: Sequence[Sequence[float | None]], down: Sequence[str], across: Sequence[str], title: str, *,
         shares: Sequence[Sequence[float]] | None = None, digits: int = 3) -> str:  # fmt: skip
    """Draw a heat map with its numbers in the cells; ``shares`` in [0, 1] colour it, else its own range does."""
    known = [value for line in values for value in line if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    longest = max((len(name) for name in down), default=1)
    left = min(150, 12 + 6.2 * min(longest, 22))
    cell = max(18.0, min(64.0, 560 / max(len(across), 1)))
    tall = min(cell, 30.0)
    slanted = max((len(name) for name in across), default=1) * 6.2 > cell - 4
    head = min(130.0, 14 + 4.6 * max((min(len(name), 22) for name in across), default=1)) if slanted else 20.0
    width, height = left + cell * len(across) + (head * 0.8 if slanted else 8), head + tall * len(down) + 6
    parts = []
    for at, name in enumerate(across):
        x = left + cell * (at + 0.5)
        turn = f' transform="rotate(-45 {x:.1f} {head - 5:.1f})"' if slanted else ""
        anchor = "start" if slanted else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{head - 5:.1f}" text-anchor="{anchor}"{turn}>{_short(name)}</text>'
        )
    for row, name in enumerate(down):
        y = head + tall * row
        parts.append(
            f'<text class="tick" x="{left - 6:.1f}" y="{y + tall / 2 + 3.5:.1f}" text-anchor="end">'
            f"{_short(name)}</text>"
        )
        for column, value in enumerate(values[row]):
            x = left + cell * column
            if value is None:
                parts.append(
                    f'<rect class="none" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{tall - 1:.1f}"/>'
                )
                continue
            share = shares[row][column] if shares is not None else (value - low) / ((high - low) or 1.0)
            dark = " over" if share > 0.55 else ""
            parts.append(
                f'<rect class="heat" fill-opacity="{0.04 + 0.96 * share:.3f}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{cell - 1:.1f}" height="{tall - 1:.1f}"><title>{escape(name)} / {escape(across[column])}: '
                f"{value:g}</title></rect>"
            )
            if cell >= 26:
                said = f"{value:,.{digits}f}" if digits else f"{value:,.0f}"
                parts.append(
                    f'<text class="tick cell{dark}" x="{x + cell / 2:.1f}" y="{y + tall / 2 + 3.5:.1f}" '
                    f'text-anchor="middle">{said}</text>'
                )
    return figure("".join(parts), title, round(width, 1), round(height, 1))


def _short(name: str) -> str:
    return f"{escape(name if len(name) <= 22 else name[:21] + '…')}<title>{escape(name)}</title>"


def reliability(bins: Sequence[tuple[float, float, float | None, float | None, int]], title: str) -> str:
    """Draw how often the head is right against how sure it is: (low, high, confidence, accuracy, rows) a bin."""
    x, y = Scale((0, 1), (LEFT, WIDTH - RIGHT)), Scale((0, 1), (HEIGHT - BOTTOM, TOP))
    parts = [axes(x, y, "confidence", "share that is right")]
    parts.append(f'<line class="even" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    most = max((each[4] for each in bins), default=1) or 1
    for low, high, confidence, accuracy, rows in bins:
        if confidence is None or accuracy is None or not rows:
            continue
        said = f"{low:.2f} to {high:.2f}: confidence {confidence:.3f}, right {accuracy:.3f}, {rows:,} rows"
        tall = (HEIGHT - BOTTOM - TOP) * 0.25 * rows / most
        parts.append(
            f'<rect class="count" x="{x(low) + 0.5}" width="{max(x(high) - x(low) - 1, 1):.1f}" '
            f'y="{HEIGHT - BOTTOM - tall:.1f}" height="{tall:.1f}"><title>{escape(said)}</title></rect>'
        )
        parts.append(
            f'<circle class="dot chosen" cx="{x(confidence)}" cy="{y(accuracy)}" r="4">'
            f"<title>{escape(said)}</title></circle>"
        )
    return figure("".join(parts), title)
