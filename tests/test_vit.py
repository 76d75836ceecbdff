"""Blocks stacked for `lax.scan` are the same function as the blocks one after the other."""

import jax
import numpy as np
from flax import nnx

from hi3d_jax.models.vit import TransformerBlock, scan_blocks, stacked


def test_scanning_stacked_blocks_equals_applying_them_in_turn():
    def make(rngs: nnx.Rngs) -> TransformerBlock:
        return TransformerBlock(8, 2, 16, rngs=rngs)

    graphdef, params = jax.jit(lambda: nnx.split(stacked(make, 3, nnx.Rngs(0))))()
    kernels = params["fc1"]["kernel"][...]
    assert kernels.shape == (3, 8, 16)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)

    @jax.jit
    def both(params, x):
        one_by_one = x
        for row in range(3):
            one_by_one = nnx.merge(graphdef, jax.tree.map(lambda array, row=row: array[row], params))(one_by_one)
        return scan_blocks(nnx.merge(graphdef, params), x), one_by_one

    np.testing.assert_allclose(*both(params, x), atol=1e-6)
