"""Closing a surface where no view has looked.

Cameras that look down on an object never see its underside, and masks alone leave a cone of possible matter there. The
simplest surface that the rim of the seen part allows, the harmonic one, replaces it: a flat base stays flat.

What is seen ends in one of two ways. Where a surface curves away, as under a ball, it is seen to within a few degrees,
and each degree tells how far down it goes. Where it breaks off, as at the base of a box, all that is grazed behind the
edge is the cone, and what cameras see of it are bumps that a fit has left there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse
from scipy.sparse import csgraph, linalg
from scipy.spatial import cKDTree

from hi3d_jax.cameras import Cameras
from hi3d_jax.mesh.rays import RayCaster
from hi3d_jax.mesh.topology import clean, is_watertight
from hi3d_jax.mesh.triangles import Mesh, MeshError, face_normals, smooth_normals

# Cosines between a surface's normal and the way to the camera that sees it best. A surface that curves away is seen
# from BARELY on (2 degrees above it); bumps on the cone that masks leave, which lies at 0, may reach WELL (12 degrees).
# Parts below GRAZED (7 degrees) show where the cone may be; they lie behind an edge if most of the surface that is RIM
# (world units) away from them faces a camera at more than STEEP (30 degrees).
BARELY, GRAZED, WELL, STEEP = 0.04, 0.12, 0.2, 0.5
RIM = (0.01, 0.03)
# The share of the rim that has to be so. Around the largest unseen parts of 16 fits it was .64 to .95 where bases are
# flat and .19 to .52 where they are round.
MOSTLY = 0.58
# Area in square world units of what is too small to be more than noise.
NOISE = 4e-4
# Rounds of averaging normals, and of majority vote, among neighbours on a surface as fine as marching cubes make it.
AVERAGED, VOTES = 8, 6


def seen_vertices(mesh: Mesh, cameras: Cameras) -> Bool[np.ndarray, " v"]:
    """Which vertices some camera sees, unobstructed; not those that are only grazed behind an edge."""
    adjacency, areas = _adjacency(mesh), _areas(mesh)
    cosines = _best_cosines(mesh, cameras, adjacency)
    seen = _by_majority(cosines > BARELY, adjacency) & ~_behind_edges(mesh, cosines, areas, adjacency)
    islands, count = _patches(seen, adjacency)
    seen[seen] = np.bincount(islands[seen], areas[seen], count)[islands[seen]] >= NOISE
    return seen


def flatten_unseen(
    mesh: Mesh, cameras: Cameras, outside: Callable[[Float[np.ndarray, "n 3"]], Float[np.ndarray, " n"]]
) -> Mesh:
    """Replaces what no camera sees by the harmonic surface over the rim of what is seen.

    `outside` gives signed distances to the shape that the views allow (positive: impossible); a vertex that would leave
    that shape stays where it is. Faces stay as they are unless some collapse; then the body is cleaned, and where it
    cannot be closed again `mesh` comes back unchanged.
    """
    adjacency, fixed = _adjacency(mesh), seen_vertices(mesh, cameras)
    # A component without any seen vertex has no rim to span.
    _, component = csgraph.connected_components(adjacency, directed=False)
    free = np.flatnonzero(~fixed & np.isin(component, np.unique(component[fixed])))
    if len(free) == 0:
        return mesh
    known = np.setdiff1d(np.arange(len(fixed)), free)
    laplacian = csgraph.laplacian(adjacency).tocsr()[free]
    right_side = -(laplacian[:, known] @ mesh.vertices[known].astype(np.float64))
    moved = linalg.splu(laplacian[:, free].tocsc()).solve(right_side).astype(np.float32)
    vertices = mesh.vertices.copy()
    vertices[free] = np.where((outside(moved) > 0)[:, None], vertices[free], moved)
    flattened = dataclasses.replace(mesh, vertices=vertices, normals=None)
    if is_watertight(flattened) or not is_watertight(mesh):
        return flattened
    try:
        return clean(flattened)
    except MeshError:
        return mesh


def _best_cosines(mesh: Mesh, cameras: Cameras, adjacency: sparse.csr_matrix) -> Float[np.ndarray, " v"]:
    """Between each vertex's normal, averaged around it, and the way to the camera that sees it best; -1: none does."""
    normals, caster = smooth_normals(mesh), RayCaster(mesh)
    lifted = mesh.vertices + 2e-3 * normals
    normals = _averaged(normals, adjacency, AVERAGED)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    best = np.full(len(normals), -1.0)
    for centre in cameras.centres:
        towards = centre - mesh.vertices
        distance = np.linalg.norm(towards, axis=1)
        towards = towards / distance[:, None]
        cosines = (normals * towards).sum(axis=1)
        candidates = np.flatnonzero((cosines > best) & (cosines > 0))
        free = candidates[~caster.occluded(lifted[candidates], towards[candidates], distance[candidates])]
        best[free] = cosines[free]
    return best


def _behind_edges(
    mesh: Mesh, cosines: Float[np.ndarray, " v"], areas: Float[np.ndarray, " v"], adjacency: sparse.csr_matrix
) -> Bool[np.ndarray, " v"]:
    """Parts that no camera sees well, where they break off from what is seen well instead of curving away."""
    parts, count = _patches(~_by_majority(cosines > WELL, adjacency), adjacency)
    inside = parts >= 0
    grazed = inside & (cosines <= GRAZED)
    if not grazed.any():
        return grazed
    distance, nearest = cKDTree(mesh.vertices[grazed]).query(mesh.vertices, distance_upper_bound=RIM[1])
    rim = np.isfinite(distance) & (distance > RIM[0]) & (cosines > GRAZED)
    behind = parts[grazed][nearest[rim]]
    steep = np.bincount(behind, cosines[rim] > STEEP, count) / np.maximum(np.bincount(behind, minlength=count), 1)
    whole = np.bincount(parts[inside], areas[inside], count)
    # A top that cameras look along is grazed too, but most of it not as little as the cone.
    cone = np.bincount(parts[grazed], areas[grazed], count) > 0.5 * whole
    return inside & ((steep > MOSTLY) & cone & (whole > NOISE))[parts]


def _by_majority(marked: Bool[np.ndarray, " v"], adjacency: sparse.csr_matrix) -> Bool[np.ndarray, " v"]:
    """`marked` without single vertices that differ from those around them."""
    return _averaged(marked[:, None], adjacency, VOTES)[:, 0] > 0.5


def _averaged(values: Shaped[np.ndarray, "v k"], adjacency: sparse.csr_matrix, rounds: int) -> Float[np.ndarray, "v k"]:
    """The mean of each vertex and its neighbours, `rounds` times."""
    values, neighbours = values.astype(np.float64), np.asarray(adjacency.sum(axis=1))
    for _ in range(rounds):
        values = (adjacency @ values + values) / (neighbours + 1)
    return values


def _patches(marked: Bool[np.ndarray, " v"], adjacency: sparse.csr_matrix) -> tuple[Int[np.ndarray, " v"], int]:
    """Numbers of the connected parts of what is marked, -1 elsewhere, and how many there are."""
    numbers, inside = np.full(len(marked), -1), np.flatnonzero(marked)
    count, numbers[inside] = csgraph.connected_components(adjacency[inside][:, inside], directed=False)
    return numbers, count


def _areas(mesh: Mesh) -> Float[np.ndarray, " v"]:
    """A third of the faces around each vertex."""
    _, areas = face_normals(mesh)
    return np.bincount(mesh.faces.ravel(), np.repeat(areas / 3, 3), len(mesh.vertices))


def _adjacency(mesh: Mesh) -> sparse.csr_matrix:
    """Which vertices share an edge, as a symmetric matrix of ones."""
    edges = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    count = len(mesh.vertices)
    directed = sparse.coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count)).tocsr()
    return ((directed + directed.T) > 0).astype(np.float64)
