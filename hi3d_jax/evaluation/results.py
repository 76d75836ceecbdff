"""Where results and truths lie on disk, and which belong together.

A folder of results holds one entry per object, named as its truth is: a file, or a folder, or a folder with one entry
per seed (`seed_0`, `seed_1.mp4`, `3.png`). Truths are object files (`chair.glb`), folders with an orbit of true views
(`chair/`), or a manifest.jsonl with the fields `id`, `file` and, if wanted, `split`. A single result and a single truth
belong together whatever they are called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from hi3d_jax.evaluation.importers import LAYOUTS
from hi3d_jax.evaluation.views import EvaluationError

Kind = Literal["views", "meshes", "asset"]
MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
SEED = re.compile(r"(?:seed[_-]?)?(\d{1,9})", re.IGNORECASE)
NAMES_SHOWN = 8


class Result(NamedTuple):
    """One thing to score, and its truth's file or folder (None where nothing is compared with a truth)."""

    object_name: str
    seed: int | None
    path: Path
    truth: Path | None = None


def pair_up(
    results: Path,
    truths: Path | None,
    kind: Kind,
    layout: str = "hi3d",
    split: str | None = None,
    allow_missing: bool = False,
) -> list[Result]:
    """Every result with its truth. Raises `EvaluationError` for folders that hold none, and for what has no partner."""
    found = find_results(results, kind, layout)
    if truths is None:
        return found
    known = find_truths(truths, split)
    if len(known) == 1 and len({result.object_name for result in found}) == 1:
        [(name, path)] = known.items()
        return [result._replace(object_name=name, truth=path) for result in found]
    strangers = sorted({result.object_name for result in found} - known.keys())
    if strangers:
        raise EvaluationError(
            f"{len(strangers)} objects of {results} have no truth in {truths}: {_some(strangers)}; results must have "
            f"the names of their truths, which are {_some(sorted(known))}"
        )
    missing = sorted(known.keys() - {result.object_name for result in found})
    if missing and not allow_missing:
        raise EvaluationError(
            f"{len(missing)} of {len(known)} objects of {truths} have no result in {results}: {_some(missing)}; add "
            "them, choose a split of the manifest (--split), or score the others with --allow-missing"
        )
    return [result._replace(truth=known[result.object_name]) for result in found]


def find_results(folder: Path, kind: Kind, layout: str = "hi3d") -> list[Result]:
    """The results in `folder`, or that which it is itself, by name and seed. Raises `EvaluationError`."""
    if not folder.exists():
        raise EvaluationError(f"{folder} does not exist; check the path")
    whole = _locate(folder, kind, layout)
    if whole is not None:
        return [Result(folder.stem, None, whole)]
    found = [result for child in _children(folder) for result in _of_object(child, kind, layout)]
    if not found:
        what = LAYOUTS[layout].about if kind == "views" else _WANTED[kind]
        raise EvaluationError(f"{folder} holds no {kind} to score; expected {what}, one per object")
    names = [(result.object_name, result.seed) for result in found]
    twice = sorted({str(name) for name, seed in names if names.count((name, seed)) > 1})
    if twice:
        raise EvaluationError(f"{folder} holds several results of one name: {_some(twice)}; keep one of each")
    return found


_WANTED = {
    "meshes": "a GLB, OBJ or PLY, or a folder with mesh.glb",
    "asset": "a folder with mesh.glb, as runs leave it",
}


def _of_object(path: Path, kind: Kind, layout: str) -> Iterator[Result]:
    """The results of one object: its own, or one per seed."""
    whole = _locate(path, kind, layout)
    if whole is not None:
        yield Result(path.stem if path.is_file() else path.name, None, whole)
    elif path.is_dir():
        for child in _children(path):
            seed = SEED.fullmatch(child.stem)
            inside = _locate(child, kind, layout) if seed else None
            if inside is not None:
                yield Result(path.name, int(seed[1]), inside)


def _locate(path: Path, kind: Kind, layout: str) -> Path | None:
    """The result that `path` is or directly holds."""
    if kind == "views":
        return LAYOUTS[layout].locate(path)
    if kind == "asset":
        return path if (path / "mesh.glb").is_file() else None
    if path.is_file():
        return path if path.suffix.lower() in MESH_SUFFIXES else None
    named = [path / f"mesh{suffix}" for suffix in MESH_SUFFIXES if (path / f"mesh{suffix}").is_file()]
    return named[0] if named else None


def find_truths(path: Path, split: str | None = None) -> dict[str, Path]:
    """The truths in a folder, by name; or the one that `path` is itself. Raises `EvaluationError`."""
    if not path.exists():
        raise EvaluationError(f"{path} does not exist; check the path")
    manifest = path / "manifest.jsonl"
    if manifest.is_file():
        return _from_manifest(manifest, split)
    if split is not None:
        raise EvaluationError(f"a split was asked for, but {path} has no manifest.jsonl; leave --split out")
    if (whole := _truth(path)) is not None:
        return {path.stem if path.is_file() else path.name: whole}
    found: dict[str, Path] = {}
    for child in _children(path):
        if (truth := _truth(child)) is not None:
            found.setdefault(child.stem if child.is_file() else child.name, truth)
    if not found:
        raise EvaluationError(
            f"{path} holds no truths; expected object files ({' '.join(MESH_SUFFIXES)}), folders with true views, or "
            "manifest.jsonl"
        )
    return found


def _truth(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix.lower() in MESH_SUFFIXES else None
    return LAYOUTS["hi3d"].locate(path)


def _from_manifest(manifest: Path, split: str | None) -> dict[str, Path]:
    folder = manifest.parent.resolve()
    try:
        entries = [json.loads(line) for line in manifest.read_text().splitlines() if line.strip()]
        chosen = [entry for entry in entries if split is None or entry["split"] == split]
        found = {str(entry["id"]): (folder / entry["file"]).resolve() for entry in chosen}
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{manifest} cannot be read ({type(error).__name__}: {error}); each line is JSON with id, file and split"
        ) from error
    if not found:
        splits = sorted({str(entry.get("split")) for entry in entries})
        raise EvaluationError(f"{manifest} has no objects of the split {split!r}; it has {_some(splits)}")
    outside = [name for name, path in found.items() if not path.is_relative_to(folder)]
    if outside:
        raise EvaluationError(f"{manifest}: the files of {_some(outside)} lie outside {folder}")
    return found


def _children(folder: Path) -> list[Path]:
    """Entries in the order of their names, hidden ones left out."""
    if not folder.is_dir():
        return []
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
