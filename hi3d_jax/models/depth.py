"""DPT-hybrid (Ranftl et al. 2021, MiDaS v3): relative disparity of single images, a condition of the second stage.

The network gives disparity: larger is nearer, at least 0, defined up to scale and shift. Around it, Hi3D resizes the
frames, stretches each disparity map to [0, 1] and folds it to nine channels on the latent grid (HI3D.md section 3).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.depth_backbone import STRIDE, DPTConfig, HybridEncoder
from hi3d_jax.models.layers import Conv
from hi3d_jax.models.resampling import resize_bilinear

# Disparity cells per latent cell and axis in the released model.
UNFOLD = 3


class ReadoutProject(nnx.Module):
    """Tokens of the ViT back to a map: each sees the class token, is projected to `width` channels, maybe halved."""

    def __init__(self, config: DPTConfig, width: int, halve: bool, **kwargs: Any):
        self.readout = nnx.Linear(2 * config.width, config.width, **kwargs)
        self.projection = nnx.Linear(config.width, width, **kwargs)
        self.downsample = Conv(width, width, stride=2, **kwargs) if halve else None

    def __call__(self, tokens: Float[Array, "b n d"], height: int, width: int) -> Float[Array, "b _ _ c"]:
        readout = jnp.broadcast_to(tokens[:, :1], tokens[:, 1:].shape)
        x = jax.nn.gelu(self.readout(jnp.concatenate([tokens[:, 1:], readout], -1)), approximate=False)
        x = self.projection(x).reshape(len(x), height, width, -1)
        return x if self.downsample is None else self.downsample(x)


class ResidualConvUnit(nnx.Module):
    """x + conv2(relu(conv1(relu(x))))."""

    def __init__(self, width: int, **kwargs: Any):
        self.conv1 = Conv(width, width, **kwargs)
        self.conv2 = Conv(width, width, **kwargs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x + self.conv2(jax.nn.relu(self.conv1(jax.nn.relu(x))))


class FusionBlock(nnx.Module):
    """Adds a finer map to what came from the coarser ones, refines it and doubles its size."""

    def __init__(self, width: int, has_finer: bool, **kwargs: Any):
        self.finer_unit = ResidualConvUnit(width, **kwargs) if has_finer else None
        self.unit = ResidualConvUnit(width, **kwargs)
        self.out = nnx.Linear(width, width, **kwargs)

    def __call__(
        self, x: Float[Array, "b h w c"], finer: Float[Array, "b h w c"] | None = None
    ) -> Float[Array, "b 2*h 2*w c"]:
        if self.finer_unit is not None:
            x = x + self.finer_unit(finer)
        # A 1x1 convolution and interpolation commute; before the doubling it has a quarter of the pixels.
        return double(self.out(self.unit(x)))


class DPT(nnx.Module):
    """Disparity [b h w], relative, larger nearer, of images in [-1, 1] whose sides are multiples of 32."""

    def __init__(self, config: DPTConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32):
        self.config = config
        kwargs = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        widths, fusion = (*config.stage_widths[:2], *config.tap_widths), config.fusion_width
        self.encoder = HybridEncoder(config, **kwargs)
        self.readouts = nnx.List(
            ReadoutProject(config, width, halve, **kwargs)
            for width, halve in zip(config.tap_widths, (False, True), strict=True)
        )
        # From fine to coarse, as the maps come: 1/4, 1/8, 1/16 and 1/32 of the image.
        self.convs = nnx.List(nnx.Conv(width, fusion, (3, 3), use_bias=False, **kwargs) for width in widths)
        self.fusions = nnx.List(FusionBlock(fusion, has_finer, **kwargs) for has_finer in (True, True, True, False))
        self.head_conv1 = Conv(fusion, fusion // 2, **kwargs)
        self.head_conv2 = Conv(fusion // 2, config.head_width, **kwargs)
        self.head_out = nnx.Linear(config.head_width, 1, **kwargs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w"]:
        """Raises `ValueError` for sides that are no multiples of 32."""
        height, width = images.shape[1:3]
        if height % 32 or width % 32:
            raise ValueError(
                f"DPT got images of {height} x {width}; its sides must be multiples of 32: use depth_input"
            )
        maps = self.feature_maps(images)
        x = self.fusions[3](maps[3])
        for index in (2, 1, 0):
            x = self.fusions[index](x, maps[index])
        x = jax.nn.relu(self.head_conv2(double(self.head_conv1(x))))
        return jax.nn.relu(self.head_out(x))[..., 0]

    def feature_maps(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ c"]]:
        """The four maps to be fused, at 1/4, 1/8, 1/16 and 1/32 of the image."""
        maps, taps = self.encoder(images)
        grid = images.shape[1] // STRIDE, images.shape[2] // STRIDE
        maps = maps + [readout(tap, *grid) for readout, tap in zip(self.readouts, taps, strict=True)]
        return [conv(x) for conv, x in zip(self.convs, maps, strict=True)]


def double(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Twice the size, bilinear with aligned corners."""
    return resize_bilinear(x, 2 * x.shape[1], 2 * x.shape[2], align_corners=True)


def depth_input(images: Float[Array, "b h w 3"]) -> Float[Array, "b _ _ 3"]:
    """What DPT gets to see of frames in [-1, 1]: about 3/8 of their size, each side rounded down to a multiple of 32.

    Raises `ValueError` where nothing would be left.
    """
    # The released code's constant, not 8 / 3: it keeps exact multiples from being rounded down.
    sides = [int(side / 2.6666 / 32) * 32 for side in images.shape[1:3]]
    if 0 in sides:
        raise ValueError(f"frames of {images.shape[1:3]} are too small for depth; both sides need 86 pixels or more")
    return resize_bilinear(images, *sides)


def disparity_latents(
    disparity: Float[Array, "b h w"], rows: int, columns: int, unfold: int = UNFOLD
) -> Float[Array, "b {rows} {columns} {unfold}*{unfold}"]:
    """Disparity as a condition on a grid of `rows` x `columns` latent cells, each map stretched to [0, 1].

    Channel unfold * row + column of a latent cell is its disparity at that place of an unfold x unfold grid. A constant
    map gives 0.
    """
    x = resize_bilinear(disparity[..., None], unfold * rows, unfold * columns)
    x = x - x.min((1, 2), keepdims=True)
    x = x / jnp.maximum(x.max((1, 2), keepdims=True), 1e-6)
    x = x.reshape(len(x), rows, unfold, columns, unfold).transpose(0, 1, 3, 2, 4)
    return x.reshape(len(x), rows, columns, unfold**2)
