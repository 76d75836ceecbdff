"""How near two surfaces are: point distances, F-score, normals, volumes. All lengths in units of the longest side."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree

from hi3d_jax.cameras import Cameras, pixel_rays
from hi3d_jax.mesh import Mesh, depth_maps, face_normals


def sample_surface(
    mesh: Mesh, count: int, seed: int
) -> tuple[Float[np.ndarray, "count 3"], Float[np.ndarray, "count 3"]]:
    """Random points spread evenly over the area, and the unit normals of their faces."""
    generator = np.random.default_rng(seed)
    normals, areas = face_normals(mesh)
    face = generator.choice(len(areas), size=count, p=areas / areas.sum())
    one, other = np.sqrt(generator.uniform(size=count)), generator.uniform(size=count)
    weights = np.stack([1 - one, one * (1 - other), one * other], axis=1)
    return np.einsum("nk,nkc->nc", weights, mesh.triangles[face].astype(np.float64)), normals[face]


def visible_points(mesh: Mesh, cameras: Cameras) -> Float[np.ndarray, "n 3"]:
    """The surface points behind the pixel centres of all cameras: depth maps, back-projected."""
    origins, directions = pixel_rays(cameras)
    depths = depth_maps(mesh, cameras)
    along = np.einsum("thwi,ti->thw", directions, cameras.c2w[:, :3, 2])
    met = np.isfinite(depths)
    return origins[met] + directions[met] * (depths[met] / along[met])[:, None].astype(np.float64)


def voxel_downsample(points: Float[np.ndarray, "n 3"], size: float) -> Float[np.ndarray, "m 3"]:
    """The mean of the points in each voxel, as Open3D has it: voxels begin half a voxel below the least coordinates."""
    index = np.floor((points - (points.min(axis=0) - size / 2)) / size).astype(np.int64)
    extent = index.max(axis=0) + 1
    _, voxel, counts = np.unique(
        np.ravel_multi_index(tuple(index.T), tuple(extent)), return_inverse=True, return_counts=True
    )
    sums = np.stack([np.bincount(voxel, weights=points[:, axis]) for axis in range(3)], axis=1)
    return sums / counts[:, None]


def nearest_distances(points: Float[np.ndarray, "n 3"], others: Float[np.ndarray, "m 3"]):
    """For each point the distance to the nearest of the others, and its number."""
    return cKDTree(others).query(points)


def f_score(there: Float[np.ndarray, " n"], back: Float[np.ndarray, " m"], threshold: float) -> float:
    """Harmonic mean of the shares of distances below `threshold` both ways (Knapitsch et al. 2017)."""
    precision, recall = float((there < threshold).mean()), float((back < threshold).mean())
    return 2 * precision * recall / max(precision + recall, 1e-12)


def volume_iou(one: Bool[np.ndarray, "*grid"], other: Bool[np.ndarray, "*grid"]) -> float:
    """Intersection over union of two occupancies; 1 when both are empty."""
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 1.0
