"""First weights of Hi3D's two U-Nets from Stable Video Diffusion's (HI3D.md section 6).

Stage 1 takes SVD's weights as they are: the aesthetic score enters where the frame rate did, the elevation where the
motion bucket did. Stage 2 has 17 input channels and two scalars: what reads the depth and the elevation starts at zero,
the coarse view enters where the input image did, and cond_aug keeps its columns.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from converters.rules import ConversionError, Plan
from hi3d_jax.models.unet import UNetConfig

_CONV_IN = "conv_in.kernel"
_VECTOR_IN = "add_embedding.linear_1.kernel"
# Widths of SVD's inputs, and of each scalar in the added vector.
_NOISY, _CONDITION, _SCALAR = 4, 4, 256


def stage1(plan: Plan, config: UNetConfig) -> tuple[Plan, UNetConfig]:
    """SVD's weights unchanged. Raises `ConversionError` where they are not SVD's."""
    _check(config)
    return plan, config


def stage2(plan: Plan, config: UNetConfig) -> tuple[Plan, UNetConfig]:
    """The weights and the config of stage 2's U-Net. Raises `ConversionError` where they are not SVD's."""
    _check(config)
    wanted = UNetConfig.hi3d_stage2()
    depth = wanted.in_channels - _NOISY - _CONDITION
    specs = dict(plan.specs)
    for path, axis, size in ((_CONV_IN, 2, wanted.in_channels), (_VECTOR_IN, 0, wanted.vector_dim)):
        shape = list(specs[path].shape)
        shape[axis] = size
        specs[path] = jax.ShapeDtypeStruct(tuple(shape), specs[path].dtype)

    def make(path: str) -> np.ndarray:
        array = plan.make(path)
        if path == _CONV_IN:
            return np.insert(array, [_NOISY] * depth, 0, axis=2)
        if path == _VECTOR_IN:
            return np.concatenate([np.zeros_like(array[:_SCALAR]), array[2 * _SCALAR :]])
        return array

    changed = dataclasses.replace(config, in_channels=wanted.in_channels, vector_dim=wanted.vector_dim)
    return Plan(specs, make), changed


def _check(config: UNetConfig) -> None:
    if (config.in_channels, config.vector_dim) != (_NOISY + _CONDITION, 3 * _SCALAR):
        found = f"{config.in_channels} and {config.vector_dim}"
        raise ConversionError([f"stages start from SVD's U-Net, with 8 channels and a vector of 768, not {found}"])
