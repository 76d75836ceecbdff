"""Scaled dot-product attention in bounded memory, and the attention layer of the U-Net and the autoencoders.

`attend` is exact (softmax statistics in float32) and never holds the scores of all queries at once: the U-Net of
stage 2 has 16384 tokens a view, whose scores would be 1 GiB per head and view. Which way it goes is decided when the
program is lowered, by the platform it is lowered for, so that one for TPU can be compiled on a machine without:

- short sequences (the 16 views of the temporal layers): one plain product;
- GPU, half precision: cuDNN's fused kernel through `jax.nn.dot_product_attention`;
- CPU: one head and 512 queries at a time, whose scores stay in the cache (3-5 times faster than all at once);
- elsewhere: all heads, and as many queries at a time as the budget allows. TPU has no fused kernel that XLA can
  partition over a mesh by itself, and this loop is partitioned over views and heads.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from hi3d_jax.models.layers import GroupNorm, linear

# Up to this many scores per head, all at once is fastest everywhere.
SHORT = 64 * 64
# Queries at a time on CPU: their float32 scores against 1024 keys fill a 2 MiB cache.
CPU_BLOCK = 512
# Scores held at a time on accelerators: 1 GiB in float32.
ACCELERATOR_SCORES = 2**28


def attend(
    query: Float[Array, "*b n k d"], key: Float[Array, "*b m k d"], value: Float[Array, "*b m k d"]
) -> Float[Array, "*b n k d"]:
    """softmax(query key^T / sqrt(d)) value for each of `k` heads."""
    shape = query.shape
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if shape[-3] * key.shape[1] <= SHORT:
        out = _attend_plain(query, key, value)
    else:
        branches = {"cpu": _attend_by_head}
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        # cuDNN's branch can only be traced where cuDNN is.
        if half and shape[-1] % 8 == 0 and shape[-1] <= 128 and jax.default_backend() == "gpu":
            branches["cuda"] = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        out = lax.platform_dependent(query, key, value, default=_attend_by_queries, **branches)
    return out.reshape(shape)


def _attend_plain(query: Array, key: Array, value: Array) -> Array:
    """All heads at once: [b n k d], [b m k d], [b m k d] -> [b n k d]."""
    scores = jnp.einsum("bnkd,bmkd->bknm", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores / math.sqrt(query.shape[-1]), axis=-1)
    return jnp.einsum("bknm,bmkd->bnkd", weights.astype(value.dtype), value)


def _over_queries(block_fn, query: Array, block: int) -> Array:
    """block_fn over blocks of queries [n ...], one after the other; its scores are recomputed in the backward pass."""
    n = query.shape[0]
    block_fn = jax.checkpoint(block_fn, prevent_cse=False)
    if n <= block:
        return block_fn(query)
    padded = jnp.pad(query, ((0, -n % block), *((0, 0),) * (query.ndim - 1)))
    out = lax.map(block_fn, padded.reshape(-1, block, *query.shape[1:]))
    return out.reshape(-1, *out.shape[2:])[:n]


def _attend_by_head(query: Array, key: Array, value: Array) -> Array:
    """One head of one batch row after the other, and in it blocks of queries."""

    def head(qkv):
        q, k, v = qkv

        def block_fn(q):
            # Without batch axes, not even of size 1: XLA's CPU products would take twice as long.
            scores = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)
            out = lax.dot_general(
                weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            return out.astype(v.dtype)

        return _over_queries(block_fn, q, CPU_BLOCK)

    b, n, heads, d = query.shape
    split = (x.swapaxes(1, 2).reshape(b * heads, x.shape[1], d) for x in (query, key, value))
    return lax.map(head, tuple(split)).reshape(b, heads, n, d).swapaxes(1, 2)


def _attend_by_queries(query: Array, key: Array, value: Array) -> Array:
    """All heads and batch rows together, blocks of queries one after the other."""
    b, _, heads, _ = query.shape
    block = max(128, ACCELERATOR_SCORES // (b * heads * key.shape[1]) // 128 * 128)

    def block_fn(q):
        return _attend_plain(q.swapaxes(0, 1), key, value).swapaxes(0, 1)

    return _over_queries(block_fn, query.swapaxes(0, 1), block).swapaxes(0, 1)


class Attention(nnx.Module):
    """Multi-head attention of tokens to themselves, or to `context` tokens of width `context_dim`."""

    def __init__(self, dim: int, num_heads: int, *, context_dim: int | None = None, bias: bool = False, **kwargs):
        context_dim = dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.to_q = linear(dim, dim, use_bias=bias, **kwargs)
        self.to_k = linear(context_dim, dim, use_bias=bias, **kwargs)
        self.to_v = linear(context_dim, dim, use_bias=bias, **kwargs)
        self.to_out = linear(dim, dim, **kwargs)

    def __call__(
        self, x: Float[Array, "*b n c"], context: Float[Array, "*b2 m e"] | None = None
    ) -> Float[Array, "*b3 n2 c"]:
        """The batch axes of `context` broadcast against those of `x`.

        With a single context token every query attends to it with weight 1, whatever the query: the result is then
        computed once and has one token (and context's batch axes), to be broadcast by whoever adds it.
        """
        context = x if context is None else context
        value = self.to_v(context)
        if context.shape[-2] == 1:
            return self.to_out(value)
        query, key, value = (self._split(y) for y in (self.to_q(x), self.to_k(context), value))
        key, value = (jnp.broadcast_to(y, (*x.shape[:-2], *y.shape[-3:])) for y in (key, value))
        return self.to_out(attend(query, key, value).reshape(x.shape))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class PixelAttention(Attention):
    """The autoencoder's attention: one head over all pixels of a view, with its norm and its residual."""

    def __init__(self, channels: int, *, epsilon: float, **kwargs: Any):
        super().__init__(channels, 1, bias=True, **kwargs)
        self.group_norm = GroupNorm(channels, epsilon=epsilon, **kwargs)

    def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
        *batch, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(*batch, h * w, c)
        return x + super().__call__(tokens).reshape(x.shape)
