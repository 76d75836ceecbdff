"""Scores several systems and baselines against one set of truths, side by side.

    python experiments/evaluate.py views objects/ --split val --systems ours=outputs/a theirs=outputs/b:syncdreamer \\
        --baselines copy_input -o scores
    python experiments/evaluate.py meshes objects/ --split val --systems ours=outputs/a --baselines hull -o scores

A system is NAME=FOLDER or NAME=FOLDER:LAYOUT, its folder as `hi3d evaluate` takes it. Each system's own tables and
report are in OUTPUT/NAME, the comparison (differences from the first system, object by object, too) in
OUTPUT/comparison.html, .md, .csv and .json. Baselines are made here from the truths:
copy_input hands view 0 back for every view, hull carves the true masks of 16 views, silhouette that of view 0 alone,
floor is the truth itself moved by half a thousandth: what no system can be told from. Runs go on where they stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm
from tyro.conf import Positional, arg

from hi3d_jax.cli.compiled_programs import keep_compiled_programs
from hi3d_jax.cli.evaluate import Evaluate
from hi3d_jax.data import load_object, render_orbit
from hi3d_jax.evaluation import EvaluationError, Row
from hi3d_jax.evaluation.baselines import copy_input, hull, silhouette
from hi3d_jax.evaluation.comparison import write_comparison
from hi3d_jax.evaluation.importers import read_views
from hi3d_jax.evaluation.protocols import moved
from hi3d_jax.evaluation.results import MESH_SUFFIXES, find_truths
from hi3d_jax.mesh import Mesh, write_mesh
from hi3d_jax.video import Orbit, write_orbit

BASELINES = {"views": ("copy_input",), "meshes": ("hull", "silhouette", "floor")}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Which systems are compared, on what, and how; the other options are those of `hi3d evaluate`."""

    what: Annotated[Positional[Literal["views", "meshes"]], arg(metavar="{views,meshes}")]
    """What is compared."""
    truth: Annotated[Positional[Path], arg(metavar="TRUTH")]
    """Folder of truths, as `hi3d evaluate` takes it."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
    """Folder for all tables and reports."""
    systems: tuple[str, ...] = ()
    """NAME=FOLDER or NAME=FOLDER:LAYOUT, one or more."""
    baselines: tuple[Literal["copy_input", "hull", "silhouette", "floor"], ...] = ()
    """Baselines to compare with."""
    protocol: Literal["syncdreamer", "strict"] = "syncdreamer"
    """How scores are taken."""
    size: int | None = None
    """Pixels across at which views are compared."""
    elevation_deg: float = 20.0
    """Elevation from which object files are drawn, for the baselines and where no cameras.json tells it."""
    light: Literal["unlit", "soft"] = "soft"
    """How object files are lit when they are drawn."""
    upscaler: Literal["bicubic", "realesrgan"] | None = None
    """Enlarge views that are smaller than --size first, instead of stage 2."""
    metrics: tuple[Literal["lpips_vgg", "lpips_alex", "dists"], ...] | None = None
    """Perceptual metrics; None: by protocol."""
    split: str | None = None
    """Only the truths of this split of manifest.jsonl."""
    allow_missing: bool = False
    """Score what is there, though some truths have no result."""


def main() -> None:
    """Reads the command line, makes the baselines, scores every system, writes the comparison."""
    config = tyro.cli(Comparison, description=__doc__)
    keep_compiled_programs()
    systems = dict(_parse(system) for system in config.systems)
    for name in config.baselines:
        if name not in BASELINES[config.what]:
            raise SystemExit(f"{name} is no baseline for {config.what}; there is {', '.join(BASELINES[config.what])}")
        systems[name] = make_baseline(name, config), "hi3d"
    if not systems:
        raise SystemExit("nothing to compare: name systems with --systems or baselines with --baselines")
    rows = {name: score(name, folder, layout, config) for name, (folder, layout) in systems.items()}
    about = {"what": config.what, "truth": config.truth, "protocol": config.protocol, "split": config.split}
    reference = next(iter(rows)) if len(rows) > 1 else None
    print(write_comparison(config.output, f"{config.what}, {config.protocol}", _texts(about), rows, reference))


def _texts(about: dict) -> dict[str, str]:
    return {name: str(value) for name, value in about.items()}


def _parse(system: str) -> tuple[str, tuple[Path, str]]:
    name, found, rest = system.partition("=")
    if not (name and found and rest) or "/" in name:
        raise SystemExit(f"{system!r} is no system; write NAME=FOLDER or NAME=FOLDER:LAYOUT")
    folder, _, layout = rest.partition(":")
    return name, (Path(folder), layout or "hi3d")


def score(name: str, folder: Path, layout: str, config: Comparison) -> list[Row]:
    """The rows of one system, from an earlier run where it got so far."""
    command = Evaluate(
        what=config.what,
        results=folder,
        output=config.output / name,
        truth=config.truth,
        protocol=config.protocol,
        layout=layout,
        size=config.size,
        upscaler=config.upscaler,
        metrics=config.metrics,
        elevation_deg=config.elevation_deg,
        light=config.light,
        split=config.split,
        allow_missing=config.allow_missing,
        resume=True,
    )
    rows = command.score()
    for row in rows:
        if row.error:
            print(f"{name}: {row.name} could not be scored: {row.error}")
    return rows


def make_baseline(name: str, config: Comparison) -> Path:
    """The folder with this baseline's results for every truth; what is there already stays."""
    folder = config.output / "baselines" / f"{name}_{config.elevation_deg:g}"
    for object_name, truth in tqdm(find_truths(config.truth, config.split).items(), desc=name, disable=None):
        if name in BASELINES["meshes"] and not (folder / f"{object_name}.ply").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_mesh(folder / f"{object_name}.ply", _baseline_mesh(name, truth, config))
        if name == "copy_input" and not (folder / object_name / "cameras.json").exists():
            orbit = _orbit(truth, config.size or 256, config)
            copied = Orbit(copy_input(orbit.views), np.ones_like(orbit.alphas), orbit.cameras)
            write_orbit(folder / object_name, copied)
    return folder


def _baseline_mesh(name: str, truth: Path, config: Comparison) -> Mesh:
    if name == "floor":
        return moved(load_object(truth))
    return {"hull": hull, "silhouette": silhouette}[name](_orbit(truth, 256, config))


def _orbit(truth: Path, size: int, config: Comparison) -> Orbit:
    """The true views of an object file, with masks and cameras; or the views of a truth that is an orbit."""
    if truth.suffix.lower() in MESH_SUFFIXES:
        renders, cameras = render_orbit(
            load_object(truth), elevation_deg=config.elevation_deg, width=size, light=config.light
        )
        return Orbit(renders.views, renders.alphas, cameras)
    found = read_views(truth)
    if found.cameras is None:
        raise EvaluationError(f"{truth} has no cameras.json, which a baseline needs; give the truth as an object file")
    return Orbit(found.views, np.ones(found.views.shape[:3], np.float32), found.cameras)


if __name__ == "__main__":
    main()
