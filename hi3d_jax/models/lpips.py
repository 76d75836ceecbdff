"""LPIPS v0.1, the learned perceptual distance between two images (Zhang et al. 2018), on AlexNet or VGG16.

d = sum over five feature maps of the mean over pixels of w . (f0 - f1)^2, where f is the map with unit-length channel
vectors and w >= 0 was fitted to human judgements. Evaluations report it with VGG16, as SyncDreamer's protocol does.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.winograd import WinogradConv

# ImageNet's statistics, for RGB in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class Layer(NamedTuple):
    """One convolution with ReLU: is its input pooled first, is its output one of the five compared?"""

    width: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool_first: bool = False
    compared: bool = False


ALEX = (
    Layer(64, 11, 4, 2, compared=True),
    Layer(192, 5, 1, 2, pool_first=True, compared=True),
    Layer(384, pool_first=True, compared=True),
    Layer(256, compared=True),
    Layer(256, compared=True),
)
VGG = tuple(
    Layer(width, pool_first=index == 0 and width_index > 0, compared=index == count - 1)
    for width_index, (width, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)])
    for index in range(count)
)


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """Which network's features are compared."""

    network: Literal["alex", "vgg"] = "vgg"

    @classmethod
    def alex(cls) -> "LPIPSConfig":
        """AlexNet: fast, and the default of the original code."""
        return cls("alex")

    @classmethod
    def vgg(cls) -> "LPIPSConfig":
        """VGG16: what 3D evaluations report."""
        return cls("vgg")

    @property
    def layers(self) -> tuple[Layer, ...]:
        return {"alex": ALEX, "vgg": VGG}[self.network]

    @property
    def pool_size(self) -> int:
        return {"alex": 3, "vgg": 2}[self.network]


class LPIPS(nnx.Module):
    """The distance, one number per pair of images."""

    def __init__(
        self, config: LPIPSConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        self.config = config
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = [3, *(layer.width for layer in config.layers)]
        self.convs = nnx.List(
            WinogradConv(width_in, layer.width, layer.size, stride=layer.stride, padding=(layer.padding,) * 2, **kwargs)
            for width_in, layer in zip(widths, config.layers, strict=False)
        )
        self.heads = nnx.List(
            nnx.Param(jnp.full((layer.width,), 1 / layer.width, param_dtype))
            for layer in config.layers
            if layer.compared
        )

    def __call__(self, images: Float[Array, "b h w 3"], references: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """Distances of images in [-1, 1], 0 for equal ones; the gradient is finite everywhere.

        Raises `ValueError` for images too small for the network's pools.
        """
        least = {"alex": 31, "vgg": 16}[self.config.network]
        if min(images.shape[1:3]) < least:
            raise ValueError(
                f"LPIPS got images of {images.shape[1:3]}; {self.config.network} needs {least} pixels or more"
            )
        total = jnp.zeros(len(images), jnp.float32)
        features = self.features(jnp.concatenate([images, references]))
        for head, feature in zip(self.heads, features, strict=True):
            first, second = jnp.split(unit_length(feature.astype(jnp.float32)), 2)
            weighted = (first - second) ** 2 @ head[...].astype(jnp.float32)
            total += weighted.mean((1, 2))
        return total

    def features(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        """The five compared feature maps, after their ReLU."""
        x = (images - SHIFT.reshape(1, 1, 1, 3)) / SCALE.reshape(1, 1, 1, 3)
        size, features = self.config.pool_size, []
        for layer, conv in zip(self.config.layers, self.convs, strict=True):
            if layer.pool_first:
                x = nnx.max_pool(x, (size, size), strides=(2, 2), padding="VALID")
            x = jax.nn.relu(conv(x))
            if layer.compared:
                features.append(x)
        return features


def unit_length(features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Channel vectors over (their length + 1e-10); a zero vector stays zero and passes a gradient of zero."""
    squared = jnp.sum(features**2, axis=-1, keepdims=True)
    is_zero = squared == 0
    length = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))
    return features / (length + 1e-10)
