"""Fewer faces, the same closed body: quadric edge collapse (Garland and Heckbert 1997) by fast-simplification.

It comes before unwrapping, which takes hours on dense meshes.
"""

from __future__ import annotations

import fast_simplification
import numpy as np

from hi3d_jax.mesh.topology import clean, is_watertight, signed_volumes
from hi3d_jax.mesh.triangles import Mesh, MeshError, check_mesh

# Faces below which nothing closed remains.
MIN_FACES = 4
# Tried in turn: how boldly edges are collapsed; bolder is faster, milder breaks less.
AGGRESSIVENESS = (7.0, 4.0, 2.0)


def decimate(mesh: Mesh, num_faces: int) -> Mesh:
    """`mesh` with at most about `num_faces` faces; a mesh that has fewer is returned as it is.

    A watertight body stays one: a result that is not is repaired or made again more mildly, then with more faces.
    Positions only: uvs and colours are dropped. Raises `MeshError` when nothing closed can be made.
    """
    check_mesh(mesh)
    if num_faces < MIN_FACES:
        raise MeshError(f"{num_faces} faces bound no volume; ask for {MIN_FACES} or more")
    if len(mesh.faces) <= num_faces:
        return mesh
    volume = signed_volumes(mesh).sum() if is_watertight(mesh) else None
    target = num_faces
    while target < len(mesh.faces):
        for aggressiveness in AGGRESSIVENESS:
            vertices, faces = fast_simplification.simplify(
                mesh.vertices.astype(np.float64), mesh.faces, target_count=target, agg=aggressiveness
            )
            result = Mesh(vertices.astype(np.float32), faces.astype(np.int32))
            if volume is None:
                return check_mesh(result)
            body = _sound_body(result, volume)
            if body is not None:
                return body
        target = int(target * 1.5) + 1
    raise MeshError(
        f"the mesh of {len(mesh.faces)} faces cannot be reduced to {num_faces} and stay closed; ask for more"
    )


def _sound_body(result: Mesh, volume: float) -> Mesh | None:
    """`result` as one clean body, or None where that is impossible or loses a tenth of the volume."""
    try:
        body = clean(result)
    except MeshError:
        return None
    return body if abs(signed_volumes(body).sum() - volume) < 0.1 * abs(volume) else None
