"""Scores every result, keeps each as soon as it is there, and leaves tables and a report.

    scores.csv, scores.json    a row per object and seed; means, intervals, settings
    report.html                the same with pictures, in one file
    objects/NAME.json, NAME@*.jpg    each row and its pictures; a resumed run takes what it finds here, unless the
                                     result or its truth has changed since

A result that cannot be scored does not stop the others: its row says why, and it is in no mean.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hi3d_jax.atomic import written_aside
from hi3d_jax.evaluation.report import html_report
from hi3d_jax.evaluation.results import Result
from hi3d_jax.evaluation.scoring import Scored
from hi3d_jax.evaluation.tables import Row, as_csv, as_json
from hi3d_jax.evaluation.views import EvaluationError
from hi3d_jax.images import to_bytes

REQUEST = "request.json"
OBJECTS = "objects"


def score_all(
    results: Sequence[Result],
    score: Callable[[Result], Scored],
    folder: Path,
    title: str,
    about: Mapping[str, Any],
    resume: bool = False,
    progress: bool = True,
) -> list[Row]:
    """The rows of all results, in their order, after writing what the head of this file lists.

    `about` is everything that decides the scores: a run is only resumed with the one it was begun with. Raises
    `EvaluationError` for another one.
    """
    stems = [_stem(result) for result in results]
    if len(set(stems)) < len(stems):
        raise EvaluationError(f"several results would be called {max(stems, key=stems.count)}; rename one of them")
    begin(folder, about, resume)
    kept = folder / OBJECTS
    kept.mkdir(exist_ok=True)
    rows, pictures = [], {}
    bar = tqdm(stems, desc=title, unit="result", disable=None if progress else True)
    for result, stem in zip(results, bar, strict=True):
        row = _read_row(kept / f"{stem}.json", _state(result)) if resume else None
        if row is None:
            row = _score(result, score, kept, stem)
        rows.append(row)
        pictures[row.name] = pictures_of(folder, row)
    _write(folder / "scores.csv", as_csv(rows))
    _write(folder / "scores.json", as_json(rows, about))
    _write(folder / "report.html", html_report(title, about, rows, pictures))
    return rows


def pictures_of(folder: Path, row: Row) -> list[Path]:
    """The pictures that a run into `folder` left of a row."""
    return sorted((folder / OBJECTS).glob(f"{_stem(row)}@*.jpg"))


def begin(folder: Path, about: Mapping[str, Any], resume: bool) -> None:
    """Writes what a run is about, or holds it against what the resumed run was begun with."""
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / REQUEST, json.loads(json.dumps(about))
    if resume and path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise EvaluationError(f"{path} is damaged ({error}); begin anew in another folder") from error
        changed = [name for name in before.keys() | wanted.keys() if before.get(name) != wanted.get(name)]
        if changed:
            name = min(changed)
            raise EvaluationError(
                f"{folder} was begun with {name} = {before.get(name)}, not {wanted.get(name)}; continue with that, or "
                "begin in another folder"
            )
    _write(path, json.dumps(wanted, indent=1) + "\n")


def _score(result: Result, score: Callable[[Result], Scored], kept: Path, stem: str) -> Row:
    try:
        scored = score(result)
        bad = [name for name, value in scored.row.scores.items() if not np.isfinite(value)]
        if bad:
            raise EvaluationError(f"{', '.join(bad)} came out as NaN or infinite")
    except (ValueError, OSError) as error:
        # Kept out of objects/: a resumed run tries again, since the file may have been mended.
        return Row(result.object_name, result.seed, {}, error=" ".join(f"{result.path}: {error}".split()))
    for name, picture in scored.pictures.items():
        with written_aside(kept / f"{stem}@{name}.jpg") as aside:
            aside.write_bytes(_jpeg(picture))
    document = {"state": _state(result), "row": dataclasses.asdict(scored.row)}
    _write(kept / f"{stem}.json", json.dumps(document, indent=1) + "\n")
    return scored.row


def _state(result: Result) -> list[list[int]]:
    """By which a change of the files behind a result shows: number, bytes and latest time of each place's files."""
    states = []
    for place in (result.path, result.truth):
        files = [] if place is None else [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
        facts = [file.stat() for file in files]
        latest = max((fact.st_mtime_ns for fact in facts), default=0)
        states.append([len(files), sum(fact.st_size for fact in facts), latest])
    return states


def _read_row(path: Path, state: list[list[int]]) -> Row | None:
    """The row that was kept, if it is of the same files."""
    try:
        document = json.loads(path.read_text())
        fields = document["row"]
        if document["state"] != state:
            return None
        return Row(**{**fields, "notes": tuple(fields["notes"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _stem(result: Result | Row) -> str:
    """A file name for a result, without what a name may not hold."""
    seed = "" if result.seed is None else f".seed_{result.seed}"
    return re.sub(r"[^\w.-]", "_", result.object_name).strip(".") + seed


def _jpeg(picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(picture)).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
