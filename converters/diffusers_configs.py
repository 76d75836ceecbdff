"""Our configs as the config.json files with which diffusers and transformers build the same networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from converters.rules import ConversionError
from hi3d_jax.models.clip import CLIPVisionConfig
from hi3d_jax.models.unet import UNetConfig
from hi3d_jax.models.vae import AutoencoderConfig, TemporalDecoderConfig

# What diffusers calls the width of each scalar condition's embedding, and the settings that SVD was published with.
_SCALAR_WIDTH, _NUM_FRAMES, _LATENT_SIZE, _IMAGE_SIZE = 256, 25, 96, 768


def unet_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """A UNetSpatioTemporalConditionModel. Its group norms' epsilon is fixed in code (HI3D.md section 5)."""
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    return {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "sample_size": _LATENT_SIZE,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        "up_block_types": [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)],
        "block_out_channels": list(config.block_channels),
        "addition_time_embed_dim": _SCALAR_WIDTH,
        "projection_class_embeddings_input_dim": config.vector_dim,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_layers,
        "num_attention_heads": list(config.num_heads),
        "num_frames": _NUM_FRAMES,
    }


def vae_to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """An AutoencoderKL."""
    levels = len(config.block_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "sample_size": _IMAGE_SIZE,
        "scaling_factor": config.scaling_factor,
    }


def temporal_vae_to_diffusers(config: TemporalDecoderConfig) -> dict[str, Any]:
    """An AutoencoderKLTemporalDecoder, which always has the convolution that sgm's files lack."""
    if not config.quant_conv:
        raise ConversionError(["vae: it has no quant_conv, as in sgm's files; diffusers' class cannot do without"])
    fields = vae_to_diffusers(config) | {"_class_name": "AutoencoderKLTemporalDecoder"}
    del fields["up_block_types"]
    return fields


def clip_to_transformers(config: CLIPVisionConfig) -> dict[str, Any]:
    """A CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "projection_dim": config.projection_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
    }


TO_DIFFUSERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    UNetConfig: unet_to_diffusers,
    AutoencoderConfig: vae_to_diffusers,
    TemporalDecoderConfig: temporal_vae_to_diffusers,
    CLIPVisionConfig: clip_to_transformers,
}
