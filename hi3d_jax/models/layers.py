"""Convolutions, group normalisation and residual blocks shared by the U-Net and the autoencoders.

Convention: channels last, `b` videos of `t` views, so a feature map is [b t h w c] (or [b h w c] where time plays no
part). Parameters have the names diffusers gives them (`norm1`, `conv1`, `time_emb_proj`, ...), with Flax's leaves
`kernel`, `bias`, `scale`. `dtype` is what layers compute in, `param_dtype` what parameters are stored in; statistics of
norms are float32 whatever the dtype.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from hi3d_jax.models.products import convolve, dot_general, matmul

NUM_GROUPS = 32


class InitKeys:
    """The `rngs` that a network hands to its layers while it is built: one key, and a count kept in Python.

    `nnx.Rngs` keeps the count in an array; where that is traced, as in `nnx.eval_shape`, every key costs a walk over
    all that was traced before: 24 s for the U-Net, 1.3 s this way.
    """

    def __init__(self, rngs: nnx.Rngs):
        self._key = rngs.params()
        self._count = 0

    def params(self) -> Array:
        """A fresh key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


Keys = nnx.Rngs | InitKeys


def torch_uniform(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
    """Uniform in +-1/sqrt(fan_in): what PyTorch starts from, hence what Stable Diffusion was trained from."""
    # XLA's own generator: threefry takes a CPU a second to compile for every shape.
    key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)


def along_channels(vector: Float[Array, " c"], ndim: int, dtype: Any) -> Array:
    """A per-channel vector shaped to act on an array of `ndim` axes, channels last."""
    return vector.astype(dtype).reshape((1,) * (ndim - 1) + (-1,))


def linear(in_features: int, out_features: int, *, use_bias: bool = True, zero: bool = False, **kwargs) -> nnx.Linear:
    """A linear layer that starts as PyTorch's does, or (`zero`) at zero, so that its branch starts silent."""
    init = nnx.initializers.zeros if zero else torch_uniform
    return nnx.Linear(in_features, out_features, use_bias=use_bias, kernel_init=init, dot_general=dot_general, **kwargs)


def layer_norm(features: int, **kwargs) -> nnx.LayerNorm:
    """LayerNorm with PyTorch's epsilon, its variance computed around the mean."""
    return nnx.LayerNorm(features, epsilon=1e-5, use_fast_variance=False, **kwargs)


class GroupNorm(nnx.Module):
    """Normalises groups of channels over the last `num_axes` axes before the channels.

    `num_axes=2` treats every view by itself (h, w); `num_axes=3` the whole clip (t, h, w). Sums run per channel first
    and over the group after: with channels last that is several times faster on CPU than grouping first.
    """

    def __init__(
        self,
        channels: int,
        *,
        epsilon: float,
        num_axes: int = 2,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        if channels % NUM_GROUPS:
            raise ValueError(
                f"{channels} channels do not divide into {NUM_GROUPS} groups: use a multiple of {NUM_GROUPS}"
            )
        self.epsilon = epsilon
        self.num_axes = num_axes
        self.num_groups = NUM_GROUPS
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        x = x.astype(jnp.float32)
        x = x - self._group_mean(x)
        x = x * lax.rsqrt(self._group_mean(x * x) + self.epsilon)
        scale, bias = (along_channels(p[...], x.ndim, jnp.float32) for p in (self.scale, self.bias))
        return (x * scale + bias).astype(self.dtype)

    def _group_mean(self, x: Array) -> Array:
        channels = x.shape[-1]
        mean = x.mean(range(-1 - self.num_axes, -1), keepdims=True)
        mean = mean.reshape(*mean.shape[:-1], self.num_groups, channels // self.num_groups).mean(-1)
        return jnp.repeat(mean, channels // self.num_groups, axis=-1)


def set_norm_groups(network: nnx.Module, num_groups: int) -> None:
    """Gives every `GroupNorm` of a network `num_groups` groups, one of 1, 2, 4, ... 32.

    With the released networks' 32 a narrow network normalises single channels, and what is the same all over a picture,
    like its colour, is lost on the way. Raises `ValueError`.
    """
    if num_groups < 1 or NUM_GROUPS % num_groups:
        raise ValueError(f"norm_groups={num_groups} does not divide {NUM_GROUPS}: choose 1, 2, 4, 8, 16 or 32")
    for _, module in nnx.iter_modules(network):
        if isinstance(module, GroupNorm):
            module.num_groups = num_groups


class Conv(nnx.Module):
    """A convolution over (h, w), the same for every view. `padding` is (before, after) on both axes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        zero: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        init = nnx.initializers.zeros if zero else torch_uniform
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.stride = stride
        self.padding = (kernel_size // 2, kernel_size // 2) if padding is None else padding
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype))

    def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h2 w2 d"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if kernel.shape[:2] == (1, 1):
            y = matmul(x, kernel[0, 0])
        else:
            y = convolve(x.reshape(-1, *x.shape[-3:]), kernel, self.stride, (self.padding, self.padding))
            y = y.reshape(*x.shape[:-3], *y.shape[1:])
        return y + along_channels(self.bias[...], y.ndim, self.dtype)


class TemporalConv(nnx.Module):
    """A convolution over three neighbouring views at each position; beyond the ends lie zeros, not the other end.

    Written over the axes (t, h*w): XLA's CPU backend runs two-dimensional convolutions faster than three-dimensional.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        zero: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: Keys,
    ):
        init = nnx.initializers.zeros if zero else torch_uniform
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (3, 1, 1, in_channels, out_channels), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype))

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        b, t, h, w, c = x.shape
        kernel = self.kernel[...].astype(self.dtype)[:, 0]
        y = convolve(x.astype(self.dtype).reshape(b, t, h * w, c), kernel, 1, ((1, 1), (0, 0)))
        return y.reshape(b, t, h, w, -1) + along_channels(self.bias[...], 5, self.dtype)


class Upsample(nnx.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int, **kwargs):
        self.conv = Conv(channels, channels, **kwargs)

    def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b 2*h 2*w c"]:
        *batch, h, w, c = x.shape
        x = jnp.broadcast_to(x[..., :, None, :, None, :], (*batch, h, 2, w, 2, c))
        return self.conv(x.reshape(*batch, 2 * h, 2 * w, c))


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2. The U-Net pads a pixel all round, the autoencoder only below and to the right."""

    def __init__(self, channels: int, *, padding: tuple[int, int], **kwargs):
        self.conv = Conv(channels, channels, stride=2, padding=padding, **kwargs)

    def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h2 w2 c"]:
        return self.conv(x)


class ResBlock(nnx.Module):
    """Two normalised convolutions and a shortcut; `temporal` runs them along the views instead of over the pixels.

    `emb_dim` is the width of the embedding added between the convolutions (None: no embedding). `zero` starts the
    block as its shortcut, as the U-Net's do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int | None = None,
        *,
        epsilon: float,
        temporal: bool = False,
        zero: bool = False,
        **kwargs,
    ):
        norm = functools.partial(GroupNorm, epsilon=epsilon, num_axes=3 if temporal else 2, **kwargs)
        conv = functools.partial(TemporalConv if temporal else Conv, **kwargs)
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels)
        self.time_emb_proj = None if emb_dim is None else linear(emb_dim, out_channels, **kwargs)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, zero=zero)
        self.conv_shortcut = None if in_channels == out_channels else Conv(in_channels, out_channels, 1, **kwargs)

    def __call__(
        self, x: Float[Array, "*b h w c"], emb: Float[Array, "b t2 d"] | None = None
    ) -> Float[Array, "*b h w c2"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(jax.nn.silu(emb))[:, :, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class TimeMixer(nnx.Module):
    """A learned blend of a spatial and a temporal branch, sigmoid(mix_factor) being the weight of the spatial one.

    Rows of `image_only` that are 1 keep the spatial branch alone: such frames are images, not neighbours in time.
    """

    def __init__(self, mix_factor: float, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: Keys):
        self.dtype = dtype
        self.mix_factor = nnx.Param(jnp.full((1,), mix_factor, param_dtype))

    def __call__(
        self,
        spatial: Float[Array, "b t *n c"],
        temporal: Float[Array, "b t *n c"],
        image_only: Float[Array, "b t"] | None = None,
    ) -> Float[Array, "b t *n c"]:
        weight = jax.nn.sigmoid(self.mix_factor[...].astype(jnp.float32)).reshape(1, 1)
        if image_only is not None:
            weight = jnp.where(image_only > 0.5, 1.0, weight)
        weight = weight.reshape(*weight.shape, *(1,) * (spatial.ndim - 2)).astype(self.dtype)
        return weight * spatial + (1 - weight) * temporal


class SpatioTemporalResBlock(nnx.Module):
    """A residual block over each view's pixels, one along the views on its result, and the learned blend of the two.

    `switch_mix` makes sigmoid(mix_factor) the weight of the TEMPORAL branch: so it is in SVD's temporal decoder, and
    only there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int | None = None,
        *,
        epsilon: float,
        temporal_epsilon: float,
        mix_factor: float,
        switch_mix: bool = False,
        zero: bool = False,
        **kwargs,
    ):
        self.switch_mix = switch_mix
        self.spatial_res_block = ResBlock(in_channels, out_channels, emb_dim, epsilon=epsilon, zero=zero, **kwargs)
        self.temporal_res_block = ResBlock(
            out_channels, out_channels, emb_dim, epsilon=temporal_epsilon, temporal=True, zero=zero, **kwargs
        )
        self.time_mixer = TimeMixer(mix_factor, **kwargs)

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        emb: Float[Array, "b t2 d"] | None = None,
        image_only: Float[Array, "b t"] | None = None,
    ) -> Float[Array, "b t h w c2"]:
        spatial = self.spatial_res_block(x, emb)
        temporal = self.temporal_res_block(spatial, emb)
        if self.switch_mix:
            return self.time_mixer(temporal, spatial)
        return self.time_mixer(spatial, temporal, image_only)
