"""Attention against the textbook formula, its gradients, and how much memory it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hi3d_jax.models import attention
from hi3d_jax.models.attention import Attention, PixelAttention, attend
from hi3d_jax.models.unet_blocks import REMAT_POLICIES


def textbook(query, key, value):
    scores = jnp.einsum("bnkd,bmkd->bknm", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(scores, axis=-1), value)


def random_qkv(n: int, m: int, batch: int = 2, heads: int = 3, d: int = 8):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(3 * rng.normal(size=(batch, x, heads, d)), jnp.float32) for x in (n, m, m))


# Not a multiple of a block; one block and more; few enough to go at once; a cross-attention.
@pytest.mark.parametrize(("n", "m"), [(1100, 70), (100, 100), (16, 16), (5000, 3)])
def test_attention_and_its_gradients_are_exact(n, m):
    qkv = random_qkv(n, m)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=qkv[0].shape), jnp.float32)
    np.testing.assert_allclose(jax.jit(attend)(*qkv), textbook(*qkv), atol=1e-5)
    got = jax.jit(jax.grad(lambda *qkv: (attend(*qkv) * probe).sum(), argnums=(0, 1, 2)))(*qkv)
    expected = jax.grad(lambda *qkv: (textbook(*qkv) * probe).sum(), argnums=(0, 1, 2))(*qkv)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_the_accelerators_loop_over_queries_is_exact(monkeypatch):
    monkeypatch.setattr(attention, "ACCELERATOR_SCORES", 1)
    qkv = random_qkv(300, 70)
    np.testing.assert_allclose(jax.jit(attention._attend_by_queries)(*qkv), textbook(*qkv), atol=1e-5)


def test_heads_and_leading_axes_are_independent():
    query, key, value = random_qkv(80, 80)
    split = (x.reshape(1, 2, *x.shape[1:]) for x in (query, key, value))
    np.testing.assert_array_equal(attend(*split)[0], attend(query, key, value))
    np.testing.assert_allclose(
        attend(query, key, value)[:, :, :1], attend(query[:, :, :1], key[:, :, :1], value[:, :, :1]), atol=1e-6
    )


def test_half_precision_keeps_float32_statistics():
    qkv = [x.astype(jnp.bfloat16) for x in random_qkv(600, 70)]
    half = attend(*qkv)
    assert half.dtype == jnp.bfloat16
    # Weights and results are rounded to 8 bits: at most 2^-8 of values up to 12, twice.
    expected = textbook(*(x.astype(jnp.float32) for x in qkv))
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=12 * 2**-7)


@pytest.mark.parametrize("mode", ["forward", "backward", "backward with products kept"])
def test_the_scores_of_stage_2_are_never_all_held(mode):
    """16384 tokens: their scores would take 1 GiB a head, twice that in the backward pass."""
    spec = jax.ShapeDtypeStruct((1, 16384, 2, 64), jnp.float32)
    kept = jax.checkpoint(attend, policy=REMAT_POLICIES["products"])

    def loss(query, key, value):
        return (kept if "kept" in mode else attend)(query, key, value).sum()

    function = loss if mode == "forward" else jax.grad(loss, argnums=(0, 1, 2))
    memory = jax.jit(function).lower(spec, spec, spec).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**28


def test_the_platform_lowered_for_decides():
    """For TPU on a machine without one: all heads in one product, where CPU takes one head at a time."""
    spec = jax.ShapeDtypeStruct((2, 1024, 3, 8), jnp.float32)
    text = {
        platform: jax.jit(attend).trace(spec, spec, spec).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    assert "tensor<512x1024xf32>" in text["cpu"]
    assert "tensor<512x1024xf32>" not in text["tpu"]
    assert "tensor<2x3x1024x1024xf32>" in text["tpu"]


def test_one_context_token_is_the_general_case_cut_short():
    layer = Attention(32, 4, context_dim=6, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 20, 32), (2, 1, 1, 6)))
    # Two equal tokens share the weight, so their values mean what the single one says.
    twice = layer(x, jnp.repeat(context, 2, axis=2))
    once = jnp.broadcast_to(layer(x, context), x.shape)
    np.testing.assert_allclose(once, twice, atol=1e-6)


def test_pixel_attention_ignores_where_pixels_are():
    layer = PixelAttention(32, epsilon=1e-6, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 32)), jnp.float32)
    np.testing.assert_allclose(layer(x[:, ::-1, ::-1])[:, ::-1, ::-1], layer(x), atol=1e-5)
