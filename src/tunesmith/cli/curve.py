"""Series of numbers as text: one line (`spark`) or a plot with its scale (`curve`)."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

_STEPS = "▁▂▃▄▅▆▇█"


def spark(values: Iterable[float | None], width: int = 24) -> str:
    """One line of blocks, at most `width` wide; numbers that are not finite are left out."""
    points = shrink(_finite(values), width)
    if not points:
        return ""
    low, high = min(points), max(points)
    return "".join(_STEPS[round(_share(point, low, high) * 7)] for point in points)


def curve(values: Iterable[float | None], width: int = 60, height: int = 8) -> str:
    """A plot of `height` lines with the highest and lowest value at its left.

    Numbers that are not finite are left out; without any, the answer is `(no values)`.
    """
    series = _finite(values)
    if not series:
        return "(no values)"
    points = shrink(series, max(1, width - 10))
    low, high = min(points), max(points)
    levels = [1 + round(_share(point, low, high) * (height * 8 - 1)) for point in points]
    lines = [_row(levels, row) for row in reversed(range(height))]
    scale = [f"{high:>8.4g}", *[" " * 8] * (height - 2), f"{low:>8.4g}"]
    return "\n".join(f"{mark} │{line.rstrip()}" for mark, line in zip(scale, lines, strict=True))


def shrink(points: Sequence[float], width: int) -> list[float]:
    """At most `width` values, each the mean of its equal part of the series."""
    if len(points) <= width:
        return list(points)
    edges = [index * len(points) // width for index in range(width + 1)]
    return [math.fsum(points[start:end]) / (end - start) for start, end in pairwise(edges)]


def _row(levels: Sequence[int], row: int) -> str:
    cells = (min(8, max(0, level - 8 * row)) for level in levels)
    return "".join(_STEPS[cell - 1] if cell else " " for cell in cells)


def _share(point: float, low: float, high: float) -> float:
    return (point - low) / (high - low) if high > low else 0.5


def _finite(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]
