"""Generated views are opaque, on white: the object cut out of them, as stage 3 needs it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from hi3d_jax.images import NOISY_TOLERANCE, ImageError, matte, over_white
from hi3d_jax.video import Orbit, OrbitError

# What differs from white by less is a smudge, where there are any; so are parts, and gaps, smaller than this share of
# the object.
SMUDGE = 0.16
SMUDGE_AREA = 0.05
# There are some where this share of the frame around the picture, a 16th of it wide, is not white. Small models that
# are not trained to the end cloud their views: keyed, a tenth of the background counted as the object.
SMUDGED_SHARE = 0.02


def without_background(orbit: Orbit) -> Orbit:
    """A generated orbit with the object cut out of every view. Raises `OrbitError`."""
    cut = np.stack([_cut_out(number, view) for number, view in enumerate(orbit.views)])
    return Orbit(np.stack([over_white(view) for view in cut]), cut[..., 3], orbit.cameras)


def _cut_out(number: int, view: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 4"]:
    """Keyed, as pictures are, with soft edges; where the background is clouded, what is far from white."""
    distance = (1 - view).max(axis=-1)
    far = _largest_parts(distance > SMUDGE)
    if not _smudged(distance, far):
        opaque = np.concatenate([view, np.ones_like(view[..., :1])], axis=-1)
        try:
            return matte(opaque, "key")
        except ImageError:
            pass
    if not far.any() or far.all():
        raise OrbitError(
            f"view {number}: no object on white was drawn; try another --seed, more --num-steps or another picture"
        )
    far |= ~_largest_parts(~far, far.sum())
    return np.concatenate([view, far[..., None].astype(np.float32)], axis=-1)


def _smudged(distance: Float[np.ndarray, "h w"], far: Bool[np.ndarray, "h w"]) -> bool:
    """Whether the frame around the picture is not white, where the object is not near."""
    width = max(min(distance.shape) // 16, 1)
    frame = np.pad(np.zeros([side - 2 * width for side in distance.shape], bool), width, constant_values=True)
    frame &= ~ndimage.binary_dilation(far, iterations=width)
    return bool(frame.any() and (distance[frame] > NOISY_TOLERANCE).mean() > SMUDGED_SHARE)


def _largest_parts(mask: Bool[np.ndarray, "h w"], area: int | np.integer | None = None) -> Bool[np.ndarray, "h w"]:
    """`mask` without its connected parts below `SMUDGE_AREA` of `area`, or of the largest one."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    return ((areas > 0) & (areas >= SMUDGE_AREA * (areas.max() if area is None else area)))[labels]
