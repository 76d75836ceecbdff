"""Scores of many objects as a table: one row per object and seed, and what they say together.

Objects are the unit of all statistics: the seeds of an object are averaged first. Intervals are percentile bootstraps
over objects (Efron 1979): they tell how the mean would move with other objects of the same kind, not with other seeds,
whose spread is a column of its own. `best` picks the best seed of each object by that metric, against the truth: what
papers that choose by hand report, and an upper bound that no user gets.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hi3d_jax.evaluation.views import WITHOUT_FIRST

RESAMPLES = 10_000
LEVEL = 0.95


class Metric(NamedTuple):
    """How a metric is shown and which way is better (+1 more, -1 less)."""

    label: str
    better: int
    digits: int


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR (dB)", +1, 2),
    "ssim": Metric("SSIM 7x7", +1, 4),
    "ssim_gaussian": Metric("SSIM Gaussian", +1, 4),
    "lpips_vgg": Metric("LPIPS vgg", -1, 4),
    "lpips_alex": Metric("LPIPS alex", -1, 4),
    "dists": Metric("DISTS", -1, 4),
    "chamfer": Metric("Chamfer", -1, 4),
    "iou": Metric("Volume IoU", +1, 4),
    "f_score_01": Metric("F-score .01", +1, 4),
    "f_score_02": Metric("F-score .02", +1, 4),
    "normal_consistency": Metric("Normals", +1, 4),
    "mesh_psnr": Metric("mesh PSNR (dB)", +1, 2),
    "mesh_ssim": Metric("mesh SSIM", +1, 4),
    "silhouette_iou": Metric("Silhouette IoU", +1, 4),
    "watertight": Metric("Watertight", +1, 2),
}


def metric(name: str) -> Metric:
    """The metric of a column, also of those without view 0."""
    found = METRICS[name.removesuffix(WITHOUT_FIRST)]
    return found._replace(label=f"{found.label}, no view 0") if name.endswith(WITHOUT_FIRST) else found


@dataclasses.dataclass(frozen=True)
class Row:
    """The scores of one result: `notes` go with them; with an `error` there are none."""

    object_name: str
    seed: int | None
    scores: Mapping[str, float]
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def name(self) -> str:
        """Object and seed as one word."""
        return self.object_name if self.seed is None else f"{self.object_name}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """One metric over all objects: mean, its interval (None for one object), best seeds and spread (None for one)."""

    mean: float
    low: float | None
    high: float | None
    objects: int
    best: float | None = None
    spread: float | None = None


def summarise(rows: Sequence[Row]) -> dict[str, Summary]:
    """One `Summary` per metric over the rows that have it."""
    columns = list(dict.fromkeys(name for row in rows for name in row.scores))
    return {name: _summary(name, rows) for name in columns}


def _summary(name: str, rows: Sequence[Row]) -> Summary:
    by_object = _by_object(name, rows)
    means = np.array([np.mean(values) for values in by_object.values()])
    low, high = bootstrap_interval(means) if len(means) > 1 else (None, None)
    best = spread = None
    if max(map(len, by_object.values())) > 1:
        choose = max if metric(name).better > 0 else min
        best = float(np.mean([choose(values) for values in by_object.values()]))
        several = [np.std(values, ddof=1) for values in by_object.values() if len(values) > 1]
        spread = float(np.mean(several))
    return Summary(float(means.mean()), low, high, len(means), best, spread)


def object_means(name: str, rows: Sequence[Row]) -> dict[str, float]:
    """The mean of one metric over each object's seeds."""
    return {object_name: float(np.mean(values)) for object_name, values in _by_object(name, rows).items()}


def _by_object(name: str, rows: Sequence[Row]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if name in row.scores:
            found.setdefault(row.object_name, []).append(row.scores[name])
    return found


def bootstrap_interval(values: np.ndarray, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Where the mean of as many values, drawn from these with replacement, lies with probability `level`."""
    generator = np.random.default_rng(seed)
    drawn = values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def as_csv(rows: Sequence[Row]) -> str:
    """One line per row; a result that could not be scored has empty cells and its error."""
    columns = list(dict.fromkeys(name for row in rows for name in row.scores))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["object", "seed", *columns, "notes", "error"])
    for row in rows:
        numbers = [f"{row.scores[name]:.6g}" if name in row.scores else "" for name in columns]
        cells = [row.object_name, "" if row.seed is None else row.seed, *numbers, "; ".join(row.notes), row.error or ""]
        writer.writerow([_harmless(cell) for cell in cells])
    return text.getvalue()


def _harmless(cell: Any) -> Any:
    """Names that a spreadsheet would take for a formula get an apostrophe; numbers stay."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+@" and cell else cell


def as_json(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Rows, summaries and what they are about (protocol, settings, versions)."""
    document = {
        **about,
        "summary": {name: dataclasses.asdict(summary) for name, summary in summarise(rows).items()},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def summary_cells(summaries: Mapping[str, Summary]) -> list[list[str]]:
    """The summary as text, the head first: one line per metric."""
    seeds = any(summary.best is not None for summary in summaries.values())
    lines = [["metric", "mean", f"{LEVEL:.0%} interval", "objects"] + ["best seed", "spread over seeds"] * seeds]
    for name, summary in summaries.items():
        _, _, digits = metric(name)
        shown = [arrow_label(name), f"{summary.mean:.{digits}f}", interval_text(summary, digits), str(summary.objects)]
        if seeds:
            extra = (summary.best, summary.spread)
            shown += ["" if value is None else f"{value:.{digits}f}" for value in extra]
        lines.append(shown)
    return lines


def score_cells(rows: Sequence[Row]) -> list[list[str]]:
    """All rows as text, the head first: one line per result."""
    columns = list(dict.fromkeys(name for row in rows for name in row.scores))
    lines = [["object", *map(arrow_label, columns)]]
    for row in rows:
        numbers = [f"{row.scores[name]:.{metric(name).digits}f}" if name in row.scores else "" for name in columns]
        lines.append([row.name, *numbers])
    return lines


def arrow_label(name: str) -> str:
    """A metric's label with an arrow to the better side."""
    label, better, _ = metric(name)
    return f"{label} {'↑' if better > 0 else '↓'}"


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the head first, as a table in Markdown."""
    head, *body = lines
    # A bar would end the cell.
    shown = [[cell.replace("|", "/") for cell in line] for line in (head, ["---"] * len(head), *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)


def interval_text(summary: Summary, digits: int) -> str:
    """A summary's interval, empty where it has none."""
    return "" if summary.low is None else f"{summary.low:.{digits}f} to {summary.high:.{digits}f}"
