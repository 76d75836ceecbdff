"""Several systems side by side on the same objects: means with intervals, and differences object by object.

Objects differ far more than systems do, so intervals of two means may overlap although one system is better on nearly
every object. `differences` therefore bootstraps over the objects' own differences, on the objects that both systems
have; it is what a claim that one system is better rests on.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hi3d_jax.atomic import written_aside
from hi3d_jax.evaluation.report import comparison_report
from hi3d_jax.evaluation.runs import pictures_of
from hi3d_jax.evaluation.tables import (
    Row,
    Summary,
    arrow_label,
    as_markdown,
    bootstrap_interval,
    interval_text,
    metric,
    object_means,
    summarise,
)

Systems = Mapping[str, Sequence[Row]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One metric of a system minus that of another over the objects that both have, and on how many it is better."""

    mean: float
    low: float | None
    high: float | None
    objects: int
    better: int


def differences(rows: Sequence[Row], reference: Sequence[Row]) -> dict[str, Difference]:
    """By metric; one that the two have on no object in common is left out."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row.scores):
        ours, theirs = object_means(name, rows), object_means(name, reference)
        both = [object_name for object_name in ours if object_name in theirs]
        if both:
            values = np.array([ours[each] - theirs[each] for each in both])
            low, high = bootstrap_interval(values) if len(values) > 1 else (None, None)
            better = int((metric(name).better * values > 0).sum())
            found[name] = Difference(float(values.mean()), low, high, len(both), better)
    return found


def comparison_cells(systems: Systems) -> list[list[str]]:
    """Mean and interval of each metric, the best mean between asterisks, the head first: one line per system."""
    summaries = {name: summarise(rows) for name, rows in systems.items()}
    columns = _columns(summaries.values())
    best = {name: _best(name, summaries.values()) for name in columns}
    lines = [
        [system, str(_objects(summary)), *(_cell(name, summary.get(name), best[name]) for name in columns)]
        for system, summary in summaries.items()
    ]
    return [["system", "objects", *map(arrow_label, columns)], *lines]


def difference_cells(systems: Systems, reference: str) -> list[list[str]]:
    """Each other system's `differences` from `reference`, the head first: one line per system."""
    others = {name: differences(rows, systems[reference]) for name, rows in systems.items() if name != reference}
    columns = _columns(others.values())
    lines = [
        [f"{system} - {reference}", *(_difference_cell(name, found.get(name)) for name in columns)]
        for system, found in others.items()
    ]
    return [["difference", *map(arrow_label, columns)], *lines]


def seed_cells(systems: Systems) -> list[list[str]]:
    """What the choice of a seed is worth, the head first: a line per system and metric, nothing for single seeds."""
    lines = [
        [
            system,
            arrow_label(name),
            *(f"{value:.{metric(name).digits}f}" for value in (each.mean, each.best, each.spread)),
        ]
        for system, rows in systems.items()
        for name, each in summarise(rows).items()
        if each.best is not None
    ]
    return [["system", "metric", "mean of seeds", "best seed of each object", "spread over seeds"], *lines]


def write_comparison(
    folder: Path, title: str, about: Mapping[str, Any], systems: Systems, reference: str | None = None
) -> str:
    """Writes comparison.md, .csv, .json and .html into `folder`, and returns the tables as Markdown.

    `reference` is the system that the others are held against. The report takes the pictures that `score_all` left in
    the folders `folder`/SYSTEM.
    """
    tables = {"Means and 95 % intervals over objects": comparison_cells(systems)}
    if reference is not None and len(systems) > 1:
        label = f"Differences from {reference}, object by object: mean (95 % interval; on how many objects better)"
        tables[label] = difference_cells(systems, reference)
    if len(over_seeds := seed_cells(systems)) > 1:
        tables["Over seeds"] = over_seeds
    pictures = {name: {row.name: pictures_of(folder / name, row) for row in rows} for name, rows in systems.items()}
    text = "\n\n".join(f"{label}:\n\n{as_markdown(cells)}" for label, cells in tables.items()) + "\n"
    _write(folder / "comparison.md", text)
    _write(folder / "comparison.csv", _as_csv(systems, reference))
    _write(folder / "comparison.json", json.dumps(_document(about, systems, reference), indent=1) + "\n")
    _write(folder / "comparison.html", comparison_report(title, about, tables, pictures))
    return text


def _document(about: Mapping[str, Any], systems: Systems, reference: str | None) -> dict[str, Any]:
    """Everything as JSON: every row too, so that other statistics can be made from it."""
    return {
        "about": dict(about),
        "reference": reference,
        "systems": {
            name: {
                "summary": {each: dataclasses.asdict(found) for each, found in summarise(rows).items()},
                "differences": {
                    each: dataclasses.asdict(found)
                    for each, found in (differences(rows, systems[reference]) if reference else {}).items()
                },
                "rows": [dataclasses.asdict(row) for row in rows],
            }
            for name, rows in systems.items()
        },
    }


def _as_csv(systems: Systems, reference: str | None) -> str:
    """One line per system and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ["difference", "difference low", "difference high", "better on"] if reference else []
    writer.writerow(["system", "metric", "objects", "mean", "low", "high", *ends])
    for system, rows in systems.items():
        held = differences(rows, systems[reference]) if reference else {}
        for name, found in summarise(rows).items():
            numbers = [found.mean, found.low, found.high]
            if name in held:
                numbers += [held[name].mean, held[name].low, held[name].high]
            cells = ["" if number is None else f"{number:.6g}" for number in numbers]
            writer.writerow([system, name, found.objects, *cells, *([held[name].better] if name in held else [])])
    return text.getvalue()


def _columns(found: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in found for name in each))


def _objects(summaries: Mapping[str, Summary]) -> int:
    return max((summary.objects for summary in summaries.values()), default=0)


def _best(name: str, summaries: Iterable[Mapping[str, Summary]]) -> float:
    means = [summary[name].mean for summary in summaries if name in summary]
    return max(means) if metric(name).better > 0 else min(means)


def _cell(name: str, summary: Summary | None, best: float) -> str:
    if summary is None:
        return ""
    mean, interval = f"{summary.mean:.{metric(name).digits}f}", interval_text(summary, metric(name).digits)
    return (f"**{mean}**" if summary.mean == best else mean) + (f" ({interval})" if interval else "")


def _difference_cell(name: str, found: Difference | None) -> str:
    if found is None:
        return ""
    digits = metric(name).digits
    interval = "" if found.low is None else f"{found.low:+.{digits}f} to {found.high:+.{digits}f}; "
    return f"{found.mean:+.{digits}f} ({interval}{found.better} of {found.objects})"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
