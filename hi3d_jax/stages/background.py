"""Generated views are opaque, on white: the object cut out of them, as stage 3 needs it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from hi3d_jax.images import ImageError, matte, over_white
from hi3d_jax.video import Orbit, OrbitError

# Where keying fails, what differs from white by less is background, and parts smaller than this share of the largest
# are smudges. On views of a half-trained autoencoder masks were as good as keyed ones, where those could be had.
SMUDGE = 0.16
SMUDGE_AREA = 0.05


def without_background(orbit: Orbit) -> Orbit:
    """A generated orbit with the object cut out of every view. Raises `OrbitError`."""
    cut = np.stack([_cut_out(number, view) for number, view in enumerate(orbit.views)])
    return Orbit(np.stack([over_white(view) for view in cut]), cut[..., 3], orbit.cameras)


def _cut_out(number: int, view: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 4"]:
    """Keyed, as pictures are; where the border is too uneven for that, what is far from white."""
    opaque = np.concatenate([view, np.ones_like(view[..., :1])], axis=-1)
    try:
        return matte(opaque, "key")
    except ImageError:
        mask = _far_from_white(view)
    if not mask.any() or mask.all():
        raise OrbitError(
            f"view {number}: no object on white was drawn; try another --seed, more --num-steps or another picture"
        )
    return np.concatenate([view, mask[..., None].astype(np.float32)], axis=-1)


def _far_from_white(view: Float[np.ndarray, "h w 3"]) -> np.ndarray:
    labels, count = ndimage.label((1 - view).max(axis=-1) > SMUDGE, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    return ((areas > 0) & (areas >= SMUDGE_AREA * areas.max()))[labels]
