"""What a model has to be told, how it is sampled and how it was trained: everything in which models of a stage differ.

`Recipe.official` is the released code (HI3D.md), `Recipe.paper` the paper's text, completed by the released code's
choices where the text is silent. A model folder's config.json holds the recipe of its model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hi3d_jax.cameras import ORBIT_FOV_DEG, ORBIT_NUM_VIEWS, ORBIT_RADIUS
from hi3d_jax.pretrained import PretrainedError, config_from_dict, config_to_dict, read_config

VectorCondition = Literal["aesthetic", "elevation", "cond_aug"]
ConcatCondition = Literal["image_latents", "coarse_latents", "depth"]


class RecipeError(ValueError):
    """A recipe that contradicts itself or does not belong to what it is used for; the text says what and the remedy."""


@dataclasses.dataclass(frozen=True)
class Dropping:
    """How often training leaves each condition out, so that guidance has something to compare with."""

    # Share of videos without the image token.
    image_token: float = 0.1
    # Share of videos, or of views, without image or coarse latents.
    latents: float = 0.1
    # Share of videos, or of views, without depth.
    depth: float = 0.0
    # True: each view loses its latents or its depth by itself; False: all views of a video together.
    per_view: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One stage's recipe. Sizes are in pixels, noise levels are standard deviations, angles in degrees."""

    # "official", "paper", or a name of your own.
    name: str
    stage: Literal[1, 2]

    # Views of an orbit.
    num_views: int = ORBIT_NUM_VIEWS
    # Width and height of the views.
    image_size: int = 512
    # The cameras of the views, as in `cameras.orbit`.
    radius: float = ORBIT_RADIUS
    fov_deg: float = ORBIT_FOV_DEG

    # The object's longer side over the image's that the input image is brought to; None keeps its framing.
    foreground_ratio: float | None = None
    # How pictures are brought to size: OpenCV's two-tap bilinear (aliases where it shrinks), or exact area means.
    resampling: Literal["bilinear", "area"] = "bilinear"
    # The input image takes the place of the view 0 that stage 1 drew, for stage 2 as for whoever looks at the views.
    first_view_is_image: bool = True
    # Stage 2's view 0 is the input image itself, where it is at hand: for models that draw it less sharply than it was.
    refined_first_view_is_image: bool = False

    # Stage 2's views are the coarse ones and this share of what they change by between two decodings, of the coarse
    # latents and of those that are drawn: what the autoencoder cannot hold stays. None: they are what is decoded.
    residual: float | None = None

    # What the added vector is made of, 256 numbers each, and what is concatenated behind the noisy latents.
    vector: tuple[VectorCondition, ...] = ("elevation", "cond_aug")
    concat: tuple[ConcatCondition, ...] = ("image_latents",)
    # Disparity cells along each side of a latent cell: the depth has depth_unfold^2 channels.
    depth_unfold: int = 3
    # Standard deviation of the noise on the pictures (in [-1, 1]) that conditions come from, when sampling.
    cond_aug: float = 0.02

    # Euler steps, or Heun's, which are twice the work.
    sampler: Literal["euler", "heun"] = "euler"
    # Steps of the sampler.
    num_steps: int = 25
    # Lowest noise level before the last step.
    sigma_min: float = 0.002
    # Noise level that sampling starts from.
    sigma_max: float = 700.0
    # The noise levels are evenly spaced in sigma^(1/rho).
    rho: float = 7.0
    # Guidance scale of the first and of the last view; linear in between.
    guidance: tuple[float, float] = (1.0, 2.5)
    # Of stage 2's blending with the coarse views (`diffusion.blend_weights`); None: no blending.
    blend_exponent: float | None = None

    # Of the training views: the range, and the values where there were only some.
    elevation_range_deg: tuple[float, float] = (-10.0, 40.0)
    elevations_deg: tuple[float, ...] | None = None
    # Mean and standard deviation of the logarithms of training's noise levels and of its noise on conditions.
    log_sigma: tuple[float, float] = (1.0, 1.6)
    log_cond_aug: tuple[float, float] = (-3.0, 0.5)
    dropping: Dropping = Dropping()

    def __post_init__(self):
        coarse = {"coarse_latents", "depth"} & set(self.concat)
        if self.stage == 1 and (coarse or "image_latents" not in self.concat):
            raise RecipeError(f"stage 1 has one image to go by, so its concat is (image_latents), not {self.concat}")
        if self.stage == 2 and ("image_latents" in self.concat or "coarse_latents" not in self.concat):
            raise RecipeError(
                f"stage 2 refines coarse views: its concat has coarse_latents and maybe depth, not {self.concat}"
            )
        if self.stage == 1 and self.blend_exponent is not None:
            raise RecipeError("stage 1 has no coarse views to blend with: blend_exponent must be null")
        if self.stage == 1 and self.residual is not None:
            raise RecipeError("stage 1 has no coarse views to change: residual must be null")
        if self.num_views < 1 or self.image_size < 8 or self.depth_unfold < 1:
            raise RecipeError(
                f"num_views {self.num_views}, image_size {self.image_size} and depth_unfold {self.depth_unfold} must "
                "be at least 1, 8 and 1"
            )

    @classmethod
    def official(cls, stage: Literal[1, 2]) -> Recipe:
        """The released checkpoints (HI3D.md sections 0 to 4)."""
        return cls("official", stage, **_COMMON[stage], **_OFFICIAL[stage])

    @classmethod
    def paper(cls, stage: Literal[1, 2]) -> Recipe:
        """Sections 4.2 and 4.3 of the paper."""
        return cls("paper", stage, **_COMMON[stage], **_PAPER[stage])

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """The recipe of a config.json: fields that it lacks are those of the recipe it is named after (else `paper`).

        Raises `PretrainedError`.
        """
        name, stage = fields.get("name"), fields.get("stage")
        if not isinstance(name, str) or stage not in (1, 2):
            raise PretrainedError(
                f"{where} is {dict(fields)!r}: it must say name (official or paper) and stage (1 or 2); is this the "
                "folder of a stage of Hi3D?"
            )
        base = cls.official(stage) if name == "official" else cls.paper(stage)
        return config_from_dict(cls, {**config_to_dict(base), **fields}, where)

    @classmethod
    def of(cls, source: str | Path, stage: Literal[1, 2] | None = None) -> Recipe:
        """The recipe of a model folder. Raises `RecipeError` where that is of another than the wanted `stage`."""
        recipe = cls.from_dict(read_config(source).get("recipe") or {}, f"recipe in config.json of {source}")
        if stage is not None and recipe.stage != stage:
            raise RecipeError(
                f"{source} holds a model of stage {recipe.stage}, and stage {stage} is wanted; give the folder whose "
                f"config.json says stage {stage}"
            )
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """All fields, as config.json has them."""
        return config_to_dict(self)


_COMMON: dict[int, dict[str, Any]] = {
    1: {"image_size": 512, "concat": ("image_latents",), "guidance": (1.0, 2.5)},
    2: {"image_size": 1024, "concat": ("depth", "coarse_latents"), "guidance": (1.0, 2.0)},
}
_OFFICIAL_BOTH: dict[str, Any] = {
    # Trained on whole elevations only; each view's conditions are dropped by themselves (HI3D.md sections 0 and 4).
    "elevations_deg": (-10.0, 0.0, 10.0, 20.0, 30.0, 40.0),
    "dropping": Dropping(per_view=True),
}
_OFFICIAL: dict[int, dict[str, Any]] = {
    1: {**_OFFICIAL_BOTH, "vector": ("aesthetic", "elevation", "cond_aug")},
    2: {**_OFFICIAL_BOTH, "depth_unfold": 3, "blend_exponent": 40.0},
}
_PAPER_BOTH: dict[str, Any] = {
    # What objects 1 long fill of pictures taken from 1.5 away: the median of 720 renders of 60 objects, half of them
    # between 0.72 and 0.84 (the paper is silent).
    "foreground_ratio": 0.77,
    "resampling": "area",
    # Else guidance would compare with an input that training never showed (the paper is silent).
    "dropping": Dropping(depth=0.1),
}
_PAPER: dict[int, dict[str, Any]] = {
    1: {**_PAPER_BOTH},
    # "directly resize the depth maps into the same resolution of the latent code": one channel.
    2: {**_PAPER_BOTH, "depth_unfold": 1},
}
