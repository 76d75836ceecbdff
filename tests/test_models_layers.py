"""The building blocks of the U-Net and the autoencoders against brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from hi3d_jax.models.layers import (
    Conv,
    Downsample,
    GroupNorm,
    InitKeys,
    ResBlock,
    TemporalConv,
    TimeMixer,
    Upsample,
    linear,
    torch_uniform,
)
from hi3d_jax.models.products import convolve
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig


def normal(*shape: int, seed: int = 0) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("num_axes", [2, 3])
def test_group_norm_normalises_groups_even_far_from_zero(num_axes):
    norm = GroupNorm(64, epsilon=1e-5, num_axes=num_axes, rngs=nnx.Rngs(0))
    norm.scale[...] = 1 + normal(64, seed=1)
    norm.bias[...] = normal(64, seed=2)
    x = np.asarray(normal(2, 3, 4, 5, 64)) + 100
    grouped = x.astype(np.float64).reshape(2, 3, 4, 5, 32, 2)
    axes = (*range(4 - num_axes, 4), 5)
    centred = grouped - grouped.mean(axes, keepdims=True)
    expected = (centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)).reshape(x.shape)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    # float32 holds numbers near 100 to 4e-6.
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=5e-5)


def test_group_norm_in_half_precision_keeps_float32_statistics():
    norm = GroupNorm(32, epsilon=1e-5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = normal(1, 64, 64, 32).astype(jnp.bfloat16)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    assert abs(float(out.astype(jnp.float32).mean())) < 1e-3


def test_group_norm_refuses_channels_it_cannot_group():
    with pytest.raises(ValueError, match="33 channels"):
        GroupNorm(33, epsilon=1e-5, rngs=nnx.Rngs(0))


def test_fewer_norm_groups_keep_what_is_the_same_all_over_a_picture():
    config = dataclasses.replace(AutoencoderConfig.tiny(), norm_groups=4)
    network = Autoencoder(config, rngs=nnx.Rngs(0))
    norms = [module for _, module in nnx.iter_modules(network) if isinstance(module, GroupNorm)]
    assert norms
    assert all(norm.num_groups == 4 for norm in norms)
    # One channel is 2 everywhere, the others are 0: alone in its group it would become 0 too.
    x = jnp.zeros((1, 4, 4, 32)).at[..., 5].set(2.0)
    assert float(jnp.abs(GroupNorm(32, epsilon=1e-5, rngs=nnx.Rngs(0))(x)).max()) == 0
    grouped = np.asarray(x).reshape(1, 4, 4, 4, 8)
    centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    np.testing.assert_allclose(network.decoder.conv_norm_out(x), expected.reshape(x.shape), atol=1e-5)
    with pytest.raises(ValueError, match="norm_groups=5"):
        Autoencoder(dataclasses.replace(config, norm_groups=5), rngs=nnx.Rngs(0))


# Few positions (gathered patches) and many (XLA's convolution), with both paddings of the downsamplers.
@pytest.mark.parametrize("size", [(2, 2, 2), (1, 6, 4), (3, 16, 24)])
@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1)), (2, (1, 1)), (2, (0, 1))])
def test_convolutions_agree_with_xla(size, stride, padding):
    conv = Conv(3, 5, stride=stride, padding=padding, rngs=nnx.Rngs(0))
    conv.bias[...] = normal(5, seed=1)
    x = normal(*size, 3)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = lax.conv_general_dilated(x, conv.kernel[...], (stride,) * 2, (padding,) * 2, dimension_numbers=layout)
    np.testing.assert_allclose(conv(x), expected + conv.bias[...].reshape(1, 1, 1, 5), atol=1e-5)


# On CPU: gathered patches, a product for each of the kernel's positions, and patches of one view after the other.
@pytest.mark.parametrize("size", [(2, 2, 2), (9, 8, 8), (3, 16, 24)])
def test_in_half_precision_only_the_result_is_rounded(size):
    conv = Conv(64, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, kernel = (array.astype(jnp.bfloat16) for array in (normal(*size, 64), conv.kernel[...]))
    wide = [array.astype(jnp.float32) for array in (x, kernel)]
    layout = ("NHWC", "HWIO", "NHWC")
    expected, pull = jax.vjp(
        lambda *a: lax.conv_general_dilated(*a, (1, 1), ((1, 1),) * 2, dimension_numbers=layout), *wide
    )
    np.testing.assert_allclose(conv(x).astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)
    slope = normal(*expected.shape, seed=3).astype(jnp.bfloat16)
    gradient = jax.vjp(conv, x)[1](slope)[0].astype(jnp.float32)
    # The sum over the kernel's nine positions is rounded at every one.
    assert np.abs(gradient - pull(slope.astype(jnp.float32))[0]).max() < 0.02 * np.abs(gradient).max()


@pytest.mark.parametrize(
    ("shape", "kernel_shape", "padding"),
    [
        ((32, 16, 17, 16), (3, 3, 16, 24), ((1, 1), (1, 1))),
        ((33, 18, 19, 32), (3, 2, 32, 16), ((0, 1), (1, 0))),
        ((2, 16, 40, 7), (3, 1, 7, 4), ((1, 1), (0, 0))),
    ],
)
def test_gradients_of_convolutions_agree_with_xla(shape, kernel_shape, padding):
    x, kernel = normal(*shape), normal(*kernel_shape, seed=1)

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    expected, expected_pull = jax.vjp(plain, x, kernel)
    made, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, 1, padding), x, kernel)
    np.testing.assert_array_equal(made, expected)
    slope = normal(*expected.shape, seed=2)
    for ours, theirs in zip(pull(slope), expected_pull(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("size", [(2, 2), (16, 16)])
def test_the_temporal_convolution_sees_three_views_and_zeros_beyond(size):
    conv = TemporalConv(4, 6, rngs=nnx.Rngs(0))
    x = np.asarray(normal(2, 5, *size, 4))
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    expected = sum(padded[:, i : i + 5] @ np.asarray(conv.kernel[...])[i, 0, 0] for i in range(3))
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, atol=1e-5)


def test_resampling_halves_and_doubles():
    x = normal(2, 3, 8, 6, 32)
    keys = {"rngs": nnx.Rngs(0)}
    assert Downsample(32, padding=(1, 1), **keys)(x).shape == (2, 3, 4, 3, 32)
    assert Downsample(32, padding=(0, 1), **keys)(x).shape == (2, 3, 4, 3, 32)
    up = Upsample(32, **keys)
    # A kernel that only looks at the middle shows the nearest-neighbour doubling.
    up.conv.kernel[...] = jnp.zeros_like(up.conv.kernel[...]).at[1, 1].set(jnp.eye(32))
    np.testing.assert_allclose(up(x), x.repeat(2, axis=2).repeat(2, axis=3), atol=1e-6)


def test_blocks_of_the_unet_start_as_their_shortcut():
    block = ResBlock(32, 32, 16, epsilon=1e-5, zero=True, rngs=nnx.Rngs(0))
    x = normal(1, 2, 4, 4, 32)
    np.testing.assert_array_equal(block(x, normal(1, 1, 16)), x)


def test_views_marked_as_images_keep_the_spatial_branch():
    mixer = TimeMixer(0.5, rngs=nnx.Rngs(0))
    spatial, temporal = normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=1)
    weight = 1 / (1 + np.exp(-0.5))
    blend = weight * spatial + (1 - weight) * temporal
    np.testing.assert_allclose(mixer(spatial, temporal), blend, atol=1e-6)
    image_only = jnp.asarray([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    expected = jnp.where(image_only.reshape(2, 3, 1, 1) == 1, spatial, blend)
    np.testing.assert_allclose(mixer(spatial, temporal, image_only), expected, atol=1e-6)


def test_initial_weights_are_pytorchs_and_reproducible():
    kernel = torch_uniform(jax.random.key(0), (3, 3, 16, 64))
    bound = (3 * 3 * 16) ** -0.5
    assert np.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.02)
    keys, again = InitKeys(nnx.Rngs(7)), InitKeys(nnx.Rngs(7))
    layers = [linear(8, 8, rngs=keys), linear(8, 8, rngs=keys), linear(8, 8, rngs=again)]
    first, second, repeated = (np.asarray(layer.kernel[...]) for layer in layers)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(first, repeated)
