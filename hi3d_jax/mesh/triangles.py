"""The triangle mesh that the mesh stage (paper section 4.4) passes on, and smooth normals for it.

Vertices are in the z-up world, faces counter-clockwise seen from outside, uvs have their origin at the bottom left of
the texture (whose row 0 is its top), colours are sRGB in [0, 1].
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int


class MeshError(ValueError):
    """A mesh that cannot be used or made; the text names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangles with an optional texture (`uvs` and `texture` together), colours or normals per vertex.

    `vertices` [v 3], `faces` [f 3] counter-clockwise outward, `uvs` [v 2] origin bottom-left, repeating outside
    [0, 1], `texture` [h w 3] sRGB in [0, 1], `normals` [v 3] unit, `colours` [v 3] sRGB in [0, 1].
    """

    vertices: Float[np.ndarray, "v 3"]
    faces: Int[np.ndarray, "f 3"]
    uvs: Float[np.ndarray, "v 2"] | None = None
    texture: Float[np.ndarray, "h w 3"] | None = None
    normals: Float[np.ndarray, "v 3"] | None = None
    colours: Float[np.ndarray, "v 3"] | None = None

    @property
    def triangles(self) -> Float[np.ndarray, "f 3 3"]:
        """The corner positions of every face."""
        return self.vertices[self.faces]


def check_mesh(mesh: Mesh) -> Mesh:
    """Returns `mesh` unchanged, or raises `MeshError`: no faces, NaN, indices out of range, a texture without uvs."""
    if len(mesh.faces) == 0 or len(mesh.vertices) == 0:
        raise MeshError(f"the mesh has {len(mesh.vertices)} vertices and {len(mesh.faces)} faces; it needs triangles")
    if not np.isfinite(mesh.vertices).all():
        bad = int((~np.isfinite(mesh.vertices)).any(axis=1).sum())
        raise MeshError(f"{bad} of {len(mesh.vertices)} vertices are NaN or infinite; export the mesh again")
    if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
        raise MeshError(f"faces name vertex {mesh.faces.max()} of {len(mesh.vertices)}; export the mesh again")
    if mesh.texture is not None and mesh.uvs is None:
        raise MeshError("the mesh has a texture but no texture coordinates; unwrap it before giving it a texture")
    if mesh.uvs is not None and not np.isfinite(mesh.uvs).all():
        raise MeshError("some texture coordinates are NaN or infinite; unwrap the mesh again")
    return mesh


def face_normals(mesh: Mesh) -> tuple[Float[np.ndarray, "f 3"], Float[np.ndarray, " f"]]:
    """Unit normals and areas of the faces; a face without area has the normal 0."""
    corners = mesh.triangles.astype(np.float64)
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(cross, axis=1)
    return cross / np.maximum(length, 1e-300)[:, None], length / 2


def corner_angles(mesh: Mesh) -> Float[np.ndarray, "f 3"]:
    """The interior angles, in radians, at the three corners of every face."""
    corners = mesh.triangles.astype(np.float64)
    onward = np.roll(corners, -1, axis=1) - corners
    onward /= np.maximum(np.linalg.norm(onward, axis=2, keepdims=True), 1e-300)
    backward = -np.roll(onward, 1, axis=1)
    return np.arccos(np.clip((onward * backward).sum(axis=2), -1, 1))


def same_position(vertices: Float[np.ndarray, "v 3"]) -> Int[np.ndarray, " v"]:
    """For every vertex, the number of its position among the distinct positions (exact comparison)."""
    order = np.lexsort(vertices.T)
    ordered = vertices[order]
    number = np.empty(len(vertices), np.int64)
    number[order] = np.cumsum(np.r_[False, (ordered[1:] != ordered[:-1]).any(axis=1)])
    return number


def smooth_normals(mesh: Mesh) -> Float[np.ndarray, "v 3"]:
    """Unit vertex normals: angle-weighted means of the faces around a position, the same on both sides of a uv seam."""
    position = same_position(mesh.vertices)
    weighted = face_normals(mesh)[0][:, None] * corner_angles(mesh)[..., None]
    sums = np.zeros((position.max() + 1, 3))
    np.add.at(sums, position[mesh.faces.reshape(-1)], weighted.reshape(-1, 3))
    normals = sums[position]
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(length > 1e-12, normals / np.maximum(length, 1e-12), [0.0, 0.0, 1.0]).astype(np.float32)


def creased_normals(mesh: Mesh, crease_deg: float = 40.0) -> Float[np.ndarray, "f 3 3"]:
    """Unit normals of the face corners: smooth where neighbouring faces turn less than `crease_deg`, else with an edge.

    Each corner averages, by angle, the faces around its position whose normals are within `crease_deg` of its own.
    """
    normals, _ = face_normals(mesh)
    weights = corner_angles(mesh).reshape(-1)
    position = same_position(mesh.vertices)[mesh.faces.reshape(-1)]
    order = np.argsort(position, kind="stable")
    counts = np.bincount(position)
    counts = counts[counts > 0]
    starts = np.cumsum(counts) - counts
    sums = np.zeros((len(position), 3))
    # All ordered pairs of corners at one position, one offset within the ring of corners at a time.
    ring_start, ring_size = np.repeat(starts, counts), np.repeat(counts, counts)
    place = np.arange(len(order)) - ring_start
    face_of = np.arange(len(position)) // 3
    threshold = np.cos(np.radians(crease_deg))
    for offset in range(int(counts.max())):
        live = offset < ring_size
        own = order[live]
        other = order[(ring_start + (place + offset) % ring_size)[live]]
        near = (normals[face_of[own]] * normals[face_of[other]]).sum(axis=1) > threshold
        own, other = own[near], other[near]
        sums[own] += normals[face_of[other]] * weights[other][:, None]
    flat = np.linalg.norm(sums, axis=1) < 1e-12
    sums[flat] = normals[face_of[flat]]
    length = np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return (sums / length).reshape(-1, 3, 3).astype(np.float32)
