"""Tables for the autoencoders: sgm's layout (first stages of SVD's and Hi3D's checkpoint files) and diffusers' `vae/`.

Our names are diffusers'. sgm counts the decoder's resolutions from fine to coarse, diffusers and we in the order they
run. The image autoencoder's decoder and the temporal one differ in their residual blocks only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converters.rules import Rule, conv1x1_as_linear, conv2d, conv3d, keep, linear
from converters.svd_unet import Layer, layer_rules, require
from hi3d_jax.models.vae import AutoencoderConfig, TemporalDecoderConfig

SGM_RESNET: Sequence[Layer] = (
    ("norm1", "norm1", keep),
    ("conv1", "conv1", conv2d),
    ("norm2", "norm2", keep),
    ("conv2", "conv2", conv2d),
    ("nin_shortcut", "conv_shortcut", conv2d),
)
DIFFUSERS_RESNET: Sequence[Layer] = tuple((target, target, transform) for _, target, transform in SGM_RESNET)
SGM_TIME_STACK: Sequence[Layer] = (
    ("in_layers.0", "norm1", keep),
    ("in_layers.2", "conv1", conv3d),
    ("out_layers.0", "norm2", keep),
    ("out_layers.3", "conv2", conv3d),
)
DIFFUSERS_TIME_STACK: Sequence[Layer] = tuple((target, target, transform) for _, target, transform in SGM_TIME_STACK)
# sgm writes the attention's linear layers as 1x1 convolutions.
SGM_ATTENTION: Sequence[Layer] = (
    ("norm", "group_norm", keep),
    ("q", "to_q", conv1x1_as_linear),
    ("k", "to_k", conv1x1_as_linear),
    ("v", "to_v", conv1x1_as_linear),
    ("proj_out", "to_out", conv1x1_as_linear),
)
DIFFUSERS_ATTENTION: Sequence[Layer] = (
    ("group_norm", "group_norm", keep),
    ("to_q", "to_q", linear),
    ("to_k", "to_k", linear),
    ("to_v", "to_v", linear),
    ("to_out.0", "to_out", linear),
)
QUANT_CONVS: Sequence[Layer] = (
    ("quant_conv", "quant_conv", conv2d),
    ("post_quant_conv", "post_quant_conv", conv2d),
)


def _ends(half: str, norm_out: str) -> Iterator[Rule]:
    """First and last layers of the encoder or the decoder."""
    layers: tuple[Layer, ...] = (("conv_in", "conv_in", conv2d), (norm_out, "conv_norm_out", keep))
    yield from layer_rules((*layers, ("conv_out", "conv_out", conv2d)), f"{half}.", f"{half}.")


def _sgm_blocks(config: AutoencoderConfig, half: str) -> Iterator[tuple[str, str]]:
    """(sgm's prefix, our prefix) of the residual blocks, the attention and the resamplers of one half."""
    yield f"{half}.mid.block_1.", f"{half}.mid_block.resnets.0."
    yield f"{half}.mid.attn_1.", f"{half}.mid_block.attentions.0."
    yield f"{half}.mid.block_2.", f"{half}.mid_block.resnets.1."
    levels = len(config.block_channels)
    for level in range(levels):
        encoding = half == "encoder"
        theirs = f"encoder.down.{level}" if encoding else f"decoder.up.{levels - 1 - level}"
        ours = f"encoder.down_blocks.{level}" if encoding else f"decoder.up_blocks.{level}"
        for i in range(config.layers_per_block + (not encoding)):
            yield f"{theirs}.block.{i}.", f"{ours}.resnets.{i}."
        if level < levels - 1:
            kind = "downsample" if encoding else "upsample"
            yield f"{theirs}.{kind}.conv", f"{ours}.{kind}rs.0.conv"


def _sgm_half(config: AutoencoderConfig, half: str, *, temporal: bool = False) -> Iterator[Rule]:
    yield from _ends(half, "norm_out")
    for source, target in _sgm_blocks(config, half):
        if ".attentions." in target:
            yield from layer_rules(SGM_ATTENTION, source, target)
        elif ".resnets." not in target:
            yield from layer_rules([(source, target, conv2d)])
        elif temporal:
            yield from layer_rules(SGM_RESNET, source, f"{target}spatial_res_block.")
            yield from layer_rules(SGM_TIME_STACK, f"{source}time_stack.", f"{target}temporal_res_block.")
            yield Rule(rf"{re.escape(source)}mix_factor", f"{target}time_mixer.mix_factor")
        else:
            yield from layer_rules(SGM_RESNET, source, target)


def _diffusers_half(config: AutoencoderConfig, half: str, *, temporal: bool = False) -> Iterator[Rule]:
    yield from _ends(half, "conv_norm_out")
    for _, target in _sgm_blocks(config, half):
        if ".attentions." in target:
            yield from layer_rules(DIFFUSERS_ATTENTION, target, target)
        elif ".resnets." not in target:
            yield from layer_rules([(target, target, conv2d)])
        elif temporal:
            for part, layers in (("spatial", DIFFUSERS_RESNET), ("temporal", DIFFUSERS_TIME_STACK)):
                yield from layer_rules(layers, f"{target}{part}_res_block.", f"{target}{part}_res_block.")
            yield Rule(rf"{re.escape(target)}time_mixer\.mix_factor", f"{target}time_mixer.mix_factor")
        else:
            yield from layer_rules(DIFFUSERS_RESNET, target, target)


def sgm_rules(config: AutoencoderConfig) -> list[Rule]:
    """The image autoencoder's table for sgm's keys, without their prefix ("first_stage_model.", for one)."""
    return [*_sgm_half(config, "encoder"), *_sgm_half(config, "decoder"), *layer_rules(QUANT_CONVS)]


def diffusers_rules(config: AutoencoderConfig) -> list[Rule]:
    """The table for the keys of a diffusers AutoencoderKL."""
    return [*_diffusers_half(config, "encoder"), *_diffusers_half(config, "decoder"), *layer_rules(QUANT_CONVS)]


def temporal_sgm_rules(config: TemporalDecoderConfig) -> list[Rule]:
    """The table for the first stage of svd.safetensors and svd_xt.safetensors, without "first_stage_model."."""
    ending = layer_rules([("decoder.conv_out.time_mix_conv", "decoder.time_conv_out", conv3d)])
    halves = (*_sgm_half(config, "encoder"), *_sgm_half(config, "decoder", temporal=True))
    return [*halves, *ending, *layer_rules(QUANT_CONVS[:1])]


def temporal_diffusers_rules(config: TemporalDecoderConfig) -> list[Rule]:
    """The table for the keys of a diffusers AutoencoderKLTemporalDecoder."""
    ending = layer_rules([("decoder.time_conv_out", "decoder.time_conv_out", conv3d)])
    halves = (*_diffusers_half(config, "encoder"), *_diffusers_half(config, "decoder", temporal=True))
    return [*halves, *ending, *layer_rules(QUANT_CONVS[:1])]


def config_from_diffusers(config: Mapping[str, Any]) -> AutoencoderConfig:
    """The autoencoder that a diffusers `vae/config.json` describes: an image or a temporal-decoder one.

    Raises ValueError for a config of another class or without a needed entry.
    """
    classes = {"AutoencoderKL": AutoencoderConfig, "AutoencoderKLTemporalDecoder": TemporalDecoderConfig}
    name = config.get("_class_name")
    if name not in classes:
        raise ValueError(f"_class_name is {name!r}: only {' and '.join(classes)} can be converted")
    require(config, "in_channels", "latent_channels", "block_out_channels", "layers_per_block", "scaling_factor")
    return classes[name](
        image_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        block_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        scaling_factor=config["scaling_factor"],
    )
