"""Batches' pictures between bytes and networks' ranges."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, UInt8


def over_white(views: UInt8[Array, "*b h w c"]) -> Float[Array, "*b h w 3"]:
    """RGB (as it is) or RGBA with straight alpha (over white) as images in [-1, 1]."""
    x = views.astype(jnp.float32) / 255
    rgb = x[..., :3]
    if x.shape[-1] == 4:
        rgb = rgb * x[..., 3:] + (1 - x[..., 3:])
    return 2 * rgb - 1


def psnr(images: Float[Array, "*b h w 3"], references: Float[Array, "*b h w 3"]) -> Float[Array, "*b"]:
    """Decibels of each image in [-1, 1] against its reference, the peak being the range's width."""
    error = jnp.mean(((jnp.clip(images, -1, 1) - references) / 2) ** 2, axis=(-3, -2, -1))
    return -10 * jnp.log10(jnp.maximum(error, 1e-10))


def grid(rows: list[Float[np.ndarray, "n h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Rows of images in [-1, 1] as one picture."""
    lines = [np.concatenate([np.asarray(image, np.float32) for image in row], axis=1) for row in rows]
    return np.clip(np.round((np.concatenate(lines) + 1) * 127.5), 0, 255).astype(np.uint8)
