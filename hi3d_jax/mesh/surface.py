"""Surfaces out of signed-distance functions: marching cubes in two passes, then one closed body.

The function is negative inside. A coarse grid finds the blocks that the surface can pass through, and only those are
evaluated at full resolution; blocks are added as long as the surface leaves the ones at hand, so the zero set is that
of the full grid. Samples outside the bounds count as empty: the surface is closed even where the object touches them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from skimage.measure import marching_cubes

from hi3d_jax.mesh.topology import clean
from hi3d_jax.mesh.triangles import Mesh, MeshError
from hi3d_jax.mesh.tunnels import close_tunnels

SignedDistance = Callable[[Float[np.ndarray, "n 3"]], Float[np.ndarray, " n"]]

# Fine cells along the side of a block of the coarse pass.
BLOCK = 4
# A learnt distance grows faster than 1 per unit of length here and there; blocks are chosen as if by up to this much.
STEEPEST = 1.5
# Every call gets this many points, so that a compiled function is compiled once.
POINTS_PER_CALL = 1 << 16
MAX_RESOLUTION = 1024
# Samples nearer to zero (in cells) are moved away from it: vertices on grid corners make triangles without area.
CLEARANCE = 1e-3


def extract_surface(
    sdf: SignedDistance,
    lower: Float[np.ndarray, " 3"],
    upper: Float[np.ndarray, " 3"],
    resolution: int = 256,
    outside: SignedDistance | None = None,
) -> Mesh:
    """The largest closed body of `sdf`'s zero set within the bounds, watertight, without inner cavities.

    `resolution` counts the cells along the longest side of the bounds. `sdf` is called with a fixed number of points.
    With `outside`, signed distances to the shape that views allow, tunnels that no view looks through are closed.
    Raises `MeshError` when there is no surface, for NaN, and for bounds or a resolution that make no grid.
    """
    lower, upper = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
    if not (np.isfinite([lower, upper]).all() and (upper > lower).all()):
        raise MeshError(f"bounds {lower} to {upper} hold no volume; give finite bounds, the upper above the lower")
    if not 8 <= resolution <= MAX_RESOLUTION:
        raise MeshError(f"resolution {resolution} is outside [8, {MAX_RESOLUTION}]; choose one within")
    cell = float((upper - lower).max() / resolution)
    blocks = np.maximum(np.ceil((upper - lower) / (cell * BLOCK) - 1e-6).astype(int), 1)
    values, known = _sample_near_surface(_Grid(sdf, lower, upper, cell), blocks)
    if outside is not None:
        values, changed = close_tunnels(values, cell, lambda index: outside(lower + index * cell) <= 0)
        known |= changed
    if not (values < 0).any() or not (values > 0).any():
        side = "nowhere" if values.min() > 0 else "everywhere"
        raise MeshError(
            f"the signed distance is {side} negative within {lower} to {upper}: there is no surface to mesh"
        )
    clearance = np.float32(CLEARANCE * cell)
    values = np.where(np.abs(values) < clearance, np.where(values < 0, -clearance, clearance), values)
    # One empty sample around the grid closes surfaces at the bounds.
    values = np.pad(values, 1, constant_values=np.float32(cell))
    vertices, faces, _, _ = marching_cubes(values, 0.0, mask=np.pad(known, 1, constant_values=True))
    world = lower + (vertices.astype(np.float64) - 1) * cell
    return clean(Mesh(world.astype(np.float32), faces.astype(np.int32)))


class _Grid:
    """Samples of the signed distance at grid corners; corners past the upper bound are empty."""

    def __init__(self, sdf: SignedDistance, lower, upper, cell: float):
        self.sdf, self.lower, self.cell = sdf, lower, cell
        self.last = np.floor((upper - lower) / cell + 1e-6).astype(int)

    def sample(self, index) -> Float[np.ndarray, " n"]:
        values = np.empty(len(index), np.float32)
        for start in range(0, len(index), POINTS_PER_CALL):
            chunk = index[start : start + POINTS_PER_CALL]
            points = np.broadcast_to(self.lower, (POINTS_PER_CALL, 3)).astype(np.float32)
            points[: len(chunk)] = self.lower + chunk * self.cell
            values[start : start + len(chunk)] = np.asarray(self.sdf(points)).reshape(-1)[: len(chunk)]
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise MeshError(f"the signed distance is NaN or infinite at {bad} of {len(values)} points; fit again")
        return np.where((index > self.last).any(axis=1), np.float32(self.cell), values)


def _sample_near_surface(grid: _Grid, blocks) -> tuple[Float[np.ndarray, "x y z"], Bool[np.ndarray, "x y z"]]:
    """Values on the fine grid, and where they are exact; elsewhere they only have the right sign."""
    coarse_index = np.stack(np.meshgrid(*(np.arange(n + 1) for n in blocks), indexing="ij"), axis=-1) * BLOCK
    coarse = grid.sample(coarse_index.reshape(-1, 3)).reshape(blocks + 1)
    values = coarse
    for axis in range(3):
        values = values.repeat(BLOCK, axis=axis)
    values = values[tuple(slice(0, n * BLOCK + 1) for n in blocks)]
    known = np.zeros(values.shape, bool)
    active = _blocks_near_surface(coarse, grid.cell)
    done = np.zeros_like(active)
    while (active & ~done).any():
        wanted = _points_of(active & ~done, values.shape) & ~known
        values[wanted] = grid.sample(np.argwhere(wanted))
        known |= wanted
        done |= active
        active = done | _blocks_where_surface_leaves(values < 0, known, active.shape)
    return values, known


def _blocks_near_surface(coarse: Float[np.ndarray, "x y z"], cell: float) -> Bool[np.ndarray, "a b c"]:
    """Blocks with corners of both signs, or with one so near to zero that the surface can pass between corners."""
    size = tuple(n - 1 for n in coarse.shape)
    corners = [
        coarse[x : x + size[0], y : y + size[1], z : z + size[2]] for x in (0, 1) for y in (0, 1) for z in (0, 1)
    ]
    nearest = np.min([np.abs(corner) for corner in corners], axis=0)
    num_inside = np.sum([corner < 0 for corner in corners], axis=0)
    half_diagonal = 3**0.5 / 2 * BLOCK * cell
    return (nearest <= STEEPEST * half_diagonal) | ((num_inside > 0) & (num_inside < 8))


def _points_of(active: Bool[np.ndarray, "a b c"], shape) -> Bool[np.ndarray, "x y z"]:
    """The grid corners in and around these blocks."""
    points = np.zeros(shape, bool)
    inner = active
    for axis in range(3):
        inner = inner.repeat(BLOCK, axis=axis)
    size = inner.shape
    for x in (0, 1):
        for y in (0, 1):
            for z in (0, 1):
                points[x : x + size[0], y : y + size[1], z : z + size[2]] |= inner
    return points


def _blocks_where_surface_leaves(inside, known, num_blocks) -> Bool[np.ndarray, "a b c"]:
    """Blocks around unknown corners whose sign differs from that of a known neighbour."""
    blocks = np.zeros(num_blocks, bool)
    for axis in range(3):
        one, other = [slice(None)] * 3, [slice(None)] * 3
        one[axis], other[axis] = slice(None, -1), slice(1, None)
        one, other = tuple(one), tuple(other)
        for here, there, step in ((one, other, 0), (other, one, 1)):
            leaving = (inside[here] != inside[there]) & ~known[here] & known[there]
            index = np.argwhere(leaving)
            index[:, axis] += step
            for shift in np.ndindex(2, 2, 2):
                block = np.clip((index - shift) // BLOCK, 0, np.array(num_blocks) - 1)
                blocks[tuple(block.T)] = True
    return blocks
