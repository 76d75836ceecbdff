"""The paper's ablations as configs of one command: table 3, table 4 and figure 6, on objects whose truth is known.

    python experiments/ablations.py table4 objects/ --split val -o ablations/table4
    python experiments/ablations.py table4 objects/ --split val -o ablations/table4_generated --model tiny
    python experiments/ablations.py table3 objects/ --split val -o ablations/table3 --model tiny \\
        --without-depth runs/stage2_tiny_no_depth/model
    python experiments/ablations.py figure6 objects/ --split val -o ablations/figure6 --model tiny

    table3     views: refined by stage 2; by a stage 2 that was trained without depth; not refined but enlarged
    table4     meshes with M = 0, 16, 32, 48 views drawn from the Gaussians between the given ones
    figure6    views of several seeds: mean, best of all, spread

Coarse views are stage 1's of the object's picture where --model holds that stage, else (or with --views true) the true
ones, at half of stage 2's size; table 4 reconstructs the true views at 256 pixels, or the finest generated ones. A
folder of each variant's results is in OUTPUT/results, their scores with a report each in OUTPUT/PROTOCOL/VARIANT, all
side by side, with the difference to the paper's variant object by object, in OUTPUT/PROTOCOL/comparison.html, .md,
.csv and .json. --limit N takes N objects evenly from the sorted list, so that 4, 7, 13 and 25 of 25 contain each other.
The same command goes on where it stopped, also with more objects.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules; what is shared with other scripts is found from the root.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import tyro
from tqdm import tqdm
from tyro.conf import Positional, arg

from experiments.benchmarks.reconstruct import holding_radius
from hi3d_jax.cli.compiled_programs import keep_compiled_programs, let_go_of_programs
from hi3d_jax.cli.evaluate import Evaluate
from hi3d_jax.cli.output import script_errors
from hi3d_jax.data import load_object, render_orbit
from hi3d_jax.evaluation.comparison import write_comparison
from hi3d_jax.evaluation.results import find_truths
from hi3d_jax.evaluation.runs import begin
from hi3d_jax.evaluation.tables import Row
from hi3d_jax.images import straight_alpha, write_png
from hi3d_jax.pretrained import stage_folders
from hi3d_jax.splatting import Gaussians, read_ply
from hi3d_jax.stages.background import without_background
from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.pipeline import Hi3DPipeline, Options, open_stage
from hi3d_jax.stages.presets import Quality, ReconstructConfig
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.stages.reconstruct import reconstruct
from hi3d_jax.video import Orbit, read_views, write_orbit

RECONSTRUCTED_SIZE = 256


class AblationError(ValueError):
    """An ablation that cannot be done so; the text says what is missing."""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Which ablation, of what, on which objects."""

    what: Annotated[Positional[Literal["table3", "table4", "figure6"]], arg(metavar="{table3,table4,figure6}")]
    """Which of the paper's."""
    objects: Annotated[Positional[Path], arg(metavar="OBJECTS")]
    """Folder of object files, with or without manifest.jsonl."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
    """Folder for everything: new, or one that this command began."""
    model: Annotated[str | None, arg(aliases=["-m"], metavar="tiny|FOLDER|HUB_ID")] = None
    """As `hi3d generate` takes it, or the folder of a stage; none: true views (table4 only)."""
    without_depth: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Model folder of a stage 2 that was trained without depth (--config=stage2_tiny_no_depth), for table3."""
    views: Literal["true", "generated"] | None = None
    """Where coarse views come from; None: from --model where it has a stage 1."""
    split: str | None = None
    """Only the objects of this split of manifest.jsonl."""
    limit: int | None = None
    """Only so many objects, evenly from the sorted list."""
    ids: tuple[str, ...] | None = None
    """Only these objects, by name."""
    seeds: tuple[int, ...] | None = None
    """Seeds of stages 1 and 2; None: 0, and for figure6 0 to 3."""
    num_steps: int | None = None
    """Sampling steps; the recipe's if not given."""
    elevation_deg: float = 20.0
    """Of the input picture and of all views."""
    num_interpolated: tuple[int, ...] = (0, 16, 32, 48)
    """The values of M in table4."""
    quality: Quality = "draft"
    """Of reconstructions in table4."""
    upscalers: tuple[Literal["bicubic", "realesrgan"], ...] = ("bicubic", "realesrgan")
    """What enlarges coarse views in table3 instead of stage 2."""
    size: int | None = None
    """Pixels across at which views are compared; None: stage 2's."""
    metrics: tuple[Literal["lpips_vgg", "lpips_alex", "dists"], ...] | None = None
    """Perceptual metrics of views; None: by protocol; `--metrics` alone: none."""
    protocols: tuple[Literal["syncdreamer", "strict"], ...] = ("syncdreamer", "strict")
    """How scores are taken; see `hi3d evaluate --help`."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a table: `make` brings an object's results into the folder `results`; what is there already stays."""

    name: str
    results: Path
    make: Callable[[str], object]
    upscaler: Literal["bicubic", "realesrgan"] | None = None


@functools.cache
def stage(source: str, number: Literal[1, 2]) -> StageModel:
    """One stage of a model folder, kept loaded."""
    return open_stage(source, number, keep_loaded=True)


class Results:
    """Everything that variants are made of, each made once and kept as files below `folder`."""

    def __init__(self, ablation: Ablation, truths: dict[str, Path]):
        self.ablation, self.truths = ablation, truths
        self.folder = ablation.output / "results"
        folders = () if ablation.model is None else stage_folders(ablation.model)
        self.recipes = {recipe.stage: recipe for recipe in map(Recipe.of, folders)}
        self.generated = (1 in self.recipes) if ablation.views is None else ablation.views == "generated"
        if self.generated and 1 not in self.recipes:
            raise AblationError(f"there is no stage 1 to generate views with in {ablation.model}; give it with --model")
        self.seeds = ablation.seeds or ((0, 1, 2, 3) if ablation.what == "figure6" else (0,))

    @property
    def finest(self) -> Path:
        """Folder of the best views that the model makes."""
        return self.folder / ("refined" if 2 in self.recipes else "coarse")

    def picture(self, name: str) -> Path:
        """What a user would photograph: view 0 of the object, transparent around it, twice as large as the views."""
        path, recipe = self.folder / "pictures" / f"{name}.png", self.recipes[max(self.recipes)]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            renders, _ = self._drawn(name, 2 * recipe.image_size, recipe, (0.0,))
            write_png(path, straight_alpha(renders.views[0], renders.alphas[0]))
        return path

    def _drawn(self, name: str, width: int, recipe: Recipe, azimuths_deg: Sequence[float] | None = None):
        """The object from where the recipe's cameras stand."""
        around = [view * 360 / recipe.num_views for view in range(recipe.num_views)]
        angles = {"azimuths_deg": azimuths_deg or around, "elevation_deg": self.ablation.elevation_deg}
        lens = {"radius": recipe.radius, "fov_deg": recipe.fov_deg, "width": width}
        return render_orbit(load_object(self.truths[name]), **angles, **lens)

    def coarse(self, name: str) -> None:
        """Stage 1's views for every seed, or the true ones at their size."""
        for seed in self.seeds:
            folder = self.folder / "coarse" / name / f"seed_{seed}"
            if (folder / "cameras.json").exists():
                continue
            if self.generated:
                pipeline = Hi3DPipeline(stage(self.ablation.model, 1))
                pipeline(self.picture(name), folder, keep_framing=True, seed=seed, **self._sampling)
            else:
                recipe = self.recipes[2]
                renders, cameras = self._drawn(name, recipe.image_size // 2, recipe)
                write_orbit(folder, Orbit(renders.views, np.ones_like(renders.alphas), cameras))

    @property
    def _sampling(self):
        ablation = self.ablation
        return {
            "elevation_deg": ablation.elevation_deg,
            "num_steps": ablation.num_steps,
            "options": Options(resume=True, progress=False),
        }

    def refined(self, source: str, into: str, name: str) -> None:
        """Stage 2's views of the coarse ones, by the model `source`."""
        self.coarse(name)
        for seed in self.seeds:
            folder, coarse = (self.folder / part / name / f"seed_{seed}" for part in (into, "coarse"))
            if not (folder / "cameras.json").exists():
                views, cameras = read_views(coarse)
                shown = {"image": self.picture(name), "cameras": cameras}
                Hi3DPipeline(refiner=stage(source, 2)).refine(views, folder, **shown, seed=seed, **self._sampling)

    def finest_views(self, name: str) -> None:
        """The best views that the model makes, for every seed."""
        if 2 in self.recipes:
            self.refined(self.ablation.model, "refined", name)
        else:
            self.coarse(name)

    def orbit(self, name: str, seed: int) -> Orbit:
        """What table 4 reconstructs."""
        if self.generated:
            self.finest_views(name)
            views, cameras = read_views(self.finest / name / f"seed_{seed}")
            return without_background(Orbit(views[..., :3], views[..., 3], cameras))
        mesh = load_object(self.truths[name])
        angles = {"elevation_deg": self.ablation.elevation_deg, "radius": holding_radius(mesh)}
        renders, cameras = render_orbit(mesh, **angles, width=RECONSTRUCTED_SIZE)
        return Orbit(renders.views, renders.alphas, cameras)

    def meshes(self, num_interpolated: int, name: str) -> None:
        """The mesh with M = `num_interpolated`, for every seed."""
        for seed in self.seeds:
            folder = self.folder / f"M={num_interpolated}" / name / f"seed_{seed}"
            if not (folder / "mesh.glb").exists():
                changes = {"num_interpolated": num_interpolated, "seed": seed}
                config = ReconstructConfig.preset(self.ablation.quality, **changes)
                given = {"resume": True, "progress": False, "gaussians": self._splats(num_interpolated, name, seed)}
                reconstruct(self.orbit(name, seed), folder, config, **given)

    def _splats(self, num_interpolated: int, name: str, seed: int) -> Gaussians | None:
        """Those that a value of M before this one was made with: they do not depend on it."""
        before = self.ablation.num_interpolated[: self.ablation.num_interpolated.index(num_interpolated)]
        files = (self.folder / f"M={m}" / name / f"seed_{seed}" / "splats.ply" for m in before)
        return next((read_ply(file) for file in files if file.exists()), None)


def variants(results: Results) -> tuple[list[Variant], str]:
    """The rows of the ablation's table, and which of them the others are compared with: the paper's own."""
    ablation, folder = results.ablation, results.folder
    if ablation.what == "table4":
        made = functools.partial
        rows = [Variant(f"M={m}", folder / f"M={m}", made(results.meshes, m)) for m in ablation.num_interpolated]
        return rows, "M=16" if 16 in ablation.num_interpolated else rows[0].name
    if ablation.what == "figure6":
        if not results.generated:
            raise AblationError("figure6 compares what a model makes with several seeds; give one with --model")
        return [Variant("seeds", results.finest, results.finest_views)], "seeds"
    if 2 not in results.recipes:
        raise AblationError("table3 is about stage 2; give a folder that holds one with --model")
    rows = [Variant("refined", folder / "refined", results.finest_views)]
    if ablation.without_depth is not None:
        make = functools.partial(results.refined, ablation.without_depth, "without_depth")
        rows.append(Variant("without depth", folder / "without_depth", make))
    rows += [Variant(f"coarse, {name}", folder / "coarse", results.coarse, name) for name in ablation.upscalers]
    return rows, "refined"


def chosen(truths: dict[str, Path], limit: int | None, ids: Sequence[str] | None = None) -> list[str]:
    """Names of `limit` truths, evenly from the first to the last of the sorted list, or of those of `ids`.

    Raises `AblationError` for names that there are not.
    """
    if strangers := sorted(set(ids or ()) - truths.keys()):
        raise AblationError(f"there are no objects {', '.join(strangers)}; names are like {min(truths)}")
    names = sorted(truths if ids is None else ids)
    if limit is None or limit >= len(names):
        return names
    return [names[index] for index in np.linspace(0, len(names) - 1, limit).round().astype(int)]


def score(variant: Variant, names: list[str], protocol: str, ablation: Ablation, size: int | None) -> list[Row]:
    """The rows of these objects for one variant under one protocol, from an earlier run where it got so far."""
    command = Evaluate(
        what="meshes" if ablation.what == "table4" else "views",
        results=variant.results,
        output=ablation.output / protocol / variant.name,
        truth=ablation.objects,
        protocol=protocol,
        size=size,
        upscaler=variant.upscaler,
        metrics=ablation.metrics,
        elevation_deg=ablation.elevation_deg,
        light="soft",
        split=ablation.split,
        allow_missing=True,
        resume=True,
    )
    rows = [row for row in command.score() if row.object_name in names]
    for row in rows:
        if row.error:
            print(f"{variant.name}: {row.name} could not be scored: {row.error}", file=sys.stderr)
    return rows


def run(ablation: Ablation) -> None:
    """Makes what is missing, object by object, then scores all. Raises `AblationError` and what scoring raises."""
    truths = find_truths(ablation.objects, ablation.split)
    names = chosen(truths, ablation.limit, ablation.ids)
    results = Results(ablation, truths)
    table, reference = variants(results)
    decides = ("what", "objects", "model", "without_depth", "split", "num_steps", "elevation_deg", "quality")
    about = {name: str(getattr(ablation, name)) for name in decides}
    about |= {"views": "generated" if results.generated else "true", "hi3d_jax": version("hi3d_jax")}
    begin(ablation.output, about, resume=True)
    about["could not be made"] = "; ".join(make(table, names, ablation.what)) or "none"
    size = ablation.size
    if size is None and ablation.what != "table4" and 2 in results.recipes:
        size = results.recipes[2].image_size
    for protocol in ablation.protocols:
        systems = {variant.name: score(variant, names, protocol, ablation, size) for variant in table}
        title = f"{ablation.what}, {protocol}"
        folder = ablation.output / protocol
        print(write_comparison(folder, title, about | {"protocol": protocol}, systems, reference))
    print(ablation.output / ablation.protocols[0] / "comparison.html")


def make(table: Sequence[Variant], names: Sequence[str], what: str) -> list[str]:
    """Brings the results of all objects into the variants' folders; returns what could not be made, and why."""
    failed = []
    for name in tqdm(names, desc=what, unit="object", disable=None):
        for variant in table:
            try:
                variant.make(name)
            except (ValueError, OSError) as error:
                failed.append(f"{name}, {variant.name}: {error}")
                print(failed[-1], file=sys.stderr)
        let_go_of_programs()
    return failed


def main() -> None:
    """Parses and runs; errors a user can mend are one line."""
    ablation = tyro.cli(Ablation, description=__doc__)
    keep_compiled_programs()
    with script_errors():
        run(ablation)


if __name__ == "__main__":
    main()
