"""What benchmarks have recorded, for the notebooks: tables of RESULTS.md, and files of experiments/benchmarks/results.

RESULTS.md is where figures are kept, with the commands and the machine that they come from. Notebooks take them from
there, so that a figure that is measured anew changes in one place.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "RESULTS.md"


class RecordError(ValueError):
    """Something that is not recorded; the text says what is."""


def tables(heading: str, text: str | None = None) -> list[list[dict[str, str]]]:
    """The tables of the section of RESULTS.md that begins with `## heading`: rows as {column: cell}.

    Raises `RecordError`.
    """
    sections = re.split(r"^## ", RESULTS.read_text() if text is None else text, flags=re.MULTILINE)[1:]
    by_heading = dict(section.split("\n", 1) for section in sections)
    if heading not in by_heading:
        raise RecordError(f"RESULTS.md has no section {heading!r}; it has {', '.join(map(repr, by_heading))}")
    found: list[list[list[str]]] = [[]]
    for line in by_heading[heading].splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[dict(zip(lines[0], line, strict=True)) for line in lines[2:]] for lines in found if lines]


def table(heading: str, column: str) -> list[dict[str, str]]:
    """The first table of a section that has this column. Raises `RecordError`."""
    for rows in tables(heading):
        if column in rows[0]:
            return rows
    raise RecordError(f"no table under {heading!r} in RESULTS.md has the column {column!r}")


def numbers(cell: str) -> list[float]:
    """The numbers in a cell, in their order: "47.84 (46.25)" has two."""
    return [float(found) for found in re.findall(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", cell)]


def number(cell: str) -> float:
    """The first number in a cell, 0 where there is none."""
    return (numbers(cell) or [0.0])[0]


def recorded(name: str) -> Any:
    """What a file of experiments/benchmarks/results holds: .json whole, .jsonl as a list; None where there is none."""
    path = BENCHMARKS / "results" / name
    if not path.exists():
        return None
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
