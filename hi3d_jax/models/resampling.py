"""Image resizing as the checkpoints were trained with it: torch's bilinear and bicubic, kornia's blur.

`jax.image.resize` has neither align_corners nor Keys' a = -0.75. Every method here is separable, and along one axis
each output is a weighted sum of a few inputs: numpy makes the table of taps when the function is traced, the device
gathers. Two conventions for where an output pixel lies: half-pixel centres (the default) or `align_corners`, where the
first and last pixels of input and output coincide.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

CUBIC_A = -0.75


def resize_bilinear(
    images: Float[Array, "b h w c"], height: int, width: int, align_corners: bool = False
) -> Float[Array, "b {height} {width} c"]:
    """Two-tap linear interpolation along each axis, without antialiasing (torch's `interpolate(mode="bilinear")`)."""
    images = _combine(images, 1, *_linear_taps(images.shape[1], height, align_corners))
    return _combine(images, 2, *_linear_taps(images.shape[2], width, align_corners))


def resize_bicubic(images: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b {height} {width} c"]:
    """kornia 0.6.9's antialiased resize: Gaussian blur where the image shrinks, then cubic taps with aligned corners.

    One shrinking axis makes both blur, the other then by next to nothing; the input's edges are repeated.
    """
    factors = images.shape[1] / height, images.shape[2] / width
    if max(factors) > 1:
        for axis, factor in enumerate(factors, start=1):
            images = _combine(images, axis, *_gaussian_taps(images.shape[axis], max((factor - 1) / 2, 1e-3)))
    images = _combine(images, 1, *_cubic_taps(images.shape[1], height))
    return _combine(images, 2, *_cubic_taps(images.shape[2], width))


def square_means(images: Float[Array, "b h w c"], side: int) -> Float[Array, "b h//{side} w//{side} c"]:
    """Means over squares of `side` pixels each way; rows and columns that fill none are left out."""
    b, h, w, c = images.shape
    rows, columns = h // side, w // side
    return images[:, : rows * side, : columns * side].reshape(b, rows, side, columns, side, c).mean((2, 4))


def _combine(
    images: Float[Array, "b h w c"], axis: int, indices: np.ndarray, weights: np.ndarray
) -> Float[Array, "b H W c"]:
    """Along `axis`, output i is the sum over taps k of weights[i, k] * input[indices[i, k]], in float32."""
    shape = [1] * images.ndim
    shape[axis] = len(weights)
    total = 0.0
    for tap in range(weights.shape[1]):
        weight = weights[:, tap].astype(np.float32).reshape(shape)
        total += jnp.take(images, indices[:, tap], axis=axis).astype(jnp.float32) * jnp.asarray(weight)
    return total.astype(images.dtype)


def _positions(old: int, new: int, align_corners: bool) -> np.ndarray:
    """Where the `new` outputs lie among `old` inputs, in input pixels counted from the first one's centre."""
    index = np.arange(new, dtype=np.float32)
    # float32 on purpose: torch rounds here, and a steep edge 400 pixels in shows the difference (4e-5 of 1).
    if align_corners:
        return index * np.float32((old - 1) / max(new - 1, 1))
    return (index + np.float32(0.5)) * np.float32(old / new) - np.float32(0.5)


def _linear_taps(old: int, new: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    position = np.clip(_positions(old, new, align_corners), 0, old - 1)
    lower = np.minimum(np.floor(position).astype(int), old - 1)
    fraction = position - lower
    return np.stack([lower, np.minimum(lower + 1, old - 1)], 1), np.stack([1 - fraction, fraction], 1)


def _cubic_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys' cubic convolution kernel at the four nearest inputs."""
    position = _positions(old, new, align_corners=True)
    lower = np.floor(position).astype(int)
    indices = lower[:, None] + np.arange(-1, 3)
    distance = np.abs(position[:, None] - indices)
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = CUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
    return np.clip(indices, 0, old - 1), np.where(distance <= 1, near, far)


def _gaussian_taps(length: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """A normalised Gaussian of 4 sigma, at least 3 taps and an odd number, on an axis mirrored at its edge pixels."""
    size = int(max(4 * sigma, 3))
    offsets = np.arange(size + 1 - size % 2) - size // 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    indices = np.abs(np.arange(length)[:, None] + offsets)
    indices = np.where(indices >= length, 2 * (length - 1) - indices, indices)
    return indices, np.broadcast_to(weights / weights.sum(), indices.shape)
