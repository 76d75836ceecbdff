"""Stage 1 (paper section 4.2): from one image to the views of an orbit at low resolution."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from hi3d_jax.stages.conditioning import encode
from hi3d_jax.stages.framing import to_network
from hi3d_jax.stages.model import StageModel, Watch, random_key
from hi3d_jax.stages.recipe import Recipe, RecipeError


def multiview(
    model: StageModel,
    image: UInt8[np.ndarray, "s s 3"],
    *,
    elevation_deg: float = 0.0,
    seed: int = 0,
    variant: int = 0,
    num_steps: int | None = None,
    progress: bool = True,
    kept: Path | None = None,
    watch: Watch | None = None,
) -> UInt8[np.ndarray, "t s s 3"]:
    """The orbit whose view 0 is `image`, from `framing.frame_image`, seen from `elevation_deg`.

    The same seed and variant give the same views on the same device; variants of a seed are independent draws. See
    `sampling.sample` for `progress`, `kept` and `watch`. Warns of elevations that training did not show. Raises
    `StageError` where numbers stop being finite, `RecipeError` for an image of another size.
    """
    recipe = model.recipe
    check_elevation(recipe, elevation_deg)
    size = recipe.image_size
    if image.shape != (size, size, 3):
        raise RecipeError(f"{model.name} takes an image of {size} x {size} pixels, not {image.shape}: use frame_image")
    noise_key, augment_key = jax.random.split(random_key(seed, variant, recipe.stage))
    parts = encode(
        recipe,
        model.encoders(),
        jnp.asarray(to_network(image))[None],
        jnp.full(1, elevation_deg, jnp.float32),
        jax.random.normal(augment_key, (1, 1, size, size, 3)),
    )
    noise = jax.random.normal(noise_key, model.programs["denoise_step"].inputs[0].shape)
    latents = model.sample(parts, noise, num_steps=num_steps, progress=progress, kept=kept, watch=watch)
    return model.decode(latents)


def check_elevation(recipe: Recipe, elevation_deg: float) -> None:
    """Warns where training showed no such views. Raises `RecipeError` for what is no elevation."""
    if not -90 <= elevation_deg <= 90:
        raise RecipeError(f"elevation {elevation_deg} is outside -90 to 90 degrees")
    low, high = recipe.elevation_range_deg
    if not low <= elevation_deg <= high:
        trained = ", ".join(f"{value:g}" for value in recipe.elevations_deg or ())
        warnings.warn(
            f"elevation {elevation_deg:g} is outside what this model was trained on, {low:g} to {high:g} degrees"
            f"{f' ({trained})' if trained else ''}; expect distorted views",
            stacklevel=3,
        )
