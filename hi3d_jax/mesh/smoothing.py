"""Bumps that a fit leaves on flat sides, taken away without shrinking the body (Taubin 1995), by trimesh."""

from __future__ import annotations

import numpy as np
import trimesh
from trimesh import smoothing

from hi3d_jax.mesh.triangles import Mesh, check_mesh

# Shares of the way to the neighbours' mean, there and a little more than back, in turn: 1/SHRINK - 1/GROW = -.11 leaves
# what is many edges wide as it is.
SHRINK, GROW = 0.5, 0.53


def smooth(mesh: Mesh, rounds: int = 5) -> Mesh:
    """`mesh` without what is only a few edges wide; each round shrinks and grows it once.

    Positions only: uvs and colours are dropped. Faces, and so the topology, stay as they are.
    """
    check_mesh(mesh)
    body = trimesh.Trimesh(mesh.vertices.astype(np.float64), mesh.faces, process=False)
    smoothing.filter_taubin(body, SHRINK, GROW, iterations=2 * rounds)
    return Mesh(np.asarray(body.vertices, np.float32), mesh.faces)
