"""Resizing as torch's `interpolate` does it, on numpy images: the degradation of stage 2 is defined with it.

All three modes are separable and linear: along one axis every output is a weighted sum of a few inputs, and the weights
are a sparse matrix. None of them antialiases except `area`, which takes means.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from scipy import sparse

ResizeMode = Literal["area", "bilinear", "bicubic"]
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
CUBIC_A = -0.75


def interpolate(
    image: Float[np.ndarray, "h w c"], height: int, width: int, mode: ResizeMode, scale: float | None = None
) -> Float[np.ndarray, "height width c"]:
    """The image at another size; with `scale`, output pixels lie 1 / `scale` apart even where that does not fit."""
    rows = _weights(image.shape[0], height, mode, scale)
    columns = _weights(image.shape[1], width, mode, scale)
    image = (rows @ image.reshape(image.shape[0], -1)).reshape(height, *image.shape[1:])
    turned = np.ascontiguousarray(image.swapaxes(0, 1)).reshape(image.shape[1], -1)
    return (columns @ turned).reshape(width, height, -1).swapaxes(0, 1)


def interpolate_by(image: Float[np.ndarray, "h w c"], scale: float, mode: ResizeMode) -> Float[np.ndarray, "h2 w2 c"]:
    """The image `scale` times as large; sides are rounded down."""
    height, width = (max(math.floor(side * scale), 1) for side in image.shape[:2])
    return interpolate(image, height, width, mode, scale)


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int, mode: ResizeMode, scale: float | None) -> sparse.csr_array:
    if mode == "area":
        indices, weights = _area_taps(old, new)
    else:
        step = np.float32(old / new if scale is None else 1 / scale)
        position = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
        indices, weights = (_linear_taps if mode == "bilinear" else _cubic_taps)(position)
        # Beyond the edges the first and last pixels go on.
        indices = np.clip(indices, 0, old - 1)
    rows = np.repeat(np.arange(new), indices.shape[1])
    entries = (weights.astype(np.float32).ravel(), (rows, indices.ravel()))
    return sparse.csr_array(entries, shape=(new, old), dtype=np.float32)


def _area_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Equal weights for all pixels that output i's share of the axis touches, as in torch's adaptive pooling."""
    index = np.arange(new)
    first, last = index * old // new, -(-(index + 1) * old // new)
    offsets = np.arange((last - first).max())
    inside = offsets < (last - first)[:, None]
    return np.where(inside, first[:, None] + offsets, 0), inside / (last - first)[:, None]


def _linear_taps(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    position = np.maximum(position, 0)
    lower = np.floor(position).astype(int)
    fraction = position - lower
    return np.stack([lower, lower + 1], axis=1), np.stack([1 - fraction, fraction], axis=1)


def _cubic_taps(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys' cubic convolution kernel at the four nearest inputs."""
    indices = np.floor(position).astype(int)[:, None] + np.arange(-1, 3)
    distance = np.abs(position[:, None] - indices)
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = CUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
    return indices, np.where(distance <= 1, near, far)
