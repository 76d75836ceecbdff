"""The spatio-temporal U-Net of Stable Video Diffusion and of Hi3D's two stages (Hi3D, sections 4.2 and 4.3).

The network F only: noise levels, preconditioning and guidance are in `hi3d_jax.diffusion`. Views are channels last,
[b t h w c] with `h w` in latent cells (image / 8). Input channels: stage 1 and SVD [noisy 4 | image latent 4]; stage 2
[noisy 4 | depth 9 | coarse latent 4] (HI3D.md sections 2 and 3).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.embeddings import sinusoidal_embedding
from hi3d_jax.models.layers import Conv, GroupNorm, InitKeys, set_norm_groups
from hi3d_jax.models.unet_blocks import REMAT_POLICIES, BlockConfig, DownBlock, MidBlock, TimestepEmbedding, UpBlock


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of a spatio-temporal U-Net; the defaults are SVD's. Tuples have one entry per resolution, finest first."""

    # Channels of the noisy latents and the conditions behind them.
    in_channels: int = 8
    # Channels of the latents.
    out_channels: int = 4
    # Width of the added embedding: 256 for each scalar condition.
    vector_dim: int = 768
    # Width of the image token.
    context_dim: int = 1024
    # Channels at each resolution.
    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    # Attention heads at each resolution.
    num_heads: tuple[int, ...] = (5, 10, 20, 20)
    # Whether each resolution has transformers.
    attention: tuple[bool, ...] = (True, True, True, False)
    # Residual blocks of the encoder at each resolution; the decoder has one more.
    layers_per_block: int = 2
    # Transformer blocks over pixels, and as many over views, behind each residual block.
    transformer_layers: int = 1
    # Of the group norms in residual blocks. The checkpoints were trained with 1e-5; diffusers' port has 1e-6 in the
    # down blocks with attention and in all up blocks, which moves the output by 2e-5 of its scale.
    epsilon: float = 1e-5
    # The same for down blocks with attention and for all up blocks.
    attention_down_and_up_epsilon: float = 1e-5
    # Groups of the group norms; small networks learn faster with fewer.
    norm_groups: int = 32
    # What the backward pass recomputes: "none", "block" (all but blocks' inputs) or "products" (all but those and
    # matrix products).
    remat: str = "none"

    def __post_init__(self):
        if not len(self.block_channels) == len(self.num_heads) == len(self.attention):
            raise ValueError(
                f"block_channels {self.block_channels}, num_heads {self.num_heads} and attention {self.attention} "
                "must have one entry per resolution each"
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r} is unknown: choose one of {', '.join(REMAT_POLICIES)}")

    @classmethod
    def svd(cls) -> "UNetConfig":
        """Stable Video Diffusion; the vector is [fps_id | motion_bucket_id | cond_aug]."""
        return cls()

    @classmethod
    def svd_xt(cls) -> "UNetConfig":
        """SVD-XT: SVD's network, trained on 25 views."""
        return cls()

    @classmethod
    def hi3d_stage1(cls) -> "UNetConfig":
        """Hi3D's multi-view stage; the vector is [aesthetic score | elevation | cond_aug]."""
        return cls()

    @classmethod
    def hi3d_stage2(cls) -> "UNetConfig":
        """Hi3D's refinement stage; the vector is [elevation | cond_aug]."""
        return cls(in_channels=17, vector_dim=512)

    @classmethod
    def tiny(cls, in_channels: int = 8, vector_dim: int = 768, context_dim: int = 1024) -> "UNetConfig":
        """A network of the same structure that fits tests: 32 channels, two resolutions."""
        return cls(
            in_channels=in_channels,
            vector_dim=vector_dim,
            context_dim=context_dim,
            block_channels=(32, 64),
            num_heads=(2, 4),
            attention=(True, False),
            layers_per_block=1,
        )


class UNet(nnx.Module):
    """See the module's text. `dtype` is what layers compute in, `param_dtype` what parameters are stored in."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": InitKeys(rngs)}
        self.config = config
        self.dtype = dtype
        first, emb_dim = config.block_channels[0], 4 * config.block_channels[0]
        self.time_embedding = TimestepEmbedding(first, emb_dim, **kwargs)
        self.add_embedding = TimestepEmbedding(config.vector_dim, emb_dim, **kwargs)
        self.conv_in = Conv(config.in_channels, first, **kwargs)
        down_blocks, skip_channels = self._make_down_blocks(kwargs)
        self.down_blocks = nnx.List(down_blocks)
        self.mid_block = MidBlock(self._block_config(-1, config.epsilon), **kwargs)
        self.up_blocks = nnx.List(self._make_up_blocks(skip_channels, kwargs))
        self.conv_norm_out = GroupNorm(first, epsilon=config.epsilon, **kwargs)
        self.conv_out = Conv(first, config.out_channels, zero=True, **kwargs)
        set_norm_groups(self, config.norm_groups)

    def _block_config(self, level: int, epsilon: float) -> BlockConfig:
        config = self.config
        return BlockConfig(
            channels=config.block_channels[level],
            emb_dim=4 * config.block_channels[0],
            context_dim=config.context_dim,
            num_heads=config.num_heads[level],
            transformer_layers=config.transformer_layers,
            epsilon=epsilon,
            remat=config.remat,
        )

    def _make_down_blocks(self, kwargs: dict) -> tuple[list[DownBlock], list[int]]:
        """The encoder, and the channels of the features it keeps for the decoder, in the order made."""
        config, blocks = self.config, []
        channels = config.block_channels[0]
        skips = [channels]
        for level, attention in enumerate(config.attention):
            last = level == len(config.attention) - 1
            epsilon = config.attention_down_and_up_epsilon if attention else config.epsilon
            block = self._block_config(level, epsilon)
            make = functools.partial(DownBlock, attention=attention, downsample=not last)
            blocks.append(make(block, channels, config.layers_per_block, **kwargs))
            channels = block.channels
            skips += [channels] * (config.layers_per_block + (not last))
        return blocks, skips

    def _make_up_blocks(self, skips: list[int], kwargs: dict) -> list[UpBlock]:
        config, blocks, skips = self.config, [], list(skips)
        channels = config.block_channels[-1]
        for level in reversed(range(len(config.attention))):
            block = self._block_config(level, config.attention_down_and_up_epsilon)
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            make = functools.partial(UpBlock, attention=config.attention[level], upsample=level > 0)
            blocks.append(make(block, channels, taken, **kwargs))
            channels = block.channels
        return blocks

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        c_noise: Float[Array, " b"] | Float[Array, "b t"],
        vector: Float[Array, "b d"] | Float[Array, "b t d"],
        image_token: Float[Array, "b m e"] | Float[Array, "b t m e"],
        image_only: Float[Array, "b t"] | None = None,
    ) -> Float[Array, "b t h w o"]:
        """F(x; c_noise, vector, image_token), float32.

        `x` is the scaled noisy latents with the condition channels behind. `c_noise` is ln(sigma) / 4. Conditions are
        given per video or per view (with `t`). Views whose `image_only` is 1 pass the temporal layers by. The height
        and width must be multiples of 2^(resolutions - 1): a ValueError says so.
        """
        self._check_size(x)
        emb, context = self._embed(c_noise, vector), image_token.astype(self.dtype)
        context = context[:, None] if context.ndim == 3 else context
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, made = block(x, emb, context, image_only)
            skips += made
        x = self.mid_block(x, emb, context, image_only)
        for block in self.up_blocks:
            x = block(x, [skips.pop() for _ in block.resnets], emb, context, image_only)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def _embed(self, c_noise: Array, vector: Array) -> Array:
        """The sum of both embeddings: [b t d], or [b 1 d] if all views share it."""
        time = self.time_embedding(sinusoidal_embedding(c_noise, self.config.block_channels[0]).astype(self.dtype))
        added = self.add_embedding(vector.astype(self.dtype))
        time, added = (e[:, None] if e.ndim == 2 else e for e in (time, added))
        return time + added

    def _check_size(self, x: Array) -> None:
        factor = 2 ** (len(self.config.block_channels) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"the latents are {x.shape[2]} x {x.shape[3]} cells, but this network halves them to a multiple of "
                f"{factor}: use images whose sides are multiples of {8 * factor} pixels"
            )
        if x.shape[4] != self.config.in_channels:
            raise ValueError(f"the input has {x.shape[4]} channels, but this network takes {self.config.in_channels}")
