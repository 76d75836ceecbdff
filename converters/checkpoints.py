"""Which networks are in which checkpoint: its kind is told by its keys, its sizes by shapes or by its config.json.

A `Part` says where one network is (the prefix of its keys) and by which table it is converted; what of the checkpoint
no part claims must be ignored for a stated reason. Names of networks are those of our model folders: unet, vae,
image_encoder, aesthetic_encoder, aesthetic_predictor, depth, lpips_alex, lpips_vgg; conditioning_vae only where the
copy of the autoencoder that encodes conditions differs from the first stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from converters import aesthetic, autoencoder, dpt, image_encoder, lpips, open_clip, openai_clip, svd_unet
from converters.rules import ConversionError, Rule
from hi3d_jax.models.aesthetic import AestheticConfig, AestheticPredictor
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.models.depth import DPT
from hi3d_jax.models.depth_backbone import DPTConfig
from hi3d_jax.models.lpips import LPIPS, LPIPSConfig
from hi3d_jax.models.unet import UNet
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig, TemporalAutoencoder, TemporalDecoderConfig

Weights = Mapping[str, np.ndarray]
Ignore = tuple[tuple[str, str], ...]

SGM_IGNORE: Ignore = (
    (r"warp_model\..*", "the image degradation of stage 2's training"),
    (r"model_ema\..*", "a moving average of training; the released models are the raw weights"),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One network of a checkpoint. Where its tensors equal those of the part `copy_of`, it is not converted again."""

    name: str
    network: type[nnx.Module]
    config: Any
    prefix: str
    rules: Sequence[Rule]
    ignore: Sequence[tuple[str, str]] = ()
    copy_of: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What a checkpoint is, its networks, keys of no use (with the reason), and the recipe that its model follows."""

    kind: str
    parts: tuple[Part, ...]
    ignore: Ignore = ()
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def identify(weights: Weights, config: Mapping[str, Any] | None = None) -> Source:
    """What a checkpoint is. `config` is the config.json beside it, where there is one.

    Raises `ConversionError` for a checkpoint of another model.
    """
    for marker, describe in _KINDS.items():
        if marker in weights:
            try:
                return describe(weights, config)
            except (ValueError, KeyError, TypeError) as error:
                raise ConversionError([f"it has the key {marker}, but {type(error).__name__}: {error}"]) from error
    some = ", ".join(list(weights)[:5])
    raise ConversionError([f"this checkpoint is of no model that is known here; its keys are {some}, ..."])


def _vae_rules(config: AutoencoderConfig) -> list[Rule]:
    temporal = isinstance(config, TemporalDecoderConfig)
    return autoencoder.temporal_sgm_rules(config) if temporal else autoencoder.sgm_rules(config)


# Network -> prefix of its keys in sgm's layout, and its table as a function of its config.
SGM: dict[str, tuple[str, Callable[[Any], Sequence[Rule]]]] = {
    "unet": ("model.diffusion_model.", svd_unet.sgm_rules),
    "vae": ("first_stage_model.", _vae_rules),
    "conditioning_vae": ("conditioner.embedders.3.encoder.", _vae_rules),
    "image_encoder": (open_clip.SGM_PREFIX, lambda config: open_clip.RULES),
    "aesthetic_encoder": (openai_clip.SGM_PREFIX, lambda config: openai_clip.RULES),
    "aesthetic_predictor": (aesthetic.SGM_PREFIX, lambda config: aesthetic.RULES),
    "depth": (dpt.SGM_PREFIX, lambda config: dpt.RULES),
}


def _sgm_part(name: str, network: type[nnx.Module], config: Any, **fields: Any) -> Part:
    prefix, rules = SGM[name]
    return Part(name, network, config, prefix, rules(config), **fields)


def _sgm(weights: Weights, _) -> Source:
    """SVD and both stages of Hi3D, as sgm's training code saves them."""
    shapes = {key: array.shape for key, array in weights.items()}
    parts = [
        _sgm_part("unet", UNet, svd_unet.stage_of(shapes, SGM["unet"][0])),
        _first_stage(weights),
        _sgm_part("image_encoder", CLIPVision, _clip_config(weights, open_clip.SGM_PREFIX), ignore=open_clip.IGNORE),
        _sgm_part("conditioning_vae", Autoencoder, AutoencoderConfig.stable_diffusion(), copy_of="vae"),
    ]
    kind, recipe = "SVD", {}
    if any(key.startswith(aesthetic.SGM_PREFIX) for key in weights):
        kind, recipe = "Hi3D stage 1", {"name": "official", "stage": 1}
        tower = _clip_config(weights, openai_clip.SGM_PREFIX)
        parts.append(_sgm_part("aesthetic_encoder", CLIPVision, tower, ignore=openai_clip.IGNORE))
        parts.append(_sgm_part("aesthetic_predictor", AestheticPredictor, AestheticConfig.laion()))
    elif any(key.startswith(dpt.SGM_PREFIX) for key in weights):
        kind, recipe = "Hi3D stage 2", {"name": "official", "stage": 2}
        parts.append(_sgm_part("depth", DPT, DPTConfig.dpt_hybrid(), ignore=dpt.IGNORE))
    return Source(f"{kind} in sgm's layout", tuple(parts), SGM_IGNORE, recipe)


def _first_stage(weights: Weights) -> Part:
    if f"{SGM['vae'][0]}decoder.conv_out.time_mix_conv.weight" in weights:
        return _sgm_part("vae", TemporalAutoencoder, TemporalDecoderConfig.svd())
    return _sgm_part("vae", Autoencoder, AutoencoderConfig.stable_diffusion())


def _clip_config(weights: Weights, prefix: str) -> CLIPVisionConfig:
    """The published tower that has the width of this one, whose keys are open_clip's."""
    width = weights[f"{prefix}visual.conv1.weight"].shape[0]
    for config in (CLIPVisionConfig.vit_h_14(), CLIPVisionConfig.vit_l_14()):
        if config.width == width:
            return config
    raise ValueError(f"its CLIP tower has width {width}; ViT-H/14 has 1280 and ViT-L/14 1024")


def _open_clip(weights: Weights, _) -> Source:
    config = _clip_config(weights, "")
    if config == CLIPVisionConfig.vit_l_14():
        part = Part("aesthetic_encoder", CLIPVision, config, "", openai_clip.RULES, openai_clip.IGNORE)
        return Source("OpenAI CLIP ViT-L/14", (part,))
    part = Part("image_encoder", CLIPVision, config, "", open_clip.RULES, open_clip.IGNORE)
    return Source("OpenCLIP ViT-H/14", (part,))


def _aesthetic_head(weights: Weights, _) -> Source:
    config = AestheticConfig.laion()
    part = Part("aesthetic_predictor", AestheticPredictor, config, "", aesthetic.RULES, aesthetic.IGNORE)
    return Source("LAION's aesthetic head", (part,))


def _dpt(weights: Weights, _) -> Source:
    part = Part("depth", DPT, DPTConfig.dpt_hybrid(), "", dpt.RULES, dpt.IGNORE)
    return Source("MiDaS DPT-hybrid", (part,))


def _transformers_dpt(weights: Weights, config: Mapping[str, Any] | None) -> Source:
    sizes = DPTConfig.dpt_hybrid() if config is None else _dpt_config(config)
    part = Part("depth", DPT, sizes, "", dpt.TRANSFORMERS_RULES, dpt.TRANSFORMERS_IGNORE)
    return Source("DPT-hybrid in transformers' layout", (part,))


def _dpt_config(config: Mapping[str, Any]) -> DPTConfig:
    backbone = config["backbone_config"]
    return DPTConfig(
        image_size=config["image_size"],
        stem_width=backbone["embedding_size"],
        stage_widths=tuple(backbone["hidden_sizes"][:3]),
        stage_depths=tuple(backbone["depths"][:3]),
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        tap_layers=tuple(config["backbone_out_indices"][-2:]),
        tap_widths=tuple(config["neck_hidden_sizes"][2:]),
        fusion_width=config["fusion_hidden_size"],
        layer_norm_epsilon=config["layer_norm_eps"],
    )


def _lpips(name: str, config: LPIPSConfig, rules: Sequence[Rule]) -> Callable[..., Source]:
    return lambda weights, _: Source(f"LPIPS ({config.network})", (Part(name, LPIPS, config, "", rules),))


def _diffusers_unet(weights: Weights, config: Mapping[str, Any] | None) -> Source:
    sizes = svd_unet.config_from_diffusers(_needed(config))
    part = Part("unet", UNet, sizes, "", svd_unet.diffusers_rules(sizes))
    return Source("a spatio-temporal U-Net in diffusers' layout", (part,))


def _diffusers_vae(weights: Weights, config: Mapping[str, Any] | None) -> Source:
    sizes = autoencoder.config_from_diffusers(_needed(config))
    if isinstance(sizes, TemporalDecoderConfig):
        part = Part("vae", TemporalAutoencoder, sizes, "", autoencoder.temporal_diffusers_rules(sizes))
    else:
        part = Part("vae", Autoencoder, sizes, "", autoencoder.diffusers_rules(sizes))
    return Source("an autoencoder in diffusers' layout", (part,))


def _transformers_clip(weights: Weights, config: Mapping[str, Any] | None) -> Source:
    config = _needed(config)
    sizes = CLIPVisionConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        projection_dim=config["projection_dim"],
        activation=config["hidden_act"],
    )
    part = Part("image_encoder", CLIPVision, sizes, "", image_encoder.RULES, image_encoder.IGNORE)
    return Source("a CLIP image encoder in transformers' layout", (part,))


def _needed(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if config is None:
        raise ValueError("the config.json that belongs beside it is missing: give the folder, not the file")
    return config


# A key that only this kind of checkpoint has -> what describes it. The first that is there decides.
_KINDS: dict[str, Callable[[Weights, Mapping[str, Any] | None], Source]] = {
    f"{SGM['unet'][0]}input_blocks.0.0.weight": _sgm,
    "visual.conv1.weight": _open_clip,
    "pretrained.model.cls_token": _dpt,
    "dpt.embeddings.cls_token": _transformers_dpt,
    "AlexNet_0.Conv_0.kernel": _lpips("lpips_alex", LPIPSConfig.alex(), lpips.ALEX_RULES),
    "VGG16_0.Conv_0.kernel": _lpips("lpips_vgg", LPIPSConfig.vgg(), lpips.VGG_RULES),
    "layers.7.weight": _aesthetic_head,
    "add_embedding.linear_1.weight": _diffusers_unet,
    "encoder.conv_in.weight": _diffusers_vae,
    "vision_model.embeddings.class_embedding": _transformers_clip,
}
