"""RRDBNet, the network of ESRGAN and Real-ESRGAN (Wang et al. 2018, 2021): pictures four times as large each way.

Hi3D's appendix A puts Real-ESRGAN (x4plus) in the place of stage 2 as a baseline. The body is 3 x 23 dense blocks of
one shape; their weights are stacked, [block, ...], and run in a scan, which compiles one block instead of 69.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from hi3d_jax.models.layers import Conv

SCALE_FACTOR = 4
CONVS_PER_BLOCK = 5
BLOCKS_PER_GROUP = 3
# Both the dense blocks and the groups of three of them add this share of what they find.
RESIDUAL_SHARE = 0.2
SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class RRDBConfig:
    """Sizes; the defaults are those of Real-ESRGAN x4plus."""

    width: int = 64
    growth: int = 32
    num_groups: int = 23


class DenseBlocks(nnx.Module):
    """The body's dense blocks, weights stacked: `kernels[j]` [block 3 3 in out] is convolution j of every block."""

    def __init__(self, config: RRDBConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        self.config, self.dtype = config, dtype
        num_blocks = config.num_groups * BLOCKS_PER_GROUP
        widths = [config.width + j * config.growth for j in range(CONVS_PER_BLOCK)]
        outs = [config.growth] * (CONVS_PER_BLOCK - 1) + [config.width]
        self.kernels = nnx.List(
            # A tenth of He's scale, as ESRGAN starts: deep sums of residuals stay near the identity.
            nnx.Param(
                0.1
                * jax.nn.initializers.he_normal(in_axis=(1, 2, 3), out_axis=4)(
                    rngs.params(), (num_blocks, 3, 3, width, out), param_dtype
                )
            )
            for width, out in zip(widths, outs, strict=True)
        )
        self.biases = nnx.List(nnx.Param(jnp.zeros((num_blocks, out), param_dtype)) for out in outs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        def group(x, weights):
            start = x
            for block in range(BLOCKS_PER_GROUP):
                x = dense_block(x, [(kernel[block], bias[block]) for kernel, bias in weights])
            return start + RESIDUAL_SHARE * x, None

        stacked = [
            tuple(
                parameter[...].astype(self.dtype).reshape(-1, BLOCKS_PER_GROUP, *parameter[...].shape[1:])
                for parameter in pair
            )
            for pair in zip(self.kernels, self.biases, strict=True)
        ]
        return lax.scan(group, x, stacked)[0]


def dense_block(
    x: Float[Array, "b h w c"], weights: list[tuple[Float[Array, "3 3 _ _"], Float[Array, " _"]]]
) -> Float[Array, "b h w c"]:
    """Each convolution sees the input and all earlier results; the last one is added to the input."""
    found = [x]
    for kernel, bias in weights:
        y = lax.conv_general_dilated(
            jnp.concatenate(found, axis=-1), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = y + bias.reshape(1, 1, 1, -1)
        found.append(jax.nn.leaky_relu(y, SLOPE))
    return x + RESIDUAL_SHARE * y


class RRDBNet(nnx.Module):
    """Pictures four times as large each way."""

    def __init__(self, config: RRDBConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32):
        self.config = config
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.width
        self.conv_first = Conv(3, width, **kwargs)
        self.body = DenseBlocks(config, **kwargs)
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (Conv(width, width, **kwargs) for _ in range(4))
        self.conv_last = Conv(width, 3, **kwargs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h4 w4 3"]:
        """Images in [0, 1], sRGB; the result may leave that range a little."""
        x = self.conv_first(images)
        x = x + self.conv_body(self.body(x))
        for conv in (self.conv_up1, self.conv_up2):
            x = jax.nn.leaky_relu(conv(_doubled(x)), SLOPE)
        return self.conv_last(jax.nn.leaky_relu(self.conv_hr(x), SLOPE))


def _doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
