"""Convolutions with fewer products give what the plain ones give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from hi3d_jax.models.layers import Conv
from hi3d_jax.models.winograd import WinogradConv, convolve_3x3


def plain(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("width", [8, 9, 11])
def test_outputs_and_gradients_are_those_of_the_plain_convolution(width):
    """Relative to the largest, for widths that do and do not divide into tiles."""
    generator = np.random.default_rng(width)
    x = jnp.asarray(np.abs(generator.normal(size=(2, 5, width, 16))), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(3, 3, 16, 8)), jnp.float32)
    weights = generator.normal(size=(2, 5, width, 8)).astype(np.float32)

    def weighed(convolve):
        return jax.value_and_grad(lambda x, kernel: jnp.sum(convolve(x, kernel) * weights), (0, 1))(x, kernel)

    np.testing.assert_allclose(convolve_3x3(x, kernel), plain(x, kernel), atol=1e-5 * float(plain(x, kernel).max()))
    for ours, expected in zip(weighed(convolve_3x3)[1], weighed(plain)[1], strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("shape", "options"), [((2, 3, 8, 12, 128), {}), ((1, 12, 12, 3), {}), ((1, 9, 9, 128), {"stride": 2})]
)
def test_the_layer_is_that_of_the_same_parameters(shape, options):
    layers = [each(shape[-1], 4, rngs=nnx.Rngs(0), **options) for each in (WinogradConv, Conv)]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    ours, expected = (layer(x) for layer in layers)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_other_platforms_keep_their_own_convolution():
    layer = WinogradConv(128, 4, rngs=nnx.Rngs(0))
    traced = jax.jit(layer).trace(jax.ShapeDtypeStruct((1, 8, 8, 128), jnp.float32))
    counts = {
        name: traced.lower(lowering_platforms=(name,)).as_text().count("stablehlo.convolution")
        for name in ("cpu", "tpu")
    }
    assert counts == {"cpu": 6, "tpu": 1}
