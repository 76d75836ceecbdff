"""The tiny networks of the recorded runs, their weights made from names, through the converters' tables."""

from collections.abc import Sequence

import numpy as np
from filled import filled, manifest
from flax import nnx
from hashed import uniform, weight

from converters import open_clip
from converters.rules import Rule, plan_export
from converters.svd_unet import sgm_rules
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.pretrained import abstract_network, parameters

# A quarter of the compile time; the kernels are the same, less optimised.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
UNETS = {
    "unet_stage1": UNetConfig(
        context_dim=48, block_channels=(32, 32, 64, 64), num_heads=(2, 2, 4, 4), attention=(True, True, True, False)
    ),
    "unet_stage2": UNetConfig(
        in_channels=17,
        vector_dim=512,
        context_dim=48,
        block_channels=(32, 64, 64),
        num_heads=(2, 4, 4),
        attention=(True, True, False),
        layers_per_block=1,
    ),
}
SEEDS = {"unet_stage1": 11, "unet_stage2": 21}
TOWER = CLIPVisionConfig(width=64, mlp_width=256, num_layers=2, num_heads=4, projection_dim=48)


def relative_error(got, expected) -> float:
    """The largest difference, in units of the largest expected number."""
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def recorded_unet(name: str) -> UNet:
    """The U-Net of `unet_stage1` or `unet_stage2`."""
    config = UNETS[name]
    rules = sgm_rules(config)
    specs = plan_export(parameters(abstract_network(UNet, config)), rules).specs

    def hashed(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if key.endswith("mix_factor"):
            return (1.4 * uniform(key, shape)).astype(np.float32)
        return weight(key, shape, "matrix" if len(shape) > 1 else "norm" if key.endswith("weight") else "vector")

    weights = {key: hashed(f"{SEEDS[name]}/{key}", spec.shape) for key, spec in specs.items()}
    return filled(UNet, config, weights, rules)


def recorded_autoencoder(network: type[nnx.Module], config, rules: Sequence[Rule], seed: int) -> nnx.Module:
    """The autoencoder of `vae_image` or `vae_temporal`."""

    def hashed(key: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = "matrix" if len(shape) > 1 else "norm" if key.endswith("weight") else "vector"
        scale = 14 if key.endswith("mix_factor") else 1
        return scale * weight(f"{seed}/{key}", shape, kind)

    specs = plan_export(parameters(abstract_network(network, config)), rules).specs
    return filled(network, config, {key: hashed(key, spec.shape) for key, spec in specs.items()}, rules)


def recorded_tower() -> CLIPVision:
    """The CLIP tower of `clip_image`."""
    shapes = tower_shapes()

    def kind(key: str) -> str:
        if ".ln_" in key and key.endswith("weight"):
            return "norm"
        return "matrix" if len(shapes[key]) > 1 else "vector"

    weights = {key: weight(f"101/{key}", shape, kind(key)) for key, shape in shapes.items()}
    return filled(CLIPVision, TOWER, weights, open_clip.RULES)


def tower_shapes() -> dict[str, tuple[int, ...]]:
    """The released tower's names with the sizes of the recorded one."""
    sizes = {1280: 64, 3840: 192, 5120: 256, 1024: 48, 257: 257, 3: 3, 14: 14}
    return {
        key: tuple(sizes[size] for size in shape)
        for key, shape in manifest(open_clip.SGM_PREFIX).items()
        if key.startswith("visual.") and not any(f"resblocks.{n}." in key for n in range(2, 32))
    }
