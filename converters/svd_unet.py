"""Tables for the spatio-temporal U-Net: sgm's layout (SVD's and Hi3D's checkpoint files) and diffusers' `unet/` folder.

Our names are diffusers' (`hi3d_jax/models/unet.py`), so this file is also the reader's map between
the two worlds. sgm numbers its blocks through: `input_blocks.4.1` is `down_blocks.1.attentions.0`; `_sgm_blocks` counts
them off. Within a block the names are tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converters.rules import Rule, Transform, conv2d, conv3d, keep, linear
from hi3d_jax.models.unet import UNetConfig

# (source, target, transform) of a layer's `weight`; a bias goes along where the source has one.
Layer = tuple[str, str, Transform]

SGM_STEM: Sequence[Layer] = (
    ("time_embed.0", "time_embedding.linear_1", linear),
    ("time_embed.2", "time_embedding.linear_2", linear),
    ("label_emb.0.0", "add_embedding.linear_1", linear),
    ("label_emb.0.2", "add_embedding.linear_2", linear),
    ("input_blocks.0.0", "conv_in", conv2d),
    ("out.0", "conv_norm_out", keep),
    ("out.2", "conv_out", conv2d),
)
DIFFUSERS_STEM: Sequence[Layer] = (
    ("time_embedding.linear_1", "time_embedding.linear_1", linear),
    ("time_embedding.linear_2", "time_embedding.linear_2", linear),
    ("add_embedding.linear_1", "add_embedding.linear_1", linear),
    ("add_embedding.linear_2", "add_embedding.linear_2", linear),
    ("conv_in", "conv_in", conv2d),
    ("conv_norm_out", "conv_norm_out", keep),
    ("conv_out", "conv_out", conv2d),
)
SGM_RESNET: Sequence[Layer] = (
    ("in_layers.0", "spatial_res_block.norm1", keep),
    ("in_layers.2", "spatial_res_block.conv1", conv2d),
    ("emb_layers.1", "spatial_res_block.time_emb_proj", linear),
    ("out_layers.0", "spatial_res_block.norm2", keep),
    ("out_layers.3", "spatial_res_block.conv2", conv2d),
    ("skip_connection", "spatial_res_block.conv_shortcut", conv2d),
    ("time_stack.in_layers.0", "temporal_res_block.norm1", keep),
    ("time_stack.in_layers.2", "temporal_res_block.conv1", conv3d),
    ("time_stack.emb_layers.1", "temporal_res_block.time_emb_proj", linear),
    ("time_stack.out_layers.0", "temporal_res_block.norm2", keep),
    ("time_stack.out_layers.3", "temporal_res_block.conv2", conv3d),
)
# Diffusers' names are ours; the target says which transform.
DIFFUSERS_RESNET: Sequence[Layer] = tuple((target, target, transform) for _, target, transform in SGM_RESNET)


def layer_rules(layers: Sequence[Layer], source: str = "", target: str = "") -> Iterator[Rule]:
    """Weight and bias of each layer, under the prefixes `source` and `target` (taken literally)."""
    for layer_source, layer_target, transform in layers:
        theirs, ours = re.escape(source + layer_source), target + layer_target
        yield Rule(rf"{theirs}\.weight", f"{ours}.{'scale' if transform is keep else 'kernel'}", transform)
        yield Rule(rf"{theirs}\.bias", f"{ours}.bias")


def _transformer_block_rules(source: str, target: str) -> Iterator[Rule]:
    """One kind of transformer block, of whatever depth; `source` and `target` end in the list's name."""
    source, target = rf"{re.escape(source)}\.(\d+)", rf"{target}.\1"
    yield Rule(rf"{source}\.(norm1|norm2|norm3|norm_in)\.weight", rf"{target}.\2.scale")
    yield Rule(rf"{source}\.(norm1|norm2|norm3|norm_in)\.bias", rf"{target}.\2.bias")
    yield Rule(rf"{source}\.(attn1|attn2)\.(to_q|to_k|to_v)\.weight", rf"{target}.\2.\3.kernel", linear)
    yield Rule(rf"{source}\.(attn1|attn2)\.to_out\.0\.weight", rf"{target}.\2.to_out.kernel", linear)
    yield Rule(rf"{source}\.(attn1|attn2)\.to_out\.0\.bias", rf"{target}.\2.to_out.bias")
    for theirs, ours in ((r"net\.0\.proj", "proj_in"), (r"net\.2", "proj_out")):
        yield Rule(rf"{source}\.(ff|ff_in)\.{theirs}\.weight", rf"{target}.\2.{ours}.kernel", linear)
        yield Rule(rf"{source}\.(ff|ff_in)\.{theirs}\.bias", rf"{target}.\2.{ours}.bias")


def _attention_rules(source: str, target: str, *, time_stack: str, position: tuple[str, str]) -> Iterator[Rule]:
    """One spatio-temporal transformer; `time_stack` and `position` are what sgm and diffusers call differently."""
    yield from layer_rules(
        (
            ("norm", "norm", keep),
            ("proj_in", "proj_in", linear),
            ("proj_out", "proj_out", linear),
            (f"time_pos_embed.{position[0]}", "time_pos_embed.linear_1", linear),
            (f"time_pos_embed.{position[1]}", "time_pos_embed.linear_2", linear),
        ),
        source,
        target,
    )
    yield from _transformer_block_rules(f"{source}transformer_blocks", f"{target}transformer_blocks")
    yield from _transformer_block_rules(f"{source}{time_stack}", f"{target}temporal_transformer_blocks")
    yield Rule(rf"{re.escape(source)}time_mixer\.mix_factor", f"{target}time_mixer.mix_factor")


def _resnet_rules(layers: Sequence[Layer], source: str, target: str) -> Iterator[Rule]:
    yield from layer_rules(layers, source, target)
    yield Rule(rf"{re.escape(source)}time_mixer\.mix_factor", f"{target}time_mixer.mix_factor")


def _sgm_blocks(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(sgm's prefix, our prefix) of every residual block, transformer and resampler, in sgm's order."""
    levels, count = len(config.block_channels), 1
    for level, attention in enumerate(config.attention):
        for i in range(config.layers_per_block):
            yield f"input_blocks.{count}.0.", f"down_blocks.{level}.resnets.{i}."
            if attention:
                yield f"input_blocks.{count}.1.", f"down_blocks.{level}.attentions.{i}."
            count += 1
        if level < levels - 1:
            yield f"input_blocks.{count}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            count += 1
    for i, part in enumerate(("resnets.0.", "attentions.0.", "resnets.1.")):
        yield f"middle_block.{i}.", f"mid_block.{part}"
    count = 0
    for block, attention in enumerate(reversed(config.attention)):
        for i in range(config.layers_per_block + 1):
            yield f"output_blocks.{count}.0.", f"up_blocks.{block}.resnets.{i}."
            if attention:
                yield f"output_blocks.{count}.1.", f"up_blocks.{block}.attentions.{i}."
            count += 1
        if block < levels - 1:
            yield f"output_blocks.{count - 1}.{1 + attention}.conv", f"up_blocks.{block}.upsamplers.0.conv"


def sgm_rules(config: UNetConfig) -> list[Rule]:
    """The table for sgm's keys, without their prefix "model.diffusion_model."."""
    rules = list(layer_rules(SGM_STEM))
    for source, target in _sgm_blocks(config):
        if ".attentions." in target:
            rules += _attention_rules(source, target, time_stack="time_stack", position=("0", "2"))
        elif ".resnets." in target:
            rules += _resnet_rules(SGM_RESNET, source, target)
        else:
            rules += layer_rules([(source, target, conv2d)])
    return rules


def diffusers_rules(config: UNetConfig) -> list[Rule]:
    """The table for the keys of a diffusers UNetSpatioTemporalConditionModel."""
    rules = list(layer_rules(DIFFUSERS_STEM))
    for _, target in _sgm_blocks(config):
        if ".attentions." in target:
            names = {"time_stack": "temporal_transformer_blocks", "position": ("linear_1", "linear_2")}
            rules += _attention_rules(target, target, **names)
        elif ".resnets." in target:
            rules += _resnet_rules(DIFFUSERS_RESNET, target, target)
        else:
            rules += layer_rules([(target, target, conv2d)])
    return rules


def config_from_diffusers(config: Mapping[str, Any]) -> UNetConfig:
    """The network that a diffusers `unet/config.json` describes, with the epsilons diffusers computes it with.

    Raises ValueError for a config of another class, without a needed entry, or with settings we do not have.
    """
    name = config.get("_class_name")
    if name != "UNetSpatioTemporalConditionModel":
        raise ValueError(f"_class_name is {name!r}: only a UNetSpatioTemporalConditionModel can be converted")
    require(
        config,
        "in_channels",
        "out_channels",
        "projection_class_embeddings_input_dim",
        "cross_attention_dim",
        "block_out_channels",
        "num_attention_heads",
        "down_block_types",
        "up_block_types",
        "layers_per_block",
        "transformer_layers_per_block",
    )
    channels = tuple(config["block_out_channels"])
    attention = tuple(block.startswith("CrossAttn") for block in config["down_block_types"])
    if attention[::-1] != tuple(block.startswith("CrossAttn") for block in config["up_block_types"]):
        raise ValueError(f"up_block_types {config['up_block_types']} do not mirror {config['down_block_types']}")
    return UNetConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        vector_dim=config["projection_class_embeddings_input_dim"],
        context_dim=_single("cross_attention_dim", config),
        block_channels=channels,
        num_heads=_per_level("num_attention_heads", config, len(channels)),
        attention=attention,
        layers_per_block=_single("layers_per_block", config),
        transformer_layers=_single("transformer_layers_per_block", config),
        attention_down_and_up_epsilon=1e-6,
    )


def require(config: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError where a diffusers config lacks one of the entries."""
    if missing := [name for name in names if name not in config]:
        raise ValueError(
            f"the diffusers config lacks {', '.join(missing)}: is it this network's config.json, complete?"
        )


def _per_level(name: str, config: Mapping[str, Any], levels: int) -> tuple[int, ...]:
    value = config[name]
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _single(name: str, config: Mapping[str, Any]) -> int:
    value = config[name]
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise ValueError(f"{name} is {value}: only one value for all resolutions can be converted")
    return values.pop()


def stage_of(shapes: Mapping[str, Sequence[int]], prefix: str = "model.diffusion_model.") -> UNetConfig:
    """The full-size network that sgm's keys belong to, told by its input channels and vector (SVD, Hi3D stage 1 or 2).

    Raises ValueError where the two give none of the published sizes, or are missing.
    """
    try:
        in_channels = shapes[f"{prefix}input_blocks.0.0.weight"][1]
        vector_dim = shapes[f"{prefix}label_emb.0.0.weight"][1]
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing: this is no checkpoint of SVD's or Hi3D's U-Net") from None
    for config in (UNetConfig.hi3d_stage1(), UNetConfig.hi3d_stage2()):
        if (config.in_channels, config.vector_dim) == (in_channels, vector_dim):
            return config
    raise ValueError(
        f"the U-Net takes {in_channels} channels and a vector of {vector_dim}: SVD and Hi3D's stage 1 take 8 and 768, "
        "stage 2 takes 17 and 512"
    )
