"""The pre-norm transformer block of CLIP's and DPT's vision transformers, and a way to repeat it cheaply.

A tower may keep its blocks as one block whose parameters carry a first axis over depth: `lax.scan` then traces and
compiles one block, however deep the tower (ViT-H has 32).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.attention import attend

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    # OpenAI trained its CLIP with this approximation; with the exact function its weights give other features.
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class SelfAttention(nnx.Module):
    """Multi-head attention of all tokens to all tokens, every projection with a bias."""

    def __init__(self, width: int, num_heads: int, **kwargs: Any):
        linear = functools.partial(nnx.Linear, width, width, **kwargs)
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        query, key, value = (
            projection(x).reshape(*x.shape[:2], self.num_heads, -1) for projection in (self.query, self.key, self.value)
        )
        return self.out(attend(query, key, value).reshape(x.shape))


class TransformerBlock(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        activation: str = "gelu",
        epsilon: float = 1e-5,
        **kwargs: Any,
    ):
        self.activation = activation
        self.norm1 = layer_norm(width, epsilon, **kwargs)
        self.attention = SelfAttention(width, num_heads, **kwargs)
        self.norm2 = layer_norm(width, epsilon, **kwargs)
        self.fc1 = nnx.Linear(width, mlp_width, **kwargs)
        self.fc2 = nnx.Linear(mlp_width, width, **kwargs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x))))


def layer_norm(width: int, epsilon: float, **kwargs: Any) -> nnx.LayerNorm:
    """LayerNorm whose variance is computed around the mean: E[x^2] - E[x]^2 loses four digits in large activations."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **kwargs)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """A module that holds the parameters of `count` modules made alike, stacked on a new first axis."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys))


def scan_blocks(blocks: nnx.Module, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Applies the blocks of `stacked` one after the other."""
    graphdef, params = nnx.split(blocks)
    return jax.lax.scan(lambda x, row: (nnx.merge(graphdef, row)(x), None), x, params)[0]
