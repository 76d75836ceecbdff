"""Arithmetic is counted as often as it runs."""

import jax
import jax.numpy as jnp
from jax import lax

from hi3d_jax.models.flops import count_flops


def test_products_convolutions_and_loops_are_counted():
    def function(x, images, kernel):
        y = lax.scan(lambda y, _: (jax.checkpoint(lambda y: y @ y)(y), None), x, length=5)[0]
        y = lax.cond(y[0, 0] > 0, lambda y: y, lambda y: y @ y, y)
        return jnp.einsum("bij,bjk->bik", y[None], y[None]), lax.conv_general_dilated(
            images, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    jaxpr = jax.make_jaxpr(function)(jnp.ones((3, 3)), jnp.ones((2, 8, 6, 4)), jnp.ones((3, 3, 4, 7)))
    # Seven products of 3 x 3 matrices; 2 x 4 x 3 outputs of 7 channels, each a sum over 3 x 3 x 4.
    assert count_flops(jaxpr) == 2 * (7 * 27 + 2 * 4 * 3 * 7 * 36)
