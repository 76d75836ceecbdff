"""`hi3d refine`: the views of an orbit again, at high resolution (stage 2)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from hi3d_jax.cli.models import ByRecipe, Dtype, MemoryBudget, Model, open_model
from hi3d_jax.cli.output import Output, prepare_output


@dataclasses.dataclass(frozen=True)
class Refine:
    """Draw the views of an orbit again, larger and with finer detail (stage 2 of the paper).

    ORBIT is what `hi3d views` made, or a video, animated picture or folder of pictures of an object on white, with as
    many equally spaced views as the model draws, view 0 first, the camera moving to its own right.

    examples:
      hi3d views photo.png -o out && hi3d refine out -o refined
      hi3d refine orbit.mp4 -o refined --model models/hi3d --elevation-deg 20 --image photo_on_white.png
      hi3d refine out -o refined --model models/hi3d --resume        # after Ctrl-C or a full disk

    FOLDER will hold contact_sheet.png (look at this first), orbit.mp4, views/ and cameras.json, which `hi3d
    reconstruct` reads, and run.json, with settings, versions, time and memory of each step.
    """

    orbit: Annotated[Positional[Path], arg(metavar="ORBIT")]
    """Folder, video or animated picture with the views."""
    output: Output
    """New folder for the results."""
    model: Model = "tiny"
    """The small model in the package, a model folder of stage 2 or with stage2/ in it, or a Hugging Face repository."""
    image: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: what `hi3d views` was given)")] = (
        None
    )
    """What view 0 shows, in more detail and framed alike. Without it and any file of `hi3d views`: view 0 itself."""
    elevation_deg: float = 0.0
    """How far above the horizon the views were taken, in degrees. Ignored where the folder holds cameras."""
    seed: int = 0
    """The same seed gives the same views on the same machine."""
    num_steps: ByRecipe = None
    """Sampling steps: fewer are faster and coarser."""
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
        prepare_output(self.output, self.resume, self.orbit)
        from hi3d_jax.stages.inputs import input_of
        from hi3d_jax.stages.pipeline import Hi3DPipeline, Options
        from hi3d_jax.video import read_views

        views, cameras = read_views(self.orbit)
        refiner = open_model(self.model, 2, self.dtype, self.memory_budget, self.num_devices)
        refined = Hi3DPipeline(refiner=refiner).refine(
            views,
            self.output,
            image=input_of(self.orbit) if self.image is None else self.image,
            cameras=cameras,
            elevation_deg=self.elevation_deg,
            seed=self.seed,
            num_steps=self.num_steps,
            options=Options(resume=self.resume, preview_every=self.preview_every),
        )
        size = refiner.recipe.image_size
        print(f"{self.output}: an orbit of {len(refined)} views, {size} x {size} pixels")
