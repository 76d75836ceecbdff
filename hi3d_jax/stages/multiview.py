"""Stage 1 (paper section 4.2): from one image to the views of an orbit at low resolution."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from hi3d_jax.stages.conditioning import encode
from hi3d_jax.stages.framing import to_network, with_first_view
from hi3d_jax.stages.model import StageModel, Watch, random_key
from hi3d_jax.stages.recipe import RecipeError


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
    `sampling.sample` for `progress`, `kept` and `watch`. Raises `StageError` where numbers stop being
    finite, `RecipeError` for an image of another size.
    """
    recipe = model.recipe
    size = recipe.image_size
    if image.shape != (size, size, 3):
        raise RecipeError(f"{model.name} takes an image of {size} x {size} pixels, not {image.shape}: use frame_image")
    noise_key, augment_key = jax.random.split(random_key(seed, variant, recipe.stage))
    parts = encode(
        recipe,
        model.encoders(progress),
        jnp.asarray(to_network(image))[None],
        jnp.full(1, elevation_deg, jnp.float32),
        jax.random.normal(augment_key, (1, 1, size, size, 3)),
    )
    noise = jax.random.normal(noise_key, model.programs["denoise_step"].inputs[0].shape)
    latents = model.sample(parts, noise, num_steps=num_steps, progress=progress, kept=kept, watch=watch)
    views = model.decode(latents, progress)
    return with_first_view(views, image) if recipe.first_view_is_image else views
