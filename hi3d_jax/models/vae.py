"""Stable Diffusion's image autoencoder, which both stages of Hi3D use, and SVD's with a temporal decoder.

Images are [..., h, w, 3] in [-1, 1]; latents are [..., h/8, w/8, 4] and UNSCALED here: whoever feeds latents to
the U-Net's noisy channels multiplies by the config's `scaling_factor`, once (conditioning latents stay unscaled, as in
SVD).
Names are those of diffusers' AutoencoderKL and AutoencoderKLTemporalDecoder.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.attention import PixelAttention
from hi3d_jax.models.layers import (
    Conv,
    Downsample,
    GroupNorm,
    InitKeys,
    ResBlock,
    SpatioTemporalResBlock,
    TemporalConv,
    Upsample,
    set_norm_groups,
)

EPSILON = 1e-6
# Where the released decoder clamps the log-variance of its posterior.
LOG_VARIANCE_RANGE = (-30.0, 20.0)

# (in_channels, out_channels) -> a residual block
MakeResnet = Callable[[int, int], nnx.Module]


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the image autoencoder; the defaults are Stable Diffusion's. `block_channels` is finest first."""

    # Colours.
    image_channels: int = 3
    # Numbers per latent cell.
    latent_channels: int = 4
    # Channels at each resolution; each but the last halves the image's sides.
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    # Residual blocks of the encoder at each resolution; the decoder has one more.
    layers_per_block: int = 2
    # Groups of the group norms; small networks learn faster with fewer.
    norm_groups: int = 32
    # One over the standard deviation of the latents.
    scaling_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell and axis."""
        return 2 ** (len(self.block_channels) - 1)

    @classmethod
    def stable_diffusion(cls) -> "AutoencoderConfig":
        """The first stage of Hi3D's two stages and of svd_xt_image_decoder."""
        return cls()

    @classmethod
    def tiny(cls) -> "AutoencoderConfig":
        """The same structure with 32 channels, for tests; it still shrinks images eightfold."""
        return cls(block_channels=(32, 32, 32, 32), layers_per_block=1)


@dataclasses.dataclass(frozen=True)
class TemporalDecoderConfig(AutoencoderConfig):
    """Sizes of the autoencoder whose decoder also looks along the views."""

    # sgm's checkpoints have no quant_conv, diffusers' folders do.
    quant_conv: bool = True

    @classmethod
    def svd(cls) -> "TemporalDecoderConfig":
        """svd.safetensors and svd_xt.safetensors in sgm's layout."""
        return cls(quant_conv=False)


class Posterior(NamedTuple):
    """A Gaussian over latents, independent for each number. Its mode is `mean`."""

    mean: Float[Array, "*b h w c"]
    std: Float[Array, "*b h w c"]

    def sample(self, key: Array) -> Float[Array, "*b h w c"]:
        """A random draw."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)


class MidBlock(nnx.Module):
    """A residual block, attention over the pixels and a residual block at the lowest resolution."""

    def __init__(self, channels: int, make_resnet: MakeResnet, **kwargs):
        self.resnets = nnx.List([make_resnet(channels, channels) for _ in range(2)])
        self.attentions = nnx.List([PixelAttention(channels, epsilon=EPSILON, **kwargs)])

    def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nnx.Module):
    """The encoder at one resolution."""

    def __init__(self, channels: list[int], make_resnet: MakeResnet, *, downsample: bool, **kwargs):
        self.resnets = nnx.List([make_resnet(a, b) for a, b in itertools.pairwise(channels)])
        down = [Downsample(channels[-1], padding=(0, 1), **kwargs)] if downsample else []
        self.downsamplers = nnx.List(down)

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """The decoder at one resolution."""

    def __init__(self, channels: list[int], make_resnet: MakeResnet, *, upsample: bool, **kwargs):
        self.resnets = nnx.List([make_resnet(a, b) for a, b in itertools.pairwise(channels)])
        self.upsamplers = nnx.List([Upsample(channels[-1], **kwargs)] if upsample else [])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """From images to the mean and log-variance of latents."""

    def __init__(self, config: AutoencoderConfig, **kwargs):
        make_resnet = functools.partial(ResBlock, epsilon=EPSILON, **kwargs)
        widths = config.block_channels
        self.conv_in = Conv(config.image_channels, widths[0], **kwargs)
        blocks, previous = [], widths[0]
        for level, width in enumerate(widths):
            channels = [previous] + [width] * config.layers_per_block
            blocks.append(DownBlock(channels, make_resnet, downsample=level < len(widths) - 1, **kwargs))
            previous = width
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(widths[-1], make_resnet, **kwargs)
        self.conv_norm_out = GroupNorm(widths[-1], epsilon=EPSILON, **kwargs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, **kwargs)

    def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h2 w2 c2"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """From latents to images; `make_resnet` decides whether it also looks along the views."""

    def __init__(self, config: AutoencoderConfig, make_resnet: MakeResnet, **kwargs):
        widths = config.block_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], **kwargs)
        self.mid_block = MidBlock(widths[0], make_resnet, **kwargs)
        blocks, previous = [], widths[0]
        for level, width in enumerate(widths):
            channels = [previous] + [width] * (config.layers_per_block + 1)
            blocks.append(UpBlock(channels, make_resnet, upsample=level < len(widths) - 1, **kwargs))
            previous = width
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(widths[-1], epsilon=EPSILON, **kwargs)
        self.conv_out = Conv(widths[-1], config.image_channels, **kwargs)

    def __call__(self, latents: Float[Array, "*b h w c"]) -> Float[Array, "*b h2 w2 c2"]:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class TemporalDecoder(Decoder):
    """SVD's decoder: every residual block has a temporal twin, and a convolution along the views ends it."""

    def __init__(self, config: TemporalDecoderConfig, **kwargs):
        # 1e-5 in the temporal blocks is not a slip: sgm takes them from its U-Net.
        make_resnet = functools.partial(
            SpatioTemporalResBlock, epsilon=EPSILON, temporal_epsilon=1e-5, mix_factor=0.0, switch_mix=True, **kwargs
        )
        super().__init__(config, make_resnet, **kwargs)
        self.time_conv_out = TemporalConv(config.image_channels, config.image_channels, **kwargs)

    def __call__(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c2"]:
        return self.time_conv_out(super().__call__(latents))


def _posterior(moments: Array) -> Posterior:
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE)))


class Autoencoder(nnx.Module):
    """The image autoencoder; every image by itself."""

    def __init__(
        self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": InitKeys(rngs)}
        latent = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, **kwargs)
        self.quant_conv = Conv(2 * latent, 2 * latent, 1, **kwargs)
        self.post_quant_conv = Conv(latent, latent, 1, **kwargs)
        self.decoder = Decoder(config, functools.partial(ResBlock, epsilon=EPSILON, **kwargs), **kwargs)
        set_norm_groups(self, config.norm_groups)

    def encode(self, images: Float[Array, "*b h w 3"]) -> Posterior:
        """The distribution of the images' unscaled latents, float32."""
        _check_images(self.config, images)
        return _posterior(self.quant_conv(self.encoder(images)))

    def decode(self, latents: Float[Array, "*b h w c"]) -> Float[Array, "*b h2 w2 3"]:
        """Images of unscaled latents, float32, about [-1, 1] (not clipped)."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)


class TemporalAutoencoder(nnx.Module):
    """SVD's autoencoder: views are encoded one by one and decoded together."""

    def __init__(
        self, config: TemporalDecoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": InitKeys(rngs)}
        moments = 2 * config.latent_channels
        self.config = config
        self.encoder = Encoder(config, **kwargs)
        self.quant_conv = Conv(moments, moments, 1, **kwargs) if config.quant_conv else None
        self.decoder = TemporalDecoder(config, **kwargs)
        set_norm_groups(self, config.norm_groups)

    def encode(self, images: Float[Array, "*b h w 3"]) -> Posterior:
        """The distribution of the images' unscaled latents, float32."""
        _check_images(self.config, images)
        moments = self.encoder(images)
        return _posterior(moments if self.quant_conv is None else self.quant_conv(moments))

    def decode(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 3"]:
        """The views of a clip from their unscaled latents, float32, about [-1, 1] (not clipped)."""
        return self.decoder(latents).astype(jnp.float32)


def _check_images(config: AutoencoderConfig, images: Array) -> None:
    factor = config.downsampling
    if images.shape[-3] % factor or images.shape[-2] % factor:
        raise ValueError(
            f"images of {images.shape[-2]} x {images.shape[-3]} pixels: sides must be multiples of {factor}"
        )
