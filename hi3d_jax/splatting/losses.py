"""What a rendering is compared by: L1 and structural dissimilarity (Kerbl et al. 2023, eq. 7), and L1 of the alpha.

SSIM is Wang et al. 2004 with a Gaussian window of 11 pixels and sigma 1.5, zero outside the image, on [0, 1] images.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

WINDOW = 11
WINDOW_SIGMA = 1.5
STABILISERS = (0.01**2, 0.03**2)
# Rows blurred by one matrix product: a banded matrix for the whole image would be mostly zeros.
BLOCK = 64


def photometric(
    colour: Float[Array, "h w 3"],
    alpha: Float[Array, "h w"],
    target: Float[Array, "h w 3"],
    target_alpha: Float[Array, "h w"],
    dssim_weight: float | Float[Array, ""],
    alpha_weight: float | Float[Array, ""],
) -> Float[Array, ""]:
    """(1 - dssim_weight) L1 + dssim_weight (1 - SSIM) / 2 of the colours, plus alpha_weight times L1 of the alphas."""
    l1 = jnp.abs(colour - target).mean()
    dssim = (1 - ssim(colour, target)) / 2
    return (1 - dssim_weight) * l1 + dssim_weight * dssim + alpha_weight * jnp.abs(alpha - target_alpha).mean()


def ssim(image: Float[Array, "h w c"], other: Float[Array, "h w c"]) -> Float[Array, ""]:
    """Mean structural similarity of two images in [0, 1]; 1 for equal ones."""
    return ssim_map(image, other).mean()


def ssim_map(image: Float[Array, "h w c"], other: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Structural similarity around each pixel, channel by channel."""
    x, y = jnp.moveaxis(image, -1, 0), jnp.moveaxis(other, -1, 0)
    # Of the two variances only the sum is wanted: one blur for both.
    mean_x, mean_y, squares, product = jnp.split(blur(jnp.concatenate([x, y, x * x + y * y, x * y])), 4)
    squared_means = mean_x * mean_x + mean_y * mean_y
    covariance = product - mean_x * mean_y
    c1, c2 = STABILISERS
    luminance = (2 * mean_x * mean_y + c1) / (squared_means + c1)
    return jnp.moveaxis(luminance * (2 * covariance + c2) / (squares - squared_means + c2), 0, -1)


def blur(images: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
    """Each image under SSIM's window."""
    return _blur_rows(_blur_rows(images).swapaxes(1, 2)).swapaxes(1, 2)


def _blur_rows(images):
    height = images.shape[1]
    blocks = -(-height // BLOCK)
    margin = WINDOW // 2
    padded = jnp.pad(images, ((0, 0), (margin, blocks * BLOCK - height + margin), (0, 0)))
    pieces = jnp.stack([padded[:, i * BLOCK : (i + 1) * BLOCK + 2 * margin] for i in range(blocks)], axis=1)
    blurred = jnp.einsum("oi,cbiw->cbow", jnp.asarray(_band()), pieces, precision=jax.lax.Precision.HIGHEST)
    return blurred.reshape(images.shape[0], blocks * BLOCK, -1)[:, :height]


def _band() -> Float[np.ndarray, "o i"]:
    """The window as a matrix from BLOCK + WINDOW - 1 rows to BLOCK."""
    taps = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * WINDOW_SIGMA**2))
    band = np.zeros((BLOCK, BLOCK + WINDOW - 1), np.float32)
    for row in range(BLOCK):
        band[row, row : row + WINDOW] = taps / taps.sum()
    return band
