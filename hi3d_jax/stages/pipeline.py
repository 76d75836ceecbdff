"""From one image to high-resolution orbits: matting, stage 1 and stage 2, with everything made on the way as files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from hi3d_jax.cameras import Cameras
from hi3d_jax.images import Matting, to_bytes, write_png
from hi3d_jax.pretrained import stage_folders
from hi3d_jax.stages import orbit_files
from hi3d_jax.stages.elevation import estimate_elevation, read_estimate, write_estimate
from hi3d_jax.stages.framing import frame_image, resize_view
from hi3d_jax.stages.inputs import Picture, check_numbers, cut_out, on_white, orbit_elevation, read_picture
from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.multiview import multiview
from hi3d_jax.stages.recipe import Recipe, RecipeError
from hi3d_jax.stages.refine import check_count, refine
from hi3d_jax.stages.run_record import RunRecord
from hi3d_jax.stages.steps import Steps
from hi3d_jax.video import Orbit


@dataclasses.dataclass(frozen=True)
class Variant:
    """One draw: the `coarse` orbit of stage 1, and the `refined` one of stage 2 (None without a refiner)."""

    coarse: Orbit
    refined: Orbit | None = None

    @property
    def orbit(self) -> Orbit:
        """The better one."""
        return self.coarse if self.refined is None else self.refined


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is done, without changing what is asked for."""

    # Continue the run that the output folder holds after its last finished step.
    resume: bool = False
    progress: bool = True
    # Write a few views, small, every so many steps of sampling; 0: none.
    preview_every: int = 0


class Hi3DPipeline:
    """Stages 1 and 2 behind one call; either may be missing where it is not asked for."""

    def __init__(self, generator: StageModel | None = None, refiner: StageModel | None = None):
        for model, stage in ((generator, 1), (refiner, 2)):
            if model is not None and model.recipe.stage != stage:
                raise RecipeError(f"{model.source} holds a model of stage {model.recipe.stage}, not of stage {stage}")
        self.generator = generator
        self.refiner = refiner

    @classmethod
    def from_pretrained(cls, *sources: str | Path, **settings: Any) -> Hi3DPipeline:
        """A pipeline of the stages that the model folders hold.

        Each source is the folder of a stage, one with such folders as stage1/ and stage2/, a Hugging Face repository of
        either kind, or "tiny", which comes with the package. `settings` are those of `StageModel`. Raises
        `PretrainedError` or `RecipeError`.
        """
        models: dict[int, StageModel] = {}
        for folder in (folder for source in sources for folder in stage_folders(source)):
            model = StageModel(folder, **settings)
            if model.recipe.stage in models:
                first = models[model.recipe.stage].source
                raise RecipeError(f"{folder} and {first} both hold a model of {model.name}; name one of them")
            models[model.recipe.stage] = model
        return cls(models.get(1), models.get(2))

    def __call__(
        self,
        image: Picture,
        output: str | Path | None = None,
        *,
        elevation_deg: float | Literal["auto"] = 0.0,
        seed: int = 0,
        num_variants: int = 1,
        num_steps: int | None = None,
        matting: Matting = "auto",
        keep_framing: bool = False,
        options: Options | None = None,
    ) -> list[Variant]:
        """Orbits of the object in `image`, a file, a Pillow image or RGB(A) numbers, whose view 0 is the image itself.

        `elevation_deg` is how far above the horizon the image was taken; "auto" asks the model (see elevation.py).
        Variant k of a seed is the same however many are made. `matting` is that of `images.matte`; `keep_framing`
        leaves the object where it is in the image. Files are only written into the folder `output`. Raises
        `ImageError`, `StageError`, `RecipeError`, `RunError`, and `OSError` for the disk.
        """
        if self.generator is None:
            raise RecipeError("there is no model of stage 1 to make views with; give the folder of one")
        if num_variants < 1:
            raise RecipeError(f"{num_variants} variants: ask for at least 1")
        for model in filter(None, (self.generator, self.refiner)):
            model.check_weights()
        recipe, numbers = self.generator.recipe, {"seed": seed, "num_steps": num_steps}
        check_numbers(recipe, **numbers, elevation_deg=0.0 if elevation_deg == "auto" else elevation_deg)
        cut = cut_out(image, matting)
        given = {"elevation_deg": elevation_deg, "keep_framing": keep_framing, "num_variants": num_variants}
        run = _Run.begin(output, self._request(cut, **numbers, **given), options)
        run.write_input(cut, recipe, keep_framing)
        if elevation_deg == "auto":
            elevation_deg = run.estimate(self.generator, frame_image(cut, recipe, keep_framing), **numbers)
        numbers["elevation_deg"] = elevation_deg
        variants = []
        for variant in range(num_variants):
            part = "" if num_variants == 1 else f"variant_{variant}"
            variants.append(self._draw(run, part, cut, keep_framing, variant=variant, **numbers))
        run.finish([variant.orbit for variant in variants])
        return variants

    def _draw(
        self, run: _Run, part: str, cut: Float[np.ndarray, "h w 4"], keep_framing: bool, **sampling: Any
    ) -> Variant:
        """One variant, into the folder `part` of the output."""
        generator, refiner = self.generator, self.refiner
        first = frame_image(cut, generator.recipe, keep_framing)
        cameras = orbit_files.recipe_cameras(generator.recipe, sampling["elevation_deg"])
        make = functools.partial(multiview, generator, first, **sampling)
        coarse = run.orbit(generator, cameras, make, part if refiner is None else f"{part}/coarse")
        if refiner is None:
            return Variant(coarse)
        first, size = frame_image(cut, refiner.recipe, keep_framing), refiner.recipe.image_size
        make = functools.partial(refine, refiner, to_bytes(coarse.views), first, **sampling)
        return Variant(coarse, run.orbit(refiner, coarse.cameras.resized(size, size), make, part))

    def refine(
        self,
        views: Float[np.ndarray, "t h w c"],
        output: str | Path | None = None,
        *,
        image: Picture | None = None,
        cameras: Cameras | None = None,
        elevation_deg: float = 0.0,
        seed: int = 0,
        num_steps: int | None = None,
        options: Options | None = None,
    ) -> Orbit:
        """The views of an orbit, RGB(A) in [0, 1], refined by stage 2; what is transparent becomes white.

        `image` shows what view 0 does, framed alike, in more detail. Without `cameras` the views were taken from
        `elevation_deg`, equally spaced. Otherwise as `__call__`.
        """
        if self.refiner is None:
            raise RecipeError("there is no model of stage 2 to refine views with; give the folder of one")
        recipe, size = self.refiner.recipe, self.refiner.recipe.image_size
        self.refiner.check_weights()
        check_count(self.refiner, len(views))
        if cameras is None:
            cameras = orbit_files.recipe_cameras(recipe, elevation_deg)
        else:
            elevation_deg = orbit_elevation(cameras)
            cameras = cameras.resized(size, size)
        numbers = {"seed": seed, "elevation_deg": elevation_deg, "num_steps": num_steps}
        check_numbers(recipe, **numbers)
        coarse = np.stack([to_bytes(on_white(view)) for view in views])
        first = None if image is None else to_bytes(on_white(read_picture(image)))
        request = self._request(coarse if first is None else np.append(coarse, first), **numbers)
        run = _Run.begin(output, request, options)
        first = None if first is None else resize_view(first, size, size, recipe)
        refined = run.orbit(self.refiner, cameras, functools.partial(refine, self.refiner, coarse, first, **numbers))
        run.finish([refined])
        return refined

    def _request(self, pixels: np.ndarray, **given: Any) -> dict[str, Any]:
        """What decides the result, as JSON."""
        models = {
            model.name.replace(" ", ""): {
                "recipe": model.recipe.to_dict(),
                "dtype": jnp.dtype(model.dtype).name,
                "weights": model.fingerprint(),
            }
            for model in (self.generator, self.refiner)
            if model is not None
        }
        return {
            **given,
            "models": models,
            "input": {"sha256": hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()},
        }


class _Run:
    """The steps of one run, with or without an output folder."""

    def __init__(self, record: RunRecord, options: Options):
        self.record, self.options = record, options
        self.steps = Steps(record, options.progress)

    @classmethod
    def begin(cls, output: str | Path | None, request: dict[str, Any], options: Options | None) -> _Run:
        options = Options() if options is None else options
        return cls(RunRecord.begin(None if output is None else Path(output), request, options.resume), options)

    def write_input(self, cut: Float[np.ndarray, "h w 4"], recipe: Recipe, keep_framing: bool) -> None:
        """What stage 1 is shown, twice as large: what a refiner will want to see."""
        if self.record.folder is not None:
            large = dataclasses.replace(recipe, image_size=2 * recipe.image_size)
            picture = frame_image(cut, large, keep_framing).astype(np.float32) / 255
            write_png(self.record.folder / orbit_files.INPUT_FILE, picture)

    def estimate(self, model: StageModel, image: UInt8[np.ndarray, "s s 3"], seed: int, num_steps: int | None) -> float:
        """The elevation of `image` in degrees, as stage 1 sees it."""

        def draw(elevation_deg: float, steps: int) -> UInt8[np.ndarray, "t s s 3"]:
            return multiview(model, image, elevation_deg=elevation_deg, seed=seed, num_steps=steps, progress=False)

        make = functools.partial(estimate_elevation, model.recipe, draw, num_steps, self.options.progress)
        estimate = self.steps.take("elevation", orbit_files.ELEVATION_FILE, make, write_estimate, read_estimate)
        self.record.results["elevation"] = dataclasses.asdict(estimate)
        if self.options.progress:
            tqdm.write(f"elevation: taken to be {estimate.elevation_deg:g} degrees")
        return estimate.elevation_deg

    def orbit(
        self, model: StageModel, cameras: Cameras, make: Callable[..., UInt8[np.ndarray, "t h w 3"]], part: str = ""
    ) -> Orbit:
        """What `make` makes as an orbit, in the folder `part` of the output."""
        part = part.strip("/")
        folder = None if self.record.folder is None else self.record.folder / part
        kept = watch = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / orbit_files.SAMPLING_FILE
            if every := self.options.preview_every:
                watch = orbit_files.preview_writer(folder / "previews", model, every)
        return self.steps.take(
            " ".join([model.name, *part.split("/")]).strip(),
            f"{part}/{orbit_files.CAMERAS_FILE}".lstrip("/"),
            lambda: orbit_files.as_orbit(make(progress=self.options.progress, kept=kept, watch=watch), cameras),
            orbit_files.write_views,
            orbit_files.read_written_views,
        )

    def finish(self, orbits: Sequence[Orbit]) -> None:
        if self.record.folder is not None:
            orbit_files.write_sheet(self.record.folder / orbit_files.SHEET_FILE, orbits)
            self.record.write()


def open_stage(source: str | Path, stage: Literal[1, 2], **settings: Any) -> StageModel:
    """The model of one stage of a source (see `Hi3DPipeline.from_pretrained`), the other stage untouched."""
    folders = stage_folders(source)
    fitting = [folder for folder in folders if Recipe.of(folder).stage == stage]
    return StageModel((fitting or folders)[0], stage, **settings)
