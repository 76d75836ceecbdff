"""Rays against triangles, by Embree: first hits and visibility, in plain numpy arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from jaxtyping import Bool, Float, Int

from hi3d_jax.mesh.triangles import Mesh, check_mesh


class Hits(NamedTuple):
    """Where `n` rays first meet the mesh.

    `face` is -1 and `distance` infinite for a ray that meets nothing; `barycentric` weighs the face's three corners.
    """

    face: Int[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    barycentric: Float[np.ndarray, "n 3"]


class RayCaster:
    """A mesh made ready for rays; directions are unit vectors, so distances are in world units."""

    def __init__(self, mesh: Mesh):
        check_mesh(mesh)
        self._scene = EmbreeScene()
        self._geometry = TriangleMesh(
            self._scene,
            np.ascontiguousarray(mesh.vertices, np.float32),
            np.ascontiguousarray(mesh.faces, np.int32),
        )

    def cast(self, origins: Float[np.ndarray, "n 3"], directions: Float[np.ndarray, "n 3"]) -> Hits:
        """The first hit of every ray."""
        found = self._run(origins, directions, output=True)
        face = found["primID"].astype(np.int32)
        missed = face < 0
        distance = np.where(missed, np.float32(np.inf), found["tfar"])
        barycentric = np.stack([1 - found["u"] - found["v"], found["u"], found["v"]], axis=1)
        return Hits(face, distance, barycentric)

    def occluded(
        self,
        origins: Float[np.ndarray, "n 3"],
        directions: Float[np.ndarray, "n 3"],
        distances: Float[np.ndarray, " n"],
    ) -> Bool[np.ndarray, " n"]:
        """Whether something lies on each ray nearer than `distances`."""
        return self._run(origins, directions, query="DISTANCE") < distances

    def _run(self, origins, directions, **query):
        origins = np.ascontiguousarray(origins, np.float32)
        return self._scene.run(origins, np.ascontiguousarray(directions, np.float32), **query)
