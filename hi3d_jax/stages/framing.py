"""The input image as the stages see it: the object on white, in a square, 8 bits per channel (HI3D.md section 2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from hi3d_jax.images import over_white, recentre, resize, to_bytes
from hi3d_jax.stages.recipe import Recipe

# OpenCV's weights have eleven bits, and its rows give four of their bits away before the columns are weighed.
_WEIGHT_ONE = 1 << 11


def frame_image(
    cut: Float[np.ndarray, "h w 4"], recipe: Recipe, keep_framing: bool = False
) -> UInt8[np.ndarray, "s s 3"]:
    """The cut-out object on white at the recipe's size.

    Where the recipe has a `foreground_ratio` the object is brought to that size in the middle, unless `keep_framing`.
    Else the shorter side is scaled to the square's and the longer one cropped evenly, as in the released code.
    """
    if recipe.foreground_ratio is not None and not keep_framing:
        # Half as large again, so that what follows only shrinks it.
        cut = recentre(cut, max(recipe.image_size, min(cut.shape[:2])), recipe.foreground_ratio)
    white, size = to_bytes(over_white(cut)), recipe.image_size
    height, width = white.shape[:2]
    scale = max(size / height, size / width)
    fitted = resize_view(white, int(np.ceil(scale * width)), int(np.ceil(scale * height)), recipe)
    top, left = ((side - size) // 2 for side in fitted.shape[:2])
    return fitted[top : top + size, left : left + size]


def resize_view(
    image: UInt8[np.ndarray, "h w 3"], width: int, height: int, recipe: Recipe
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture at another size by the recipe's resampling, aspect ratio not kept."""
    if image.shape[:2] == (height, width):
        return image
    if recipe.resampling == "area":
        return to_bytes(resize(image.astype(np.float32) / 255, width, height))
    return opencv_bilinear(image, width, height)


def resize_views(
    views: UInt8[np.ndarray, "t h w 3"], size: int, recipe: Recipe
) -> UInt8[np.ndarray, "t {size} {size} 3"]:
    """`resize_view` of each view, to a square."""
    return np.stack([resize_view(view, size, size, recipe) for view in views])


def opencv_bilinear(image: UInt8[np.ndarray, "h w c"], width: int, height: int) -> UInt8[np.ndarray, "height width c"]:
    """cv2.resize with its default INTER_LINEAR on 8 bit pictures, to the last bit: fixed-point, not antialiased.

    Halving both sides exactly is a mean of four there.
    """
    if image.shape[:2] == (2 * height, 2 * width):
        four = image.reshape(height, 2, width, 2, -1).astype(np.int32).sum((1, 3))
        return ((four + 2) >> 2).astype(np.uint8)
    left, right, x_weights = _taps(image.shape[1], width)
    upper, lower, y_weights = _taps(image.shape[0], height)
    wide = image.astype(np.int32)
    rows = wide[:, left] * x_weights[0][:, None] + wide[:, right] * x_weights[1][:, None]
    parts = [
        (rows[index] >> 4) * weight[:, None, None] for index, weight in zip((upper, lower), y_weights, strict=True)
    ]
    return (((parts[0] >> 16) + (parts[1] >> 16) + 2) >> 2).astype(np.uint8)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two inputs that each output lies between, and their weights [2 new] in parts of `_WEIGHT_ONE`."""
    position = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(position).astype(int)
    fraction = position - first.astype(np.float32)
    weights = np.rint(np.stack([1 - fraction, fraction]) * _WEIGHT_ONE).astype(np.int32)
    return np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), weights


def with_first_view(
    views: UInt8[np.ndarray, "t s s 3"], image: UInt8[np.ndarray, "s s 3"]
) -> UInt8[np.ndarray, "t s s 3"]:
    """The views, with `image` in the place of view 0."""
    return np.concatenate([image[None], views[1:]])


def to_network(image: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """8 bit pictures in [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1
