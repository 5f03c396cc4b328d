"""Pictures as SVG, written by hand. Colours are the page's own variables, so dark mode and print follow by themselves.

Every function takes plain numbers and texts and returns markup in which all texts are escaped.

Tried with matplotlib, 2026-11-26: its SVG has a style on every element, which the page's policy forbids, and neither
the 350 hover texts nor the colours of dark mode; a scatter took 0.5 s and 37 kB, where this page takes 0.01 s and
116 kB as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from embedcache.sweep.summary import Bin
from embedcache.wording import counted

Pair = tuple[float, float]
WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
LETTER = 6.3
"""The width of a letter of 11 pixels, on the safe side."""


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
    return [round(times * step, 12) for times in range(first, last + 1)]


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
        place = math.log10(value) if self.log else value
        share = (place - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Return the values to mark."""
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
        if len(powers) < 3:
            steps = [
                factor * 10.0**power
                for power in range(math.floor(self.low), math.ceil(self.high) + 1)
                for factor in (1, 2, 5)
            ]
            within = [step for step in steps if self.low - 1e-9 <= math.log10(step) <= self.high + 1e-9]
            return within if within else [10**self.low, 10**self.high]
        every = max(1, -(-len(powers) // 5))
        return [10.0**power for power in powers if (power - powers[0]) % every == 0]


def without_outliers(values: Sequence[float], ends: Sequence[float]) -> Pair:
    """Return the range of ``values`` and ``ends``, unless few of them would squeeze all others into a corner.

    Fences are three interquartile ranges beyond the quartiles, of the values and of the ends (Tukey 1977, "far out").
    """
    extent = min(*values, *ends), max(*values, *ends)
    if len(values) < 8:
        return extent
    near = [*_near(values), *_near(ends)]
    low, high = min(near), max(near)
    return (low, high) if 0 < high - low < 0.6 * (extent[1] - extent[0]) else extent


def _near(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first, third = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    reach = 3 * (third - first)
    return [value for value in ordered if first - reach <= value <= third + reach]


def short(name: str, most: int = 22) -> str:
    """Shorten a name in its middle, for names of one family often differ at their end; not yet escaped."""
    if len(name) <= most:
        return name
    tail = (most - 1) * 2 // 5
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def figure(inside: str, title: str, width: float = WIDTH, height: float = HEIGHT, fixed: bool = False) -> str:
    """Wrap drawing instructions in an SVG with an accessible name; ``fixed`` keeps its size rather than its place's."""
    size = f' class="fixed" width="{width:g}" height="{height:g}"' if fixed else ""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}"{size} role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{inside}</svg>"
    )


def axes(x: Scale, y: Scale, x_label: str, y_label: str, x_names: Sequence[str] | None = None) -> tuple[str, float]:
    """Draw grid, ticks and labels; ``x_names`` replaces numbers on the x axis, at 0, 1, 2, ...

    Returns the markup and the height that the picture needs: names that are too wide to stand side by side are turned.
    """
    parts = []
    for value in y.ticks():
        height = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{height + 3.5}" text-anchor="end">{number(value)}</text>')
    base = HEIGHT - BOTTOM
    marks = list(enumerate(x_names)) if x_names is not None else [(value, number(value)) for value in x.ticks()]
    widest = max((len(short(name)) for _, name in marks), default=0) * LETTER
    turned = x_names is not None and widest > (WIDTH - LEFT - RIGHT) / len(marks) - 6
    for value, name in marks:
        place = f'x="{x(value)}" y="{base + 16}" text-anchor="middle"'
        if turned:
            place = f'x="{x(value)}" y="{base + 14}" text-anchor="end" transform="rotate(-35 {x(value)} {base + 14})"'
        parts.append(f'<text class="tick" {place}>{escape(short(name))}<title>{escape(name)}</title></text>')
    height = HEIGHT + (max(0.0, widest * 0.5 - 4) if turned else 0.0)
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{height - 8:.1f}" text-anchor="middle">{escape(short(x_label, 40))}</text>'
    )
    across = (TOP + base) / 2
    parts.append(
        f'<text class="name" x="12" y="{across}" text-anchor="middle" transform="rotate(-90 12 {across})">'
        f"{escape(short(y_label, 28))}</text>"
    )
    return "".join(parts), height


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    title: str,
    *,
    log: bool = False,
    names: Sequence[str] | None = None,
    lines: Sequence[tuple[str, Sequence[Point]]] = (),
    even: bool = False,
) -> str:
    """Draw points with their intervals; ``lines`` join points of one series each; ``even`` draws y = x behind them.

    Points far from all others stand hollow at the edge, so that the others keep their room.
    """
    every = [*points, *(point for _, series in lines for point in series)]
    heights = [point.y for point in every]
    # Of hundreds of intervals none can be read.
    crowded = len(points) > 60
    drawn = [point for point in every if point.interval and not (crowded and point.style == "other")]
    y_domain = padded(without_outliers(heights, [end for point in drawn for end in point.interval or ()] or heights))
    spread = [point.x for point in every]
    if names is not None:
        domain = (-0.5, len(names) - 0.5)
    elif log:
        low, high = min(spread), max(spread)
        domain = (low / 1.3, high * 1.3) if high > low else (low / 3, high * 3)
    else:
        domain = padded(spread)
    if even:
        domain = y_domain = padded([*spread, *heights])
    x, y = Scale(domain, (LEFT, WIDTH - RIGHT), log), Scale(y_domain, (HEIGHT - BOTTOM, TOP))
    ground, height = axes(x, y, x_label, y_label, names)
    parts = [ground]
    if even:
        ends = f'x1="{x(domain[0])}" y1="{y(domain[0])}" x2="{x(domain[1])}" y2="{y(domain[1])}"'
        parts.append(f'<line class="even" {ends}/>')
    for number, (name, series) in enumerate(lines):
        colour = number % 5
        # Moved aside by a little, so that intervals at the same number of rows stand side by side.
        shift = 3.0 * colour
        path = " ".join(f"{x(point.x) + shift:.1f},{y(point.y)}" for point in series)
        parts.append(f'<polyline class="series s{colour}" points="{path}"><title>{escape(name)}</title></polyline>')
        parts += [_dot(point, x, y, f"s{colour}", shift) for point in series]
    order = {"other": 0, "group": 1, "chosen": 2}
    aside = _aside(points, x, len(names)) if names is not None else [0.0] * len(points)
    placed = sorted(zip(points, aside, strict=True), key=lambda place: order.get(place[0].style, 0))
    parts += [_dot(point, x, y, point.style, shift, crowded, 2.5 if even else 3.5) for point, shift in placed]
    return figure("".join(parts), title, height=round(height, 1))


def _aside(points: Sequence[Point], x: Scale, columns: int) -> list[float]:
    """Return how far each point of a column moves aside, in pixels, so that none hides another."""
    room = 0.7 * (x(1) - x(0)) if columns > 1 else 120.0
    columns_of: dict[float, list[int]] = {}
    for number, point in enumerate(points):
        columns_of.setdefault(point.x, []).append(number)
    shifts = [0.0] * len(points)
    for members in columns_of.values():
        step = min(9.0, room / max(len(members) - 1, 1))
        for place, number in enumerate(members):
            # 0, 1, -1, 2, -2, ...: the best, which come first, stand in the middle.
            shifts[number] = step * ((place + 1) // 2) * (1 if place % 2 else -1)
    return shifts


def _dot(
    point: Point, x: Scale, y: Scale, style: str, aside: float = 0.0, crowded: bool = False, radius: float = 3.5
) -> str:
    across = round(x(point.x) + aside, 1)
    bottom, top = HEIGHT - BOTTOM, TOP
    whisker = ""
    if point.interval is not None and not (crowded and style == "other"):
        low, high = (min(max(y(end), top), bottom) for end in point.interval)
        if low != high:
            whisker = f'<line class="whisker {style}" x1="{across}" x2="{across}" y1="{low}" y2="{high}"/>'
    down = min(max(y(point.y), top), bottom)
    off = " off" if down != y(point.y) else ""
    radius = 5 if style == "chosen" else radius
    dot = f'<circle class="dot {style}{off}" cx="{across}" cy="{down}" r="{radius}">'
    return f"{whisker}{dot}<title>{escape(point.title)}</title></circle>"


@dataclass(frozen=True)
class Spot:
    """A dot of a map: place, colour, the kinds of rings about it, a text shown on hover."""

    x: float
    y: float
    style: str
    rings: Sequence[str] = ()
    title: str = ""


def cloud(spots: Sequence[Spot], title: str) -> str:
    """Draw a map: dots without axes, as its directions mean nothing by themselves; those with rings on top."""
    width, height, edge = 560, 420, 12
    x = Scale(padded(without_outliers(xs := [spot.x for spot in spots], xs), 0.02), (edge, width - edge))
    y = Scale(padded(without_outliers(ys := [spot.y for spot in spots], ys), 0.02), (height - edge, edge))
    parts = []
    for spot in sorted(spots, key=lambda spot: len(spot.rings)):
        across, down = min(max(x(spot.x), edge / 2), width - edge / 2), min(max(y(spot.y), edge / 2), height - edge / 2)
        dot = f'<circle class="dot {spot.style}" cx="{across}" cy="{down}" r="2">'
        parts.append(f"{dot}<title>{escape(spot.title)}</title></circle>")
        for number, ring in enumerate(spot.rings):
            parts.append(f'<circle class="mark {escape(ring)}" cx="{across}" cy="{down}" r="{4.5 + 2 * number}"/>')
    return figure("".join(parts), title, width, height)


def interval_bar(value: float, ends: Pair | None, domain: Pair, style: str) -> str:
    """Draw one row of a leaderboard: the interval as a line, the score as a dot, on an axis that all rows share.

    What lies beyond the axis ends in an arrow at its edge.
    """
    x = Scale(domain, (6, 154))
    bar = ""
    if ends is not None and ends[1] > ends[0]:
        low, high = (min(max(end, domain[0]), domain[1]) for end in ends)
        bar = f'<line class="whisker {style}" x1="{x(low)}" x2="{x(high)}" y1="8" y2="8"/>'
    hover = f"{value:.4f}" if ends is None else f"{value:.4f}, interval {ends[0]:.4f} to {ends[1]:.4f}"
    reached = (value, *(ends or ()))
    if min(reached) < domain[0]:
        bar += f'<path class="dot {style}" d="M6 4 L1 8 L6 12 Z"/>'
    if max(reached) > domain[1]:
        bar += f'<path class="dot {style}" d="M154 4 L159 8 L154 12 Z"/>'
    dot = ""
    if domain[0] <= value <= domain[1]:
        dot = f'<circle class="dot {style}" cx="{x(value)}" cy="8" r="3.5"/>'
    return figure(f'<line class="grid" x1="6" x2="154" y1="8" y2="8"/>{bar}{dot}', hover, 160, 16)


def grid(values: Sequence[Sequence[float | None]], down: Sequence[str], across: Sequence[str], title: str, *,
         shares: Sequence[Sequence[float | None]], digits: int = 3) -> str:  # fmt: skip
    """Draw a heat map with its numbers in the cells; ``shares`` in [0, 1] colour it, and 0 is not drawn at all."""
    left = 14 + LETTER * max((len(short(name)) for name in down), default=1)
    written = [len(_cell(value, digits)) for line in values for value in line if value is not None]
    need = 10 + LETTER * max(written, default=1)
    cell = max(13.0, min(64.0, 640 / max(len(across), 1)))
    numbers = cell >= need
    tall = min(cell, 30.0)
    widest = LETTER * max((len(short(name)) for name in across), default=1)
    angle = 0 if widest <= cell - 4 else 45 if cell >= 20 else 90
    head = 20.0 if not angle else 16 + widest * (0.75 if angle == 45 else 1.0)
    width = left + cell * len(across) + (widest * 0.75 if angle == 45 else 8)
    height = head + tall * len(down) + 6
    box = f'x="{left:.1f}" y="{head:.1f}" width="{cell * len(across) - 1:.1f}" height="{tall * len(down) - 1:.1f}"'
    parts = [f'<rect class="none" {box}/>']
    for column, name in enumerate(across):
        x = left + cell * (column + 0.5) + (4 if angle == 90 else 0)
        turn = f' transform="rotate(-{angle} {x:.1f} {head - 5:.1f})"' if angle else ""
        anchor = "start" if angle else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{head - 5:.1f}" text-anchor="{anchor}"{turn}>{_named(name)}</text>'
        )
    for row, name in enumerate(down):
        y = head + tall * row
        parts.append(
            f'<text class="tick" x="{left - 6:.1f}" y="{y + tall / 2 + 3.5:.1f}" text-anchor="end">'
            f"{_named(name)}</text>"
        )
        for column, value in enumerate(values[row]):
            share = shares[row][column]
            if value is None or share is None:
                continue
            x = left + cell * column
            shown = _cell(value, digits)
            if share > 0 or digits:
                parts.append(
                    f'<rect class="heat" fill-opacity="{0.04 + 0.96 * share:.3f}" x="{x:.1f}" y="{y:.1f}" '
                    f'width="{cell - 1:.1f}" height="{tall - 1:.1f}"><title>{escape(name)} / {escape(across[column])}: '
                    f"{shown}</title></rect>"
                )
            if numbers:
                faint = " faint" if not value else ""
                parts.append(
                    f'<text class="tick cell{faint}" x="{x + cell / 2:.1f}" y="{y + tall / 2 + 3.5:.1f}" '
                    f'text-anchor="middle">{shown}</text>'
                )
    return figure("".join(parts), title, round(width, 1), round(height, 1), fixed=True)


def _cell(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def _named(name: str) -> str:
    return f"{escape(short(name))}<title>{escape(name)}</title>"


def reliability(bins: Sequence[Bin], title: str) -> str:
    """Draw how often the head is right against how sure it is."""
    x, y = Scale((0, 1), (LEFT, WIDTH - RIGHT)), Scale((0, 1), (HEIGHT - BOTTOM, TOP))
    ground, height = axes(x, y, "confidence", "share that is right")
    parts = [ground]
    parts.append(f'<line class="even" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    most = max((bar.rows for bar in bins), default=1) or 1
    for bar in bins:
        if bar.confidence is None or bar.accuracy is None or not bar.rows:
            continue
        hover = (
            f"{bar.low:.2f} to {bar.high:.2f}: confidence {bar.confidence:.3f}, right {bar.accuracy:.3f}, "
            f"{counted(bar.rows, 'row')}"
        )
        tall = (HEIGHT - BOTTOM - TOP) * 0.25 * bar.rows / most
        parts.append(
            f'<rect class="count" x="{x(bar.low) + 0.5}" width="{max(x(bar.high) - x(bar.low) - 1, 1):.1f}" '
            f'y="{HEIGHT - BOTTOM - tall:.1f}" height="{tall:.1f}"><title>{escape(hover)}</title></rect>'
        )
        parts.append(
            f'<circle class="dot chosen" cx="{x(bar.confidence)}" cy="{y(bar.accuracy)}" r="4">'
            f"<title>{escape(hover)}</title></circle>"
        )
    return figure("".join(parts), title, height=height)
