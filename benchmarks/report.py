"""Print lines of results as the Markdown tables of docs/measuring.md.

It measures nothing and leaves nothing out: every line of the file is in a table. Conditions that
all lines of a table share stand above it once.

    python benchmarks/report.py benchmarks/results/latest.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "kernels": "Kernels",
    "errors": "Errors beside float64",
    "storage": "Reading blocks",
    "decode": "Decode",
    "overlap": "What explains a streamed token's time",
    "hits": "System calls of a token",
    "prefill": "Prefill",
    "peers": "Beside llama.cpp and mlx-lm",
    "context": "Time per token against context",
    "trace": "What recording costs",
    "python_share": "Share of Python in a decode step",
}
EVERYWHERE = ("machine", "system", "python", "versions", "commit")


def main() -> int:
    """Print every table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+")
    options = parser.parse_args()
    rows = [json.loads(line) for file in options.file for line in file.read_text().splitlines()]
    if not rows:
        print("no results", file=sys.stderr)
        return 1
    print("\n\n".join(tables(rows)))
    return 0


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One table a benchmark, in the order of TITLES, then those that it does not know."""
    names = list(dict.fromkeys([*TITLES, *(row["benchmark"] for row in rows)]))
    groups = {name: [row for row in rows if row["benchmark"] == name] for name in names}
    return [table(TITLES.get(name, name), group) for name, group in groups.items() if group]


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Heading, shared conditions, and a line a result."""
    common, own = _conditions(rows)
    columns = ["case", "variant", _unit(rows), "±", "n", *_optional(rows), *own]
    lines = [f"### {title}", "", common, "", _line(columns), _line(["---"] * len(columns))]
    lines += [_line(_cells(row, rows, own)) for row in rows]
    return "\n".join(lines)


def _cells(row: dict[str, Any], rows: Sequence[dict[str, Any]], own: Sequence[str]) -> list[str]:
    cells = [row["case"], row["variant"], number(row["value"])]
    if len({r["unit"] for r in rows}) > 1:
        cells[-1] += f" {row['unit']}"
    cells += [number(row["spread"]), str(row["repetitions"])]
    if "ratio" in _optional(rows):
        ratio, to = row["ratio"], row["ratio_to"]
        cells.append("" if ratio is None else f"{number(ratio)} of {to}" if to else number(ratio))
    if "error (rms)" in _optional(rows):
        error = row["error_rms"]
        cells.append("" if error is None else f"{error:.1e}")
    return cells + [_word(row["conditions"].get(name)) for name in own]


def _optional(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    if any(row["ratio"] is not None for row in rows):
        found.append("ratio")
    if any(row["error_rms"] is not None for row in rows):
        found.append("error (rms)")
    return found


def _unit(rows: Sequence[dict[str, Any]]) -> str:
    units = {row["unit"] for row in rows}
    return units.pop() if len(units) == 1 else "value"


def _conditions(rows: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """What all rows share, in words, and the names of what differs."""
    names = list(dict.fromkeys(name for row in rows for name in row["conditions"]))
    shared, own = [], []
    for name in names:
        values = {json.dumps(row["conditions"].get(name), sort_keys=True) for row in rows}
        if len(values) == 1:
            value = _word(json.loads(values.pop()))
            if value:
                shared.append(f"{name.replace('_', ' ')} {value}")
        elif name not in EVERYWHERE:
            own.append(name)
    return "; ".join(shared) + ".", own


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    size = abs(value)
    if size == 0:
        return "0"
    if 1e-3 <= size < 1e5:
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 4
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def _word(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_word(each)}" for key, each in value.items())
    return str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
