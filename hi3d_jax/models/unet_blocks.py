"""The parts of the spatio-temporal U-Net: transformers over pixels and over views, and the blocks of one resolution.

Structure and names are those of diffusers' UNetSpatioTemporalConditionModel (SVD, Blattmann et al. 2023). Tokens are
[b t n c]: `n` pixels of `t` views. `emb` is the time and vector embedding [b t d], or [b 1 d] where all views share it;
`context` is the image token [b t m e], or [b 1 m e].
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.attention import Attention
from hi3d_jax.models.embeddings import sinusoidal_embedding
from hi3d_jax.models.layers import (
    Downsample,
    GroupNorm,
    SpatioTemporalResBlock,
    TimeMixer,
    Upsample,
    layer_norm,
    linear,
)

# What sgm gives its transformers' norms; the residual blocks' epsilon is in the config.
TRANSFORMER_NORM_EPSILON = 1e-6
MIX_FACTOR = 0.5


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What the transformers and residual blocks of one resolution have in common."""

    channels: int
    emb_dim: int
    context_dim: int
    num_heads: int
    transformer_layers: int
    epsilon: float
    remat: str


class FeedForward(nnx.Module):
    """GEGLU with the exact gelu: the width times 4, gated, and back."""

    def __init__(self, dim: int, **kwargs):
        self.proj_in = linear(dim, 8 * dim, **kwargs)
        self.proj_out = linear(4 * dim, dim, **kwargs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        x, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(x * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Self-attention over the tokens' last axis, attention to the context, feed-forward, all pre-norm and residual.

    The temporal block has one more feed-forward in front (`norm_in`, `ff_in`).
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int, *, temporal: bool = False, **kwargs):
        self.norm_in = layer_norm(dim, **kwargs) if temporal else None
        self.ff_in = FeedForward(dim, **kwargs) if temporal else None
        self.norm1 = layer_norm(dim, **kwargs)
        self.attn1 = Attention(dim, num_heads, **kwargs)
        self.norm2 = layer_norm(dim, **kwargs)
        self.attn2 = Attention(dim, num_heads, context_dim=context_dim, **kwargs)
        self.norm3 = layer_norm(dim, **kwargs)
        self.ff = FeedForward(dim, **kwargs)

    def __call__(self, x: Float[Array, "*b n c"], context: Float[Array, "*b2 m e"]) -> Float[Array, "*b n c"]:
        if self.ff_in is not None:
            x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class TimestepEmbedding(nnx.Module):
    """Two linear layers with a SiLU between."""

    def __init__(self, in_dim: int, dim: int, out_dim: int | None = None, **kwargs):
        self.linear_1 = linear(in_dim, dim, **kwargs)
        self.linear_2 = linear(dim, dim if out_dim is None else out_dim, **kwargs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class SpatioTemporalTransformer(nnx.Module):
    """Transformer blocks over the pixels of each view, each followed by one over the views at each pixel and a blend.

    The temporal block sees the views' indices as a learned function of their sinusoid, and the first view's context.
    """

    def __init__(self, config: BlockConfig, **kwargs):
        dim, depth = config.channels, range(config.transformer_layers)
        block = functools.partial(TransformerBlock, dim, config.num_heads, config.context_dim, **kwargs)
        self.norm = GroupNorm(dim, epsilon=TRANSFORMER_NORM_EPSILON, **kwargs)
        self.proj_in = linear(dim, dim, **kwargs)
        self.transformer_blocks = nnx.List([block() for _ in depth])
        self.time_pos_embed = TimestepEmbedding(dim, 4 * dim, dim, **kwargs)
        self.temporal_transformer_blocks = nnx.List([block(temporal=True) for _ in depth])
        self.time_mixer = TimeMixer(MIX_FACTOR, **kwargs)
        self.proj_out = linear(dim, dim, zero=True, **kwargs)

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        context: Float[Array, "b t2 m e"],
        image_only: Float[Array, "b t"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        position = self.time_pos_embed(sinusoidal_embedding(jnp.arange(t), c)).reshape(1, t, 1, c)
        tokens = self.proj_in(self.norm(x).reshape(b, t, h * w, c))
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            tokens = spatial(tokens, context)
            over_views = temporal((tokens + position).swapaxes(1, 2), context[:, :1]).swapaxes(1, 2)
            tokens = self.time_mixer(tokens, over_views, image_only)
        return x + self.proj_out(tokens).reshape(x.shape)


def _save_products(primitive, *_, **params) -> bool:
    """Keeps what layers' matrix products and convolutions gave, recomputes the rest.

    A layer contracts the first axis of its kernel. Attention scores do not, or have batch axes: they must not be kept.
    """
    if primitive.name == "dot_general":
        (_, contracted), (batch, _) = params["dimension_numbers"]
        return not batch and tuple(contracted) == (0,)
    return primitive.name == "conv_general_dilated"


# What the backward pass finds stored: everything; a block's inputs; those and its matrix products.
REMAT_POLICIES = {"none": None, "block": jax.checkpoint_policies.nothing_saveable, "products": _save_products}


def apply(module: nnx.Module, remat: str, *args):
    """module(*args), recomputing in the backward pass what the policy named `remat` does not keep."""
    policy = REMAT_POLICIES[remat]
    if policy is None:
        return module(*args)
    graphdef, state = nnx.split(module)
    return jax.checkpoint(lambda state, *args: nnx.merge(graphdef, state)(*args), policy=policy)(state, *args)


def _resnet(config: BlockConfig, in_channels: int, **kwargs) -> SpatioTemporalResBlock:
    return SpatioTemporalResBlock(
        in_channels,
        config.channels,
        config.emb_dim,
        epsilon=config.epsilon,
        temporal_epsilon=config.epsilon,
        mix_factor=MIX_FACTOR,
        zero=True,
        **kwargs,
    )


class DownBlock(nnx.Module):
    """The encoder at one resolution: residual blocks (each with its transformer, if `attention`), the downsampler."""

    def __init__(
        self, config: BlockConfig, in_channels: int, num_layers: int, *, attention: bool, downsample: bool, **kwargs
    ):
        self.remat = config.remat
        inputs = [in_channels] + [config.channels] * (num_layers - 1)
        self.resnets = nnx.List([_resnet(config, channels, **kwargs) for channels in inputs])
        self.attentions = nnx.List([SpatioTemporalTransformer(config, **kwargs) for _ in inputs] if attention else [])
        down = [Downsample(config.channels, padding=(1, 1), **kwargs)] if downsample else []
        self.downsamplers = nnx.List(down)

    def __call__(self, x: Array, emb: Array, context: Array, image_only: Array | None) -> tuple[Array, list[Array]]:
        """The features handed down, and all that the decoder will want at its resolutions."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = apply(resnet, self.remat, x, emb, image_only)
            if self.attentions:
                x = apply(self.attentions[i], self.remat, x, context, image_only)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """A residual block, a transformer and a residual block at the lowest resolution."""

    def __init__(self, config: BlockConfig, **kwargs):
        self.remat = config.remat
        self.resnets = nnx.List([_resnet(config, config.channels, **kwargs) for _ in range(2)])
        self.attentions = nnx.List([SpatioTemporalTransformer(config, **kwargs)])

    def __call__(self, x: Array, emb: Array, context: Array, image_only: Array | None) -> Array:
        x = apply(self.resnets[0], self.remat, x, emb, image_only)
        x = apply(self.attentions[0], self.remat, x, context, image_only)
        return apply(self.resnets[1], self.remat, x, emb, image_only)


class UpBlock(nnx.Module):
    """The decoder at one resolution: each residual block also takes the encoder's features, last made first."""

    def __init__(
        self,
        config: BlockConfig,
        in_channels: int,
        skip_channels: list[int],
        *,
        attention: bool,
        upsample: bool,
        **kwargs,
    ):
        self.remat = config.remat
        inputs = [in_channels] + [config.channels] * (len(skip_channels) - 1)
        channels = [a + b for a, b in zip(inputs, skip_channels, strict=True)]
        self.resnets = nnx.List([_resnet(config, c, **kwargs) for c in channels])
        self.attentions = nnx.List([SpatioTemporalTransformer(config, **kwargs) for _ in inputs] if attention else [])
        self.upsamplers = nnx.List([Upsample(config.channels, **kwargs)] if upsample else [])

    def __call__(self, x: Array, skips: list[Array], emb: Array, context: Array, image_only: Array | None) -> Array:
        """`skips` has one feature map per residual block, in the order they are used."""
        for i, resnet in enumerate(self.resnets):
            x = apply(resnet, self.remat, jnp.concatenate([x, skips[i]], axis=-1), emb, image_only)
            if self.attentions:
                x = apply(self.attentions[i], self.remat, x, context, image_only)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x
