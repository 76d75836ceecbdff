"""Closing a surface where no view has looked.

Cameras that look down on an object never see its underside, and masks alone leave a cone of possible matter there. The
simplest surface that the rim of the seen part allows, the harmonic one, replaces it: a flat base stays flat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse
from scipy.sparse import csgraph, linalg

from hi3d_jax.cameras import Cameras
from hi3d_jax.mesh.rays import RayCaster
from hi3d_jax.mesh.topology import clean, is_watertight
from hi3d_jax.mesh.triangles import Mesh, MeshError, smooth_normals

# A view sees a surface that it meets at more than about 7 degrees; the cone that masks leave is met at none.
MIN_COSINE = 0.12
# Rounds of majority vote among neighbours that remove single mislabelled vertices.
VOTES = 6


def seen_vertices(mesh: Mesh, cameras: Cameras) -> Bool[np.ndarray, " v"]:
    """Which vertices some camera sees, unobstructed and not at a grazing angle."""
    normals, caster = smooth_normals(mesh), RayCaster(mesh)
    lifted = mesh.vertices + 2e-3 * normals
    seen = np.zeros(len(mesh.vertices), bool)
    for centre in cameras.centres:
        towards = centre - mesh.vertices
        distance = np.linalg.norm(towards, axis=1)
        towards = towards / distance[:, None]
        candidates = np.flatnonzero(~seen & ((normals * towards).sum(axis=1) > MIN_COSINE))
        free = ~caster.occluded(lifted[candidates], towards[candidates], distance[candidates])
        seen[candidates[free]] = True
    return seen


def flatten_unseen(
    mesh: Mesh, cameras: Cameras, outside: Callable[[Float[np.ndarray, "n 3"]], Float[np.ndarray, " n"]]
) -> Mesh:
    """Replaces what no camera sees by the harmonic surface over the rim of what is seen.

    `outside` gives signed distances to the shape that the views allow (positive: impossible); a vertex that would leave
    that shape stays where it is. Faces stay as they are unless some collapse; then the body is cleaned, and where it
    cannot be closed again `mesh` comes back unchanged.
    """
    adjacency = _adjacency(mesh)
    degree = np.asarray(adjacency.sum(axis=1)).ravel()
    share = seen_vertices(mesh, cameras).astype(np.float64)
    for _ in range(VOTES):
        share = (adjacency @ share + share) / (degree + 1)
    fixed = share > 0.5
    # A component without any seen vertex has no rim to span.
    _, component = csgraph.connected_components(adjacency, directed=False)
    free = np.flatnonzero(~fixed & np.isin(component, np.unique(component[fixed])))
    if len(free) == 0:
        return mesh
    known = np.setdiff1d(np.arange(len(fixed)), free)
    laplacian = (sparse.diags(degree) - adjacency).tocsr()[free]
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


def _adjacency(mesh: Mesh) -> sparse.csr_matrix:
    """Which vertices share an edge, as a symmetric matrix of ones."""
    edges = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    count = len(mesh.vertices)
    directed = sparse.coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count)).tocsr()
    return ((directed + directed.T) > 0).astype(np.float64)
