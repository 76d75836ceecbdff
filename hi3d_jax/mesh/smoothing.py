"""Bumps that a fit leaves on flat sides, taken away without shrinking the body (Taubin 1995), by trimesh."""

from __future__ import annotations

import numpy as np
import trimesh
from jaxtyping import Bool
from trimesh import smoothing

from hi3d_jax.mesh.triangles import Mesh, check_mesh

# Shares of the way to the neighbours' mean, there and a little more than back, in turn: 1/SHRINK - 1/GROW = .11 leaves
# what is many edges wide as it is.
SHRINK, GROW = 0.5, 0.53
# An edge is sharp if faces still meet at this angle after so many times the rounds: a bump is gone by then.
SHARP_DEG, SHARP_AFTER = 20.0, 3


def smooth(mesh: Mesh, held: Bool[np.ndarray, " v"] | None = None, rounds: int = 5) -> Mesh:
    """`mesh` without what is only a few edges wide; each round shrinks and grows it once.

    `held`: vertices that are known to be in place; those of them on sharp edges stay, which smoothing would round.
    Positions only: uvs and colours are dropped. Faces, and so the topology, stay as they are.
    """
    check_mesh(mesh)
    if held is None or not held.any():
        return _smooth(mesh, rounds)
    body = _smooth(mesh, SHARP_AFTER * rounds)
    faces = trimesh.Trimesh(body.vertices, body.faces, process=False)
    sharp = np.unique(faces.face_adjacency_edges[faces.face_adjacency_angles > np.radians(SHARP_DEG)])
    return _smooth(mesh, rounds, sharp[held[sharp]])


def _smooth(mesh: Mesh, rounds: int, pinned: np.ndarray | None = None) -> Mesh:
    body = trimesh.Trimesh(mesh.vertices.astype(np.float64), mesh.faces, process=False)
    weights = smoothing.laplacian_calculation(body, pinned_vertices=pinned)
    smoothing.filter_taubin(body, SHRINK, GROW, iterations=2 * rounds, laplacian_operator=weights)
    return Mesh(np.asarray(body.vertices, np.float32), mesh.faces)
