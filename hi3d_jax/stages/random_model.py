"""Models of the smallest sizes with random weights: to try an installation, a pipeline or a machine without weights.

What they draw is noise. The networks are of the same classes as the full ones and fit any recipe.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hi3d_jax.models.aesthetic import AestheticConfig, AestheticPredictor
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.models.depth import DPT, DPTConfig
from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig
from hi3d_jax.pretrained import abstract_network, save_pretrained, with_parameters
from hi3d_jax.stages.programs import concat_channels, vector_dim
from hi3d_jax.stages.recipe import Recipe

IMAGE_ENCODER = CLIPVisionConfig(
    image_size=32, patch_size=16, width=32, mlp_width=64, num_layers=1, num_heads=2, projection_dim=16
)
# Its input has 224 pixels whatever the tower (`aesthetic_input`).
AESTHETIC_ENCODER = dataclasses.replace(IMAGE_ENCODER, image_size=224, patch_size=56)
DEPTH = DPTConfig(
    image_size=32,
    stem_width=32,
    stage_widths=(128, 128, 128),
    stage_depths=(1, 1, 1),
    width=32,
    mlp_width=64,
    num_layers=2,
    num_heads=2,
    tap_layers=(0, 1),
    tap_widths=(32, 32),
    fusion_width=32,
)


def random_networks(recipe: Recipe) -> dict[str, tuple[type[nnx.Module], Any]]:
    """Class and config of all networks that a model with this recipe consists of."""
    vae = AutoencoderConfig.tiny()
    unet = UNetConfig.tiny(
        in_channels=vae.latent_channels + concat_channels(recipe, vae.latent_channels),
        vector_dim=vector_dim(recipe),
        context_dim=IMAGE_ENCODER.projection_dim,
    )
    networks = {
        "unet": (UNet, unet),
        "vae": (Autoencoder, vae),
        "image_encoder": (CLIPVision, IMAGE_ENCODER),
    }
    if "depth" in recipe.concat:
        networks["depth"] = DPT, DEPTH
    if "aesthetic" in recipe.vector:
        networks["aesthetic_encoder"] = CLIPVision, AESTHETIC_ENCODER
        networks["aesthetic_predictor"] = AestheticPredictor, AestheticConfig(widths=(16, 8, 1))
    return networks


def write_random_model(folder: str | Path, recipe: Recipe, seed: int = 0) -> None:
    """Writes a model folder whose weights are normal numbers, small enough for every sum to stay near 1.

    `recipe.image_size` must be a multiple of 16, and for stage 2 with depth at least 96. Raises `PretrainedError`.
    """
    generator = np.random.default_rng(seed)

    def values(path: str, spec: Any) -> jax.Array:
        # Half of what keeps the variance of a sum of as many inputs; scales of norms are around 1.
        spread = 0.5 / np.sqrt(max(int(np.prod(spec.shape[:-1])), 1)) if len(spec.shape) > 1 else 0.1
        return jnp.asarray(spread * generator.normal(size=spec.shape) + path.endswith("scale"), jnp.float32)

    networks = {
        name: with_parameters(abstract_network(cls, config), values)
        for name, (cls, config) in random_networks(recipe).items()
    }
    save_pretrained(folder, networks, recipe.to_dict())
