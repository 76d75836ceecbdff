"""`hi3d views`: one image becomes the views of an orbit (stage 1)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from hi3d_jax.cli.models import ByRecipe, Dtype, Elevation, MemoryBudget, Model, open_model
from hi3d_jax.cli.output import Output, prepare_output


@dataclasses.dataclass(frozen=True)
class Views:
    """Draw the object of an image from all around (stage 1 of the paper).

    IMAGE is a still picture of one object, upright, not cut off at the border; view 0 of the orbit is the image
    itself, the camera then moves to its own right.

    examples:
      hi3d views photo.png -o out
      hi3d views photo.png -o out --model models/hi3d --elevation-deg 20 --variants 4
      hi3d views photo.png -o out --model models/hi3d --num-steps 10 --preview-every 2     # a first look
      hi3d refine out -o refined --model models/hi3d && hi3d reconstruct refined -o mesh
      hi3d views photo.png -o out --model models/hi3d --resume       # after Ctrl-C or a full disk

    FOLDER will hold contact_sheet.png (look at this first), orbit.mp4, views/ and cameras.json (with several variants:
    in variant_0/, variant_1/, ...), input.png, what the model was shown, and run.json, with settings, versions, time
    and memory of each step.
    """

    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """PNG, JPEG, WebP, TIFF, BMP or GIF of any size and colour mode."""
    output: Output
    """New folder for the results."""
    model: Model = "tiny"
    """The small model in the package, a model folder of stage 1 or with stage1/ in it, or a Hugging Face repository."""
    elevation_deg: Elevation = 0.0
    """How far above the horizon the picture was taken, in degrees; auto: the elevation that the model fits best."""
    seed: int = 0
    """The same seed gives the same views on the same machine."""
    num_variants: Annotated[int, arg(aliases=["--variants"])] = 1
    """How many orbits to draw; variant k of a seed is the same however many are drawn."""
    num_steps: ByRecipe = None
    """Sampling steps: fewer are faster and coarser."""
    matting: Literal["auto", "alpha", "key", "rembg"] = "auto"
    """How the object is cut out: the file's alpha, keying a plain background, rembg; auto: the first that fits."""
    keep_framing: FlagCreatePairsOff[bool] = False
    """Leave the object where it is in the picture, even where the model prefers it in the middle at a certain size."""
    preview_every: int = 0
    """Write a few views, small, every so many steps; 0: none."""
    dtype: Dtype = "auto"
    """What networks compute in; auto: float32 on CPU, else bfloat16."""
    memory_budget: MemoryBudget = None
    """The most memory to hold on each device, like 12GB, or auto: nine tenths of all there is. Chooses how much is done
    at once, and bfloat16 where nothing else helps; says beforehand what will be held."""
    num_devices: int = 1
    """Devices that share each orbit; they must divide its views, or twice their number."""
    resume: FlagCreatePairsOff[bool] = False
    """Continue the run that FOLDER holds where it was interrupted."""

    def run(self) -> None:
        prepare_output(self.output, self.resume, self.image)
        from hi3d_jax.stages.pipeline import Hi3DPipeline, Options

        generator = open_model(self.model, 1, self.dtype, self.memory_budget, self.num_devices)
        variants = Hi3DPipeline(generator)(
            self.image,
            self.output,
            elevation_deg=self.elevation_deg,
            seed=self.seed,
            num_variants=self.num_variants,
            num_steps=self.num_steps,
            matting=self.matting,
            keep_framing=self.keep_framing,
            options=Options(resume=self.resume, preview_every=self.preview_every),
        )
        size = generator.recipe.image_size
        orbits = f"{len(variants)} orbits" if len(variants) > 1 else "an orbit"
        print(f"{self.output}: {orbits} of {len(variants[0].coarse)} views, {size} x {size} pixels")
