"""Stage 2 (paper section 4.3): the views of an orbit again, at high resolution, held together by their depth."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from hi3d_jax.stages.conditioning import encode
from hi3d_jax.stages.framing import resize_views, to_network, with_first_view
from hi3d_jax.stages.model import StageModel, Watch, draw_latents, random_key
from hi3d_jax.stages.recipe import RecipeError


def refine(
    model: StageModel,
    coarse: UInt8[np.ndarray, "t h w 3"],
    image: UInt8[np.ndarray, "s s 3"] | None = None,
    *,
    elevation_deg: float = 0.0,
    seed: int = 0,
    variant: int = 0,
    num_steps: int | None = None,
    progress: bool = True,
    kept: Path | None = None,
    watch: Watch | None = None,
) -> UInt8[np.ndarray, "t s s 3"]:
    """The `coarse` views, on white and of any size, refined; `image` is what view 0 shows, at the model's size.

    Without `image`, view 0 of `coarse` stands for it. Otherwise as `multiview`.
    """
    recipe = model.recipe
    size = recipe.image_size
    check_count(model, len(coarse))
    views = resize_views(coarse, size, recipe)
    keeps_image = recipe.refined_first_view_is_image and image is not None
    image = views[0] if image is None else image
    if image.shape != (size, size, 3):
        raise RecipeError(f"{model.name} takes an image of {size} x {size} pixels, not {image.shape}: use frame_image")
    if recipe.first_view_is_image:
        views = with_first_view(views, image)
    noise_key, augment_key, posterior_key = jax.random.split(random_key(seed, variant, recipe.stage), 3)
    shown = jnp.asarray(to_network(views))
    parts = encode(
        recipe,
        model.encoders(progress),
        jnp.asarray(to_network(image))[None],
        jnp.full(1, elevation_deg, jnp.float32),
        jax.random.normal(augment_key, (1, *shown.shape)),
        shown[None],
    )
    latents = None
    if recipe.blend_exponent is not None:
        latents = draw_latents(model.run("coarse_latents", shown, progress), posterior_key, model.scaling_factor)
    noise = jax.random.normal(noise_key, model.programs["denoise_step"].inputs[0].shape)
    refined = model.sample(parts, noise, latents, num_steps=num_steps, progress=progress, kept=kept, watch=watch)
    decoded = model.decode(refined, progress)
    if recipe.residual is not None:
        before = model.decode(parts.latents[0] * model.scaling_factor, progress)
        change = recipe.residual * (decoded.astype(np.float32) - before)
        decoded = np.clip(np.rint(views + change), 0, 255).astype(np.uint8)
    return with_first_view(decoded, image) if keeps_image else decoded


def check_count(model: StageModel, count: int) -> None:
    """Raises `RecipeError` for orbits with another number of views than the model draws."""
    expected = model.recipe.num_views
    if count != expected:
        raise RecipeError(
            f"{model.name} refines orbits of {expected} views and got {count}; give all views of an orbit with "
            f"{expected} of them"
        )
