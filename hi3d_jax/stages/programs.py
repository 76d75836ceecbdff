"""The compiled programs of stages 1 and 2, each with the shapes it is called with.

A run, `hi3d warmup`, the memory planner and ahead-of-time compilation for other machines all go by this list: what is
compiled beforehand is what runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.embeddings import VECTOR_DIM
from hi3d_jax.models.vae import Posterior
from hi3d_jax.stages import conditioning
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.stages.sampling import Blending, Conditions, NoiseLevel, denoise_step

# Views of a preview, and how much smaller than the result they are.
PREVIEW_VIEWS = 4
PREVIEW_SHRINK = 2


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How much is done at once: less takes less memory. Views per call are rounded down to a divisor of all views."""

    encode_views: int = 1
    decode_views: int = 1
    # The U-Net without and with conditions one after the other.
    split_guidance: bool = False


ONE_BY_ONE = Chunking()


@functools.partial(jax.jit, static_argnames="graphdef")
def encode_token(graphdef: Any, params: Any, images: Float[Array, "n h w 3"]) -> Float[Array, "n e"]:
    """The image encoder on pictures in [-1, 1]."""
    return conditioning.image_token(nnx.merge(graphdef, params), images)


@functools.partial(jax.jit, static_argnames="graphdef")
def score(graphdef: Any, params: Any, images: Float[Array, "n h w 3"]) -> Float[Array, " n"]:
    """The aesthetic encoder and predictor on pictures in [-1, 1]."""
    return conditioning.aesthetic_score(*nnx.merge(graphdef, params), images)


@functools.partial(jax.jit, static_argnames="graphdef")
def encode_latents(graphdef: Any, params: Any, images: Float[Array, "n h w 3"]) -> Posterior:
    """The autoencoder's unscaled latents of pictures in [-1, 1]."""
    return nnx.merge(graphdef, params).encode(images)


@functools.partial(jax.jit, static_argnames=("graphdef", "stride", "unfold"))
def estimate_depth(
    graphdef: Any, params: Any, images: Float[Array, "n h w 3"], *, stride: int, unfold: int
) -> Float[Array, "n h2 w2 k"]:
    """The depth condition of pictures in [-1, 1]."""
    return conditioning.depth_channels(nnx.merge(graphdef, params), images, stride, unfold)


@functools.partial(jax.jit, static_argnames="graphdef")
def decode(graphdef: Any, params: Any, latents: Float[Array, "t h w c"]) -> Float[Array, "t h2 w2 3"]:
    """Views in [0, 1] of scaled latents; what is not finite stays so."""
    vae = nnx.merge(graphdef, params)
    views = vae.decode(latents[None] / vae.config.scaling_factor)[0]
    return jnp.clip(views / 2 + 0.5, 0, 1)


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function: `function(graphdef, params, *inputs, **options)` of one network, or of several as a tuple.

    `params` and `inputs` have ShapeDtypeStructs as leaves, with shardings where it is placed on several devices.
    """

    function: Any
    networks: tuple[str, ...]
    graphdef: Any
    params: Any
    inputs: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, params: Any, *inputs: Any) -> Any:
        """Runs it, compiling it the first time."""
        if isinstance(getattr(self.inputs[0], "sharding", None), jax.sharding.NamedSharding):
            inputs = jax.device_put(inputs, jax.tree.map(lambda spec: spec.sharding, self.inputs))
        return self.function(self.graphdef, params, *inputs, **self.options)

    def trace(self) -> Any:
        """Its jaxpr, for the default device or for those that its arguments are placed on; `lower()` goes on."""
        return self.function.trace(self.graphdef, self.params, *self.inputs, **self.options)

    def lower(self) -> Any:
        """The program ready to be compiled."""
        return self.trace().lower()


def make_programs(
    recipe: Recipe, networks: Mapping[str, nnx.Module], chunking: Chunking = ONE_BY_ONE
) -> dict[str, Program]:
    """All programs of a stage by name, for networks that may be abstract.

    "preview" is only run on request. The autoencoder's two roles, and previews and results, are separate programs
    where their shapes differ.
    """
    size, views, vae = recipe.image_size, recipe.num_views, networks["vae"]
    side, channels = size // vae.config.downsampling, networks["unet"].config.out_channels
    encoded = divisor(views, chunking.encode_views) if recipe.stage == 2 else 1
    image, few = _spec(1, size, size, 3), _spec(encoded, size, size, 3)
    latents = _spec(divisor(views, chunking.decode_views), side, side, channels)
    preview = _spec(min(PREVIEW_VIEWS, views), *(2 * (max(side // PREVIEW_SHRINK, 1),)), channels)
    conditioning_vae = "conditioning_vae" if "conditioning_vae" in networks else "vae"

    def program(function: Any, names: str | tuple[str, ...], *inputs: Any, **options: Any) -> Program:
        chosen = networks[names] if isinstance(names, str) else tuple(networks[name] for name in names)
        graphdef, params = nnx.split(chosen)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return Program(function, (names,) if isinstance(names, str) else names, graphdef, params, inputs, options)

    programs = {
        "image_token": program(encode_token, "image_encoder", image),
        "conditioning_latents": program(encode_latents, conditioning_vae, few),
        "denoise_step": program(
            denoise_step,
            "unet",
            *step_inputs(recipe, networks["unet"].config.context_dim, side, channels),
            sampler=recipe.sampler,
            split_guidance=chunking.split_guidance,
        ),
        "decode": program(decode, "vae", latents),
        "preview": program(decode, "vae", preview),
    }
    if "aesthetic" in recipe.vector:
        programs["aesthetic"] = program(score, ("aesthetic_encoder", "aesthetic_predictor"), image)
    if "depth" in recipe.concat:
        options = {"stride": vae.config.downsampling, "unfold": recipe.depth_unfold}
        programs["depth"] = program(estimate_depth, "depth", few, **options)
    if recipe.blend_exponent is not None:
        programs["coarse_latents"] = program(encode_latents, "vae", few)
    return programs


def step_inputs(recipe: Recipe, context_dim: int, side: int, channels: int) -> tuple[Any, ...]:
    """What `denoise_step` is called with for one video, after its parameters, as ShapeDtypeStructs."""
    views = recipe.num_views
    noisy = _spec(1, views, side, side, channels)
    concat = concat_channels(recipe, channels)
    conditions = Conditions(_spec(2, 1, context_dim), _spec(2, views, side, side, concat), _spec(2, vector_dim(recipe)))
    blending = None if recipe.blend_exponent is None else Blending(noisy, noisy)
    return noisy, NoiseLevel(_spec(), _spec(), _spec()), _spec(views), conditions, blending


def concat_channels(recipe: Recipe, latent_channels: int) -> int:
    """Channels that the recipe puts behind the noisy latents."""
    return sum(recipe.depth_unfold**2 if name == "depth" else latent_channels for name in recipe.concat)


def vector_dim(recipe: Recipe) -> int:
    """Width of the added vector."""
    return VECTOR_DIM * len(recipe.vector)


def divisor(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, at least 1."""
    return max(n for n in range(1, max(min(count, most), 1) + 1) if count % n == 0)


def _spec(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)
