"""What the U-Nets are told beside the noisy latents, as the recipe has it (paper sections 4.2, 4.3; HI3D.md 2 to 4).

`encode` brings pictures through networks to `ConditionParts`, which training may cache and drop from; `assemble` puts
them into the U-Net's three inputs. Pictures are in [-1, 1]; latents are unscaled; everything can be traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.aesthetic import aesthetic_input
from hi3d_jax.models.clip import clip_input
from hi3d_jax.models.depth import depth_input, disparity_latents
from hi3d_jax.models.embeddings import aesthetic_vector, scalar_vector
from hi3d_jax.stages.recipe import Recipe, RecipeError

Images = Float[Array, "n h w 3"]


class Conditions(NamedTuple):
    """The U-Net's inputs beside noisy latents and noise level."""

    image_token: Float[Array, "b 1 e"]
    concat_latents: Float[Array, "b t h w c"]
    vector: Float[Array, "b d"]


class ConditionParts(NamedTuple):
    """What conditions are made of. `latents` may have one view that stands for all."""

    image_token: Float[Array, "b e"]
    latents: Float[Array, "b t2 h w c"]
    elevation_deg: Float[Array, " b"]
    cond_aug: Float[Array, " b"]
    depth: Float[Array, "b t h w k"] | None = None
    aesthetic: Float[Array, " b"] | None = None


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The networks that conditions come from, as functions of pictures in [-1, 1]."""

    image_token: Callable[[Images], Float[Array, "n e"]]
    latents: Callable[[Images], Float[Array, "n h2 w2 c"]]
    # Only for recipes that have the condition.
    depth: Callable[[Images], Float[Array, "n h2 w2 k"]] | None = None
    aesthetic: Callable[[Images], Float[Array, " n"]] | None = None

    @classmethod
    def of(cls, recipe: Recipe, networks: Mapping[str, Any]) -> Encoders:
        """Those of a model folder's networks (modules by name), for use inside one traced function."""
        vae = networks.get("conditioning_vae", networks["vae"])
        depth = aesthetic = None
        if "depth" in recipe.concat:
            stride = vae.config.downsampling
            depth = lambda images: depth_channels(networks["depth"], images, stride, recipe.depth_unfold)  # noqa: E731
        if "aesthetic" in recipe.vector:
            towers = networks["aesthetic_encoder"], networks["aesthetic_predictor"]
            aesthetic = lambda images: aesthetic_score(*towers, images)  # noqa: E731
        return cls(
            lambda images: image_token(networks["image_encoder"], images),
            lambda images: vae.encode(images).mean,
            depth,
            aesthetic,
        )


def image_token(encoder: Callable[[Array], Array], images: Images) -> Float[Array, "n e"]:
    """The embedding that the U-Net's cross-attention sees; `encoder` is a CLIPVision."""
    return encoder(clip_input(images, encoder.config.image_size)).astype(jnp.float32)


def aesthetic_score(
    encoder: Callable[[Array], Array], predictor: Callable[[Array], Array], images: Images
) -> Float[Array, " n"]:
    """How much people would like the pictures, about 5; in SVD's slot for the frame rate."""
    return predictor(encoder(aesthetic_input(images))).astype(jnp.float32)


def depth_channels(
    depth: Callable[[Array], Array], images: Images, stride: int, unfold: int
) -> Float[Array, "n h2 w2 k"]:
    """Disparity on the latent grid, [0, 1] in each picture, in unfold^2 channels; `depth` is a DPT."""
    rows, columns = images.shape[1] // stride, images.shape[2] // stride
    return disparity_latents(depth(depth_input(images)).astype(jnp.float32), rows, columns, unfold)


def encode(
    recipe: Recipe,
    encoders: Encoders,
    image: Float[Array, "b h w 3"],
    elevation_deg: Float[Array, " b"],
    noise: Float[Array, "b t h w 3"],
    coarse: Float[Array, "b t h w 3"] | None = None,
    cond_aug: Float[Array, " b"] | None = None,
    aesthetic_image: Float[Array, "b h w 3"] | None = None,
) -> ConditionParts:
    """The conditions of videos that show the object of `image`, view 0, from `elevation_deg`.

    `coarse` are the views that stage 2 refines, view 0 among them. Latents and depth are those of pictures (stage 1:
    of the one picture) under `noise`, standard normal, times `cond_aug`, which is the recipe's unless given: so that
    flaws in them are not taken literally. The aesthetic score is that of `image`; the released training took another
    view, `aesthetic_image`.
    """
    if (coarse is None) != (recipe.stage == 1):
        raise RecipeError(f"stage {recipe.stage} takes {'no' if recipe.stage == 1 else 'the'} coarse views")
    if cond_aug is None:
        cond_aug = jnp.full(len(image), recipe.cond_aug, jnp.float32)
    clean = image[:, None] if coarse is None else coarse
    shown = clean + cond_aug.reshape(-1, 1, 1, 1, 1) * noise

    def each_view(function: Callable[[Array], Array]) -> Array:
        made = function(shown.reshape(-1, *shown.shape[2:]))
        return made.reshape(*shown.shape[:2], *made.shape[1:])

    aesthetic = None
    if "aesthetic" in recipe.vector:
        aesthetic = encoders.aesthetic(image if aesthetic_image is None else aesthetic_image)
    return ConditionParts(
        image_token=encoders.image_token(image),
        latents=each_view(encoders.latents),
        elevation_deg=elevation_deg,
        cond_aug=cond_aug,
        depth=each_view(encoders.depth) if "depth" in recipe.concat else None,
        aesthetic=aesthetic,
    )


def assemble(recipe: Recipe, parts: ConditionParts) -> Conditions:
    """The U-Net's inputs, in the order of the recipe."""
    latents = parts.latents
    latents = jnp.broadcast_to(latents, (len(latents), recipe.num_views, *latents.shape[2:]))
    concat = {"image_latents": latents, "coarse_latents": latents, "depth": parts.depth}
    scalars = {"elevation": parts.elevation_deg, "cond_aug": parts.cond_aug}
    vectors = [
        aesthetic_vector(parts.aesthetic) if name == "aesthetic" else scalar_vector(scalars[name][:, None])
        for name in recipe.vector
    ]
    return Conditions(
        parts.image_token[:, None],
        jnp.concatenate([concat[name] for name in recipe.concat], axis=-1),
        jnp.concatenate(vectors, axis=-1),
    )


def unconditional(parts: ConditionParts) -> ConditionParts:
    """The same with nothing of what shows the object; elevation, cond_aug and the aesthetic score stay."""
    return parts._replace(
        image_token=jnp.zeros_like(parts.image_token),
        latents=jnp.zeros_like(parts.latents),
        depth=None if parts.depth is None else jnp.zeros_like(parts.depth),
    )


def for_guidance(recipe: Recipe, parts: ConditionParts) -> Conditions:
    """The conditions of twice the videos, as `diffusion.guided` wants them: first all without, then all with."""
    both = assemble(recipe, unconditional(parts)), assemble(recipe, parts)
    return jax.tree.map(lambda uncond, cond: jnp.concatenate([uncond, cond]), *both)


def drop(recipe: Recipe, parts: ConditionParts, key: Array) -> ConditionParts:
    """The conditions of a training batch, each set to zero as often as the recipe says."""
    rates, videos = recipe.dropping, len(parts.image_token)
    views = recipe.num_views if rates.per_view else 1
    token_key, latents_key, depth_key = jax.random.split(key, 3)

    def kept(key: Array, rate: float, shape: tuple[int, ...], values: Array) -> Array:
        mask = jax.random.bernoulli(key, 1 - rate, shape)
        return mask.reshape(*shape, *(1,) * (values.ndim - len(shape))) * values

    latents = parts.latents
    latents = jnp.broadcast_to(latents, (videos, max(views, latents.shape[1]), *latents.shape[2:]))
    depth = parts.depth
    return parts._replace(
        image_token=kept(token_key, rates.image_token, (videos,), parts.image_token),
        latents=kept(latents_key, rates.latents, (videos, views), latents),
        depth=None if depth is None else kept(depth_key, rates.depth, (videos, views), depth),
    )
