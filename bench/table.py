"""How a benchmark shows what it found: a table for people, a JSON for programs."""

import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TESTS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}


def print_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [list(map(str, row)) for row in [heads, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        first, *rest = row
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join(line))
        if number == 0:
            print("  ".join("-" * width for width in widths))


def judge(
    figures: Mapping[str, float], bars: Mapping[str, tuple[str, float]]
) -> list[dict[str, Any]]:
    """Each bar against its figure, printed a line each."""
    verdicts = []
    for name, (sign, bar) in bars.items():
        is_met = bool(_TESTS[sign](figures[name], bar))
        found = {"figure": name, "value": figures[name], "bar": bar, "sign": sign}
        verdicts.append({**found, "is_met": is_met})
        print(f"{'met   ' if is_met else 'MISSED'}  {name}: {figures[name]} (bar: {sign} {bar})")
    return verdicts


def write_json(path: Path, body: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1))
