"""Gaussians from a coloured point cloud, as in 3DGS: round ones, as wide as the distance to their neighbours."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.spherical_harmonics import DEGREE_0, num_coefficients

NUM_NEIGHBOURS = 3
# Points of a visual hull lie where there is surface: start more opaque than the 0.1 that 3DGS gives points of any kind.
OPACITY = 0.5


def from_points(points: Float[np.ndarray, "n 3"], colours: Float[np.ndarray, "n 3"], sh_degree: int = 0) -> Gaussians:
    """One Gaussian per point (world units; sRGB colours in [0, 1]).

    Raises `ValueError` for fewer than two points, points that are not finite, and counts that differ.
    """
    points, colours = np.asarray(points, np.float32), np.asarray(colours, np.float32)
    if len(points) < 2 or len(points) != len(colours):
        raise ValueError(f"{len(points)} points with {len(colours)} colours; give at least 2 points, one colour each")
    if not (np.isfinite(points).all() and np.isfinite(colours).all()):
        raise ValueError("points or colours hold NaN or infinite numbers; remove those points first")
    neighbours = min(NUM_NEIGHBOURS, len(points) - 1)
    distances, _ = cKDTree(points).query(points, k=neighbours + 1)
    spacing = np.sqrt((distances[:, 1:] ** 2).mean(axis=1))
    # Points that coincide would have no width.
    spacing = np.maximum(spacing, 1e-3 * max(float(np.median(spacing)), 1e-6)).astype(np.float32)
    sh = np.zeros((len(points), num_coefficients(sh_degree), 3), np.float32)
    sh[:, 0] = (colours - 0.5) / DEGREE_0
    return Gaussians(
        means=jnp.asarray(points),
        quats=jnp.tile(jnp.array([[1.0, 0.0, 0.0, 0.0]], jnp.float32), (len(points), 1)),
        log_scales=jnp.asarray(np.log(spacing)[:, None].repeat(3, axis=1)),
        opacity_logits=jnp.full(len(points), np.log(OPACITY / (1 - OPACITY)), jnp.float32),
        sh=jnp.asarray(sh),
    )
