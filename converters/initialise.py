"""First weights of Hi3D's two U-Nets from Stable Video Diffusion's (HI3D.md section 6).

The released stage 1 takes SVD's weights as they are: the aesthetic score enters where the frame rate did, the elevation
where the motion bucket did; the paper's has no aesthetic score. Stage 2 has two scalars and depth behind the noisy
latents: what reads the depth and the elevation starts at zero, the coarse view enters where the input image did, and
cond_aug keeps its columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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


def stage1_paper(plan: Plan, config: UNetConfig) -> tuple[Plan, UNetConfig]:
    """Without the slot of the aesthetic score. Raises `ConversionError` where the weights are not SVD's."""
    return _changed(plan, config, 0, lambda array: array[_SCALAR:])


def stage2(plan: Plan, config: UNetConfig) -> tuple[Plan, UNetConfig]:
    """With nine channels of depth. Raises `ConversionError` where the weights are not SVD's."""
    return _changed(plan, config, 9, _elevation_from_zero)


def stage2_paper(plan: Plan, config: UNetConfig) -> tuple[Plan, UNetConfig]:
    """With one channel of depth. Raises `ConversionError` where the weights are not SVD's."""
    return _changed(plan, config, 1, _elevation_from_zero)


def _elevation_from_zero(array: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(array[:_SCALAR]), array[2 * _SCALAR :]])


def _changed(
    plan: Plan, config: UNetConfig, depth: int, vector: Callable[[np.ndarray], np.ndarray]
) -> tuple[Plan, UNetConfig]:
    """The weights and the config with `depth` channels behind the noisy ones and another added vector of 512."""
    _check(config)
    channels, vector_dim = _NOISY + depth + _CONDITION, 2 * _SCALAR
    specs = dict(plan.specs)
    for path, axis, size in ((_CONV_IN, 2, channels), (_VECTOR_IN, 0, vector_dim)):
        shape = list(specs[path].shape)
        shape[axis] = size
        specs[path] = jax.ShapeDtypeStruct(tuple(shape), specs[path].dtype)

    def make(path: str) -> np.ndarray:
        array = plan.make(path)
        if path == _CONV_IN:
            return np.insert(array, [_NOISY] * depth, 0, axis=2)
        return vector(array) if path == _VECTOR_IN else array

    return Plan(specs, make), dataclasses.replace(config, in_channels=channels, vector_dim=vector_dim)


def _check(config: UNetConfig) -> None:
    if (config.in_channels, config.vector_dim) != (_NOISY + _CONDITION, 3 * _SCALAR):
        found = f"{config.in_channels} and {config.vector_dim}"
        raise ConversionError([f"stages start from SVD's U-Net, with 8 channels and a vector of 768, not {found}"])
