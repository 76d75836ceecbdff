"""All three stages in one call (paper figure 2): from an image to textured meshes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from hi3d_jax.images import Matting
from hi3d_jax.stages.background import without_background
from hi3d_jax.stages.inputs import Picture
from hi3d_jax.stages.pipeline import Hi3DPipeline, Options, Variant
from hi3d_jax.stages.presets import ReconstructConfig
from hi3d_jax.stages.reconstruct import Reconstruction, reconstruct

# Where stages 1 and 2 leave their files in a run's folder; stage 3's files stand beside it.
GENERATED_FOLDER = "generated"


@dataclasses.dataclass(frozen=True)
class Asset:
    """One draw: the views that stages 1 and 2 made, and what stage 3 made of them."""

    views: Variant
    reconstruction: Reconstruction


class ImageTo3D:
    """Stages 1, 2 and 3 behind one call; without a refiner stage 3 takes the views of stage 1."""

    def __init__(self, pipeline: Hi3DPipeline):
        self.pipeline = pipeline

    @classmethod
    def from_pretrained(cls, *sources: str | Path, **settings: Any) -> ImageTo3D:
        """See `Hi3DPipeline.from_pretrained`."""
        return cls(Hi3DPipeline.from_pretrained(*sources, **settings))

    def __call__(
        self,
        image: Picture,
        output: str | Path | None = None,
        *,
        elevation_deg: float | Literal["auto"] = 0.0,
        num_variants: int = 1,
        num_steps: int | None = None,
        matting: Matting = "auto",
        keep_framing: bool = False,
        config: ReconstructConfig | None = None,
        options: Options | None = None,
    ) -> list[Asset]:
        """Textured meshes of the object in `image`, one for each variant; `config.seed` decides all three stages.

        Files are only written into the folder `output`: of stages 1 and 2 in generated/, of stage 3 beside it, with
        several variants in variant_0/, variant_1/ and so on. Otherwise as `Hi3DPipeline` and `reconstruct`.
        """
        options = Options() if options is None else options
        config = ReconstructConfig() if config is None else config
        output = None if output is None else Path(output)
        variants = self.pipeline(
            image,
            None if output is None else output / GENERATED_FOLDER,
            elevation_deg=elevation_deg,
            seed=config.seed,
            num_variants=num_variants,
            num_steps=num_steps,
            matting=matting,
            keep_framing=keep_framing,
            options=options,
        )
        assets = []
        for number, variant in enumerate(variants):
            folder = output if output is None or num_variants == 1 else output / f"variant_{number}"
            made = reconstruct(without_background(variant.orbit), folder, config, options.resume, options.progress)
            assets.append(Asset(variant, made))
        return assets
