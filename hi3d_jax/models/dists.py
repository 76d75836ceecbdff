"""DISTS, the deep image structure and texture similarity (Ding et al. 2020, equations 3-6): 0 for equal images.

Maps of VGG16 (and the image itself) are compared by their channels' means (texture) and by their correlation
(structure), so that two patches of one texture count as alike though no pixel agrees. VGG16 pools with a Hann window
over squares, which does not alias.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from hi3d_jax.models.lpips import SCALE, SHIFT, VGG
from hi3d_jax.models.winograd import WinogradConv

WIDTHS = (3, *(layer.width for layer in VGG if layer.compared))
MIN_SIDE = 16
# The two constants of equations 3 and 4, which keep empty channels from dividing by zero.
STABILITY = 1e-6


@dataclasses.dataclass(frozen=True)
class DISTSConfig:
    """DISTS has no sizes to choose."""


class DISTS(nnx.Module):
    """The distance, one number per pair of images."""

    def __init__(
        self, config: DISTSConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        self.config = config
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = [3, *(layer.width for layer in VGG)]
        self.convs = nnx.List(
            WinogradConv(width_in, layer.width, layer.size, padding=(layer.padding,) * 2, **kwargs)
            for width_in, layer in zip(widths, VGG, strict=False)
        )
        self.alpha = nnx.Param(jnp.full((sum(WIDTHS),), 0.1, param_dtype))
        self.beta = nnx.Param(jnp.full((sum(WIDTHS),), 0.1, param_dtype))

    def __call__(self, images: Float[Array, "b h w 3"], references: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """Distances of images in [-1, 1], as LPIPS takes them. Raises `ValueError` for images too small to pool."""
        if min(images.shape[1:3]) < MIN_SIDE:
            raise ValueError(f"DISTS got images of {images.shape[1:3]}; it needs {MIN_SIDE} pixels or more")
        texture, structure = [], []
        for feature in self.features(jnp.concatenate([images, references])):
            first, second = jnp.split(feature.astype(jnp.float32), 2)
            compared = _compare(first, second)
            texture.append(compared[0])
            structure.append(compared[1])
        alpha, beta = self.alpha[...].astype(jnp.float32), self.beta[...].astype(jnp.float32)
        alike = jnp.concatenate(texture, -1) @ alpha + jnp.concatenate(structure, -1) @ beta
        return 1 - alike / (alpha.sum() + beta.sum())

    def features(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        """The image in [0, 1] and the five compared feature maps, after their ReLU."""
        features = [(images + 1) / 2]
        x = (images - SHIFT.reshape(1, 1, 1, 3)) / SCALE.reshape(1, 1, 1, 3)
        for layer, conv in zip(VGG, self.convs, strict=True):
            x = jax.nn.relu(conv(hann_pool(x) if layer.pool_first else x))
            if layer.compared:
                features.append(x)
        return features


def _compare(first: Float[Array, "b h w c"], second: Float[Array, "b h w c"]):
    """Similarities of texture and of structure, [b c] each (equations 3 and 4)."""
    mean_1, mean_2 = first.mean((1, 2)), second.mean((1, 2))
    texture = (2 * mean_1 * mean_2 + STABILITY) / (mean_1**2 + mean_2**2 + STABILITY)
    off_1, off_2 = first - mean_1[:, None, None], second - mean_2[:, None, None]
    covariance, variance_1, variance_2 = (product.mean((1, 2)) for product in (off_1 * off_2, off_1**2, off_2**2))
    return texture, (2 * covariance + STABILITY) / (variance_1 + variance_2 + STABILITY)


def hann_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Root of the mean of squares under a 3 x 3 Hann window, every second pixel (equation 2)."""
    window = np.hanning(5)[1:-1]
    window = (window / window.sum()).astype(np.float32)
    squares = jnp.pad(x * x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = sum(float(weight) * _every_second(squares, 1, k) for k, weight in enumerate(window))
    both = sum(float(weight) * _every_second(rows, 2, k) for k, weight in enumerate(window))
    return jnp.sqrt(both + 1e-12)


def _every_second(x: Array, axis: int, start: int) -> Array:
    """Each window's pixel number `start`: windows of 3 begin at every second pixel."""
    count = (x.shape[axis] - 3) // 2 + 1
    return lax.slice_in_dim(x, start, start + 2 * (count - 1) + 1, 2, axis)
