"""The hybrid encoder of DPT (Ranftl et al. 2021): a ResNetV2 down to 1/16 of the image, then a ViT on its map.

Kolesnikov et al.'s BiT ResNet: convolutions with standardised weights, group norms, "same" padding as TensorFlow does
it (one pixel more at the bottom and right where strides leave a choice), which is XLA's own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from hi3d_jax.models.layers import GroupNorm
from hi3d_jax.models.resampling import resize_bilinear
from hi3d_jax.models.vit import TransformerBlock

# What the ResNet shrinks images by: 2 in the stem's convolution, 2 in its pool, 2 in each stage after the first.
STRIDE = 16


@dataclasses.dataclass(frozen=True)
class DPTConfig:
    """Sizes of DPT-hybrid; `image_size` is that of training, which the position embedding's grid belongs to."""

    # Side of the training images in pixels.
    image_size: int = 384
    # Channels of the ResNet's first convolution.
    stem_width: int = 64
    # Channels of the ResNet's three stages.
    stage_widths: tuple[int, int, int] = (256, 512, 1024)
    # Residual blocks of the ResNet's three stages.
    stage_depths: tuple[int, int, int] = (3, 4, 9)
    # Numbers per token of the transformer.
    width: int = 768
    # Hidden width of the layers between attentions.
    mlp_width: int = 3072
    # Transformer blocks.
    num_layers: int = 12
    # Attention heads of each block.
    num_heads: int = 12
    # The blocks (counted from 0) whose tokens the decoder reads, and the widths it gives them.
    tap_layers: tuple[int, int] = (8, 11)
    # Channels that the decoder gives those two.
    tap_widths: tuple[int, int] = (768, 768)
    # Channels of the decoder.
    fusion_width: int = 256
    # Channels before the disparity.
    head_width: int = 32
    # 1e-6 in dpt_hybrid_384.pt; the transformers folder of the same weights states its own.
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def dpt_hybrid(cls) -> "DPTConfig":
        """MiDaS v3's dpt_hybrid_384, the depth network of Hi3D's second stage."""
        return cls()


class StandardisedConv(nnx.Module):
    """A convolution without bias whose kernel has mean 0 and variance 1 over the inputs of each output."""

    def __init__(
        self, width_in: int, width_out: int, size: int, stride: int = 1, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any
    ):
        initial = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(initial(rngs.params(), (size, size, width_in, width_out), param_dtype))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W C"]:
        kernel = self.kernel[...].astype(jnp.float32)
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
        kernel = kernel * lax.rsqrt(jnp.mean(kernel**2, (0, 1, 2), keepdims=True) + 1e-8)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (self.stride, self.stride), "SAME", dimension_numbers=layout)


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride sits in the middle one."""

    def __init__(self, width_in: int, width: int, stride: int, shortcut: bool, **kwargs: Any):
        inner = bottleneck_width(width)
        norm = functools.partial(GroupNorm, epsilon=1e-5, **kwargs)
        self.conv1, self.norm1 = StandardisedConv(width_in, inner, 1, **kwargs), norm(inner)
        self.conv2, self.norm2 = StandardisedConv(inner, inner, 3, stride, **kwargs), norm(inner)
        self.conv3, self.norm3 = StandardisedConv(inner, width, 1, **kwargs), norm(width)
        self.shortcut = StandardisedConv(width_in, width, 1, stride, **kwargs) if shortcut else None
        self.shortcut_norm = norm(width) if shortcut else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W C"]:
        residual = jax.nn.relu(self.norm1(self.conv1(x)))
        residual = jax.nn.relu(self.norm2(self.conv2(residual)))
        residual = self.norm3(self.conv3(residual))
        if self.shortcut is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return jax.nn.relu(x + residual)


class ResNet(nnx.Module):
    """Stem and stages; gives the feature map after each stage, at 1/4, 1/8 and 1/16 of the image."""

    def __init__(self, config: DPTConfig, **kwargs: Any):
        self.stem = StandardisedConv(3, config.stem_width, 7, stride=2, **kwargs)
        self.stem_norm = GroupNorm(config.stem_width, epsilon=1e-5, **kwargs)
        self.stages = nnx.List()
        before = config.stem_width
        for index, (width, depth) in enumerate(zip(config.stage_widths, config.stage_depths, strict=True)):
            first = Bottleneck(before, width, 1 if index == 0 else 2, True, **kwargs)
            rest = [Bottleneck(width, width, 1, False, **kwargs) for _ in range(depth - 1)]
            self.stages.append(nnx.List([first, *rest]))
            before = width

    def __call__(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        maps = []
        for stage in self.stages:
            for block in stage:
                x = block(x)
            maps.append(x)
        return maps


class HybridEncoder(nnx.Module):
    """Two feature maps of the ResNet and, as tokens with the class token first, two layers of the ViT on the third."""

    def __init__(self, config: DPTConfig, **kwargs: Any):
        self.config = config
        rngs, param_dtype = kwargs["rngs"], kwargs["param_dtype"]
        normal = nnx.initializers.normal(0.02)
        self.resnet = ResNet(config, **kwargs)
        self.patch_embedding = nnx.Linear(config.stage_widths[-1], config.width, **kwargs)
        grid = config.image_size // STRIDE
        self.class_embedding = nnx.Param(normal(rngs.params(), (config.width,), param_dtype))
        self.position_embedding = nnx.Param(normal(rngs.params(), (grid**2 + 1, config.width), param_dtype))
        self.layers = nnx.List(
            TransformerBlock(
                config.width, config.num_heads, config.mlp_width, "gelu", config.layer_norm_epsilon, **kwargs
            )
            for _ in range(config.num_layers)
        )

    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[list[Float[Array, "b _ _ _"]], list[Float[Array, "b n d"]]]:
        *maps, x = self.resnet(images)
        height, width = x.shape[1:3]
        x = self.patch_embedding(x).reshape(len(images), height * width, -1)
        class_token = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x], axis=1) + self.positions(height, width).astype(x.dtype)[None]
        taps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.config.tap_layers:
                taps.append(x)
        return maps, taps

    def positions(self, height: int, width: int) -> Float[Array, "n d"]:
        """The position embedding, its grid resized to `height` x `width` tokens."""
        position = self.position_embedding[...]
        side = self.config.image_size // STRIDE
        grid = resize_bilinear(position[1:].reshape(1, side, side, -1), height, width)
        return jnp.concatenate([position[:1], grid.reshape(height * width, -1)])


def bottleneck_width(width: int) -> int:
    """A quarter of `width`, rounded to a multiple of 8 that is not more than a tenth below it (timm's make_div)."""
    quarter = width / 4
    rounded = max(8, int(quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded
