"""The visual hull of an orbit's masks (Laurentini 1994) as a signed-distance grid.

It is the largest shape that the masks allow: the surface that splatting and NeuS start from, and the baseline that any
reconstruction has to beat. Signed: negative inside. Grids are indexed [x y z] over a cube in world units, samples on
the cube's faces included.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from hi3d_jax.cameras import Cameras, at_pixels, project

# The object's longest side is 1 and its centre the origin; the rest is room for a generated orbit's inaccuracy.
HALF_SIDE = 0.55


class EmptyHullError(ValueError):
    """The masks have no common volume: wrong cameras, or masks that contradict each other."""


@dataclasses.dataclass(frozen=True)
class VisualHull:
    """Signed distances `sdf` [r r r] (world units, a lower bound far from the surface) on the cube `lower`..`upper`."""

    sdf: Float[np.ndarray, "r r r"]
    lower: Float[np.ndarray, "3"]
    upper: Float[np.ndarray, "3"]

    @property
    def spacing(self) -> float:
        """Distance between neighbouring samples."""
        return float(self.upper[0] - self.lower[0]) / (self.sdf.shape[0] - 1)

    def sample(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        """Signed distances at world `points`, trilinear; points outside the cube get the value at its border."""
        index = (points - self.lower) / self.spacing
        return ndimage.map_coordinates(self.sdf, index.T, order=1, mode="nearest")


def carve(
    alphas: Float[np.ndarray, "t h w"], cameras: Cameras, resolution: int = 96, half_side: float = HALF_SIDE
) -> VisualHull:
    """Carves the cube [-half_side, half_side]^3 by the masks `alphas` > 1/2.

    A view carves what it sees: where a mask runs into the frame's border, nothing outside that frame is known from it
    and nothing outside is carved by it. Raises `EmptyHullError` when nothing is left.
    """
    axis = np.linspace(-half_side, half_side, resolution, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    sdf = np.full(len(points), -np.inf, np.float32)
    for view in range(len(cameras)):
        sdf = np.maximum(sdf, _distance_to_cone(points, alphas[view], cameras[view : view + 1]))
    if not (sdf < 0).any():
        raise EmptyHullError(
            "no point of space projects into all masks: check elevation, radius, field of view and the direction of "
            "the orbit (azimuth grows counter-clockwise seen from above), and that every view shows the object"
        )
    # Beyond what any view sees nothing is carved: the cube's border closes the shape there.
    border = np.abs(points).max(axis=1) - half_side
    sdf = np.maximum(sdf, border + 0.5 * (axis[1] - axis[0]))
    lower, upper = np.full(3, -half_side, np.float32), np.full(3, half_side, np.float32)
    return VisualHull(sdf.reshape((resolution,) * 3).astype(np.float32), lower, upper)


def _distance_to_cone(points, alpha, camera: Cameras) -> Float[np.ndarray, " n"]:
    """Signed distance of `points` to the cone that one mask spans, -inf where the view knows nothing."""
    silhouette = silhouette_distance(alpha)
    pixels, depth = (array[0] for array in project(points, camera))
    height, width = alpha.shape
    # Positions of pixel centres are at +0.5, array indices at 0.
    column, row = pixels[:, 0] - 0.5, pixels[:, 1] - 0.5
    clipped = np.stack([np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)])
    distance = ndimage.map_coordinates(silhouette, clipped, order=1)
    distance = distance + np.hypot(row - clipped[0], column - clipped[1])
    distance = distance * depth / camera.K[0, 0, 0]
    outside = (depth <= 0) | (row < -0.5) | (column < -0.5) | (row > height - 0.5) | (column > width - 0.5)
    if touches_border(alpha):
        distance[outside] = -np.inf
    distance[depth <= 0] = -np.inf
    return distance.astype(np.float32)


def carve_by_depths(
    hull: VisualHull,
    fronts: Float[np.ndarray, "t h w"],
    alphas: Float[np.ndarray, "t h w"],
    cameras: Cameras,
    margin: float = 0.006,
    reach: float = 0.08,
    witnesses: int = 3,
) -> VisualHull:
    """Carves from the hull the space that views look through: what masks cannot show, the inside of a cup or the gap
    between a wheel and its car.

    `fronts` (z along the optical axis) are depths up to which each pixel of the object certainly looks through empty
    space, -inf where nothing is known. Single ones err all the same: what goes is more than `margin` (world units) in
    front of them in at least `witnesses` views. An average over the views, as depth maps are often fused by, would let
    a few depths far behind the surface dig holes into it. `reach`: how deep one call carves at most.
    """
    near, points = _near(hull)
    pixels, distance = project(points, cameras)
    height, width = alphas.shape[1:]
    # The largest distances in front, over the views seen so far, in no order.
    best = np.full((min(witnesses, len(cameras)), len(points)), -reach, np.float32)
    for view, alpha in enumerate(alphas):
        column = np.clip(pixels[view, :, 0].astype(int), 0, width - 1)
        row = np.clip(pixels[view, :, 1].astype(int), 0, height - 1)
        # The nearest of the pixels around: at an edge of depths, a point belongs to the surface in front.
        front = ndimage.minimum_filter(np.where(alpha > 0.9, fronts[view], -np.inf), 3)
        before = np.clip(front[row, column] - distance[view], -reach, reach)
        lowest = best.argmin(axis=0)[None]
        np.put_along_axis(best, lowest, np.maximum(np.take_along_axis(best, lowest, 0), before[None]), 0)
    return _less(hull, near, best.min(axis=0), -reach, margin)


def carve_by_stereo(
    hull: VisualHull,
    depths: Float[np.ndarray, "t h w"],
    cameras: Cameras,
    truncation: float = 0.03,
    witnesses: int = 2,
    quantile: float = 0.35,
) -> VisualHull:
    """Carves from the hull what lies in front of the surface on which measured `depths` (z along the optical axis, NaN
    where there are none) agree.

    For each point every view that is no more than `truncation` (world units) in front of it tells its signed distance;
    of these the `quantile` counts, so that most of them have to be wrong in the same way to dig a pit, where there are
    `witnesses` of them at least.
    """
    near, points = _near(hull)
    pixels, distance = project(points, cameras)
    told = np.empty((len(cameras), len(near)), np.float32)
    for view, depth in enumerate(depths):
        told[view] = np.where(distance[view] > 0, at_pixels(depth, pixels[view]) - distance[view], np.nan)
    told = np.sort(np.where(told > -truncation, np.minimum(told, truncation), np.nan), axis=0)  # NaN last
    count = np.isfinite(told).sum(axis=0)
    place = np.round(quantile * np.maximum(count - 1, 0)).astype(int)
    signed = np.take_along_axis(told, place[None], axis=0)[0]
    return _less(hull, near, np.where(count >= witnesses, signed, -truncation), -truncation)


def give_back(
    carved: VisualHull,
    hull: VisualHull,
    uncovered: Bool[np.ndarray, "t h w"],
    cameras: Cameras,
    witnesses: int = 3,
) -> VisualHull:
    """`carved` and again what of `hull` lies, in `witnesses` views at least, behind the pixels `uncovered`, grown by
    one: pixels of the masks that show nothing of `carved`, so that too much went there."""
    near, points = _near(hull)
    count = np.zeros(len(near), int)
    for view, places, depth in zip(uncovered, *project(points, cameras), strict=True):
        grown = ndimage.binary_dilation(view).astype(np.float32)
        count += (at_pixels(grown, places) == 1) & (depth > 0)
    given = near[count >= min(witnesses, len(cameras))]
    sdf = carved.sdf.reshape(-1).copy()
    sdf[given] = hull.sdf.reshape(-1)[given]
    return dataclasses.replace(carved, sdf=sdf.reshape(carved.sdf.shape))


def _near(hull: VisualHull):
    """Flat indices of the grid's samples in or next to the hull, and their world points [n 3]."""
    near = np.flatnonzero(hull.sdf.reshape(-1) < 2 * hull.spacing)
    index = np.stack(np.unravel_index(near, hull.sdf.shape), axis=1)
    return near, (hull.lower + index * hull.spacing).astype(np.float32)


def _less(hull: VisualHull, near, in_front, elsewhere: float, margin: float = 0.0) -> VisualHull:
    """The hull without what lies more than `margin` in front of a surface: `in_front` says how far the samples `near`
    do, `elsewhere` stands for all others."""
    grid = np.full(hull.sdf.size, elsewhere, np.float32)
    grid[near] = in_front
    # Neighbouring points may be seen by different views: a blur of one cell takes the ragged edges between them.
    carved = ndimage.gaussian_filter(grid.reshape(hull.sdf.shape), 1.0) - margin
    return dataclasses.replace(hull, sdf=np.maximum(hull.sdf, carved).astype(np.float32))


def touches_border(alpha: Float[np.ndarray, "h w"]) -> bool:
    """Whether the mask runs into the frame's border, so that the view shows only a part of the object."""
    return bool(max(alpha[0].max(), alpha[-1].max(), alpha[:, 0].max(), alpha[:, -1].max()) > 0.5)


def silhouette_distance(alpha: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Signed distance in pixels to the outline alpha = 1/2, negative inside, sub-pixel where alpha is soft.

    The frame's border is no outline: a mask that runs into it goes on beyond.
    """
    pad = max(alpha.shape)
    inside = np.pad(alpha > 0.5, pad, mode="edge")
    if not inside.any():
        return np.full(alpha.shape, float(pad), np.float32)
    outward = ndimage.distance_transform_edt(~inside) - 0.5
    inward = ndimage.distance_transform_edt(inside) - 0.5 if not inside.all() else np.full(inside.shape, float(pad))
    distance = np.where(inside, -inward, outward)[pad:-pad, pad:-pad]
    # Next to the outline the coverage itself says where inside the pixel it runs.
    return np.where(np.abs(distance) < 0.75, 0.5 - alpha, distance).astype(np.float32)


def surface_points(hull: VisualHull, count: int, seed: int = 0) -> Float[np.ndarray, "n 3"]:
    """`count` random points on the hull's surface, about evenly spread."""
    generator = np.random.default_rng(seed)
    near = np.argwhere(np.abs(hull.sdf) < hull.spacing)
    cells = near[generator.integers(len(near), size=count)]
    points = hull.lower + (cells + generator.uniform(-0.5, 0.5, (count, 3))) * hull.spacing
    # Two Newton steps along the gradient of the signed distance put the samples on its zero level.
    gradient = np.stack(np.gradient(hull.sdf, hull.spacing), axis=-1)
    for _ in range(2):
        index = ((points - hull.lower) / hull.spacing).T
        normal = np.stack(
            [ndimage.map_coordinates(gradient[..., i], index, order=1, mode="nearest") for i in range(3)], 1
        )
        squared = np.maximum((normal**2).sum(axis=1, keepdims=True), 0.05)
        points = points - hull.sample(points)[:, None] * normal / squared
    return np.clip(points, hull.lower, hull.upper).astype(np.float32)


def colours_at(
    points: Float[np.ndarray, "n 3"],
    views: Float[np.ndarray, "t h w 3"],
    alphas: Float[np.ndarray, "t h w"],
    cameras: Cameras,
    normals: Float[np.ndarray, "n 3"] | None = None,
) -> Float[np.ndarray, "n 3"]:
    """A first colour for surface points: the mean over the views that face them (all views without `normals`)."""
    pixels, depth = project(points, cameras)
    total, weight = np.zeros((len(points), 3)), np.full((len(points), 1), 1e-6)
    for view in range(len(cameras)):
        at = (pixels[view, :, ::-1] - 0.5).T
        alpha = ndimage.map_coordinates(alphas[view], at, order=1, mode="constant")
        facing = np.ones(len(points))
        if normals is not None:
            towards = cameras.centres[view] - points
            facing = np.clip((normals * towards).sum(1) / np.linalg.norm(towards, axis=1), 0, 1) ** 4
        share = (alpha * facing * (depth[view] > 0))[:, None]
        colour = np.stack(
            [ndimage.map_coordinates(views[view, ..., c], at, order=1, mode="nearest") for c in range(3)], 1
        )
        total, weight = total + share * colour, weight + share
    return np.where(weight > 1e-3, total / weight, 0.5).astype(np.float32)
