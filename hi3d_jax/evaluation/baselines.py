"""What any system has to beat: the input handed back for every view, the visual hull of all masks, that of one mask."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from hi3d_jax import visual_hull
from hi3d_jax.mesh import Mesh, decimate, extract_surface
from hi3d_jax.video import Orbit

HULL_RESOLUTION = 128
HULL_FACES = 20_000


def copy_input(truth: Float[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "t h w 3"]:
    """View 0 as every view."""
    return np.broadcast_to(truth[:1], truth.shape).copy()


def hull(orbit: Orbit, resolution: int = HULL_RESOLUTION, half_side: float = visual_hull.HALF_SIDE) -> Mesh:
    """The surface of the visual hull, in grey: the best shape that masks alone allow. Raises `EmptyHullError`."""
    carved = visual_hull.carve(orbit.alphas, orbit.cameras, resolution, half_side)
    return decimate(extract_surface(carved.sample, carved.lower, carved.upper, resolution), HULL_FACES)


def silhouette(orbit: Orbit) -> Mesh:
    """What view 0's mask alone allows within the cube of side 1 that objects fill. Raises `EmptyHullError`."""
    return hull(orbit[:1], half_side=0.5)
