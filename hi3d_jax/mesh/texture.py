"""A texture for an unwrapped mesh, from the views of an orbit or from a function of position.

Texels that no view sees are filled by diffusion over the surface (harmonic between the vertices that are seen), then
every texel outside the charts takes the colour of the nearest one inside, so that no filter can reach an empty texel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import distance_transform_edt
from scipy.sparse import coo_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from hi3d_jax.cameras import Cameras, check
from hi3d_jax.mesh.rays import RayCaster
from hi3d_jax.mesh.render import GREY
from hi3d_jax.mesh.triangles import Mesh, MeshError, check_mesh, same_position, smooth_normals
from hi3d_jax.mesh.view_blending import ViewBlender

# Below this score a texel's colour fades into the diffused one.
TRUSTED_SCORE = 0.1
TEXELS_PER_CHUNK = 1 << 17


class Texels(NamedTuple):
    """The surface behind the `n` texels whose centres lie in a chart: place in the texture, face and barycentric."""

    index: Int[np.ndarray, " n"]  # row * texture_size + column
    face: Int[np.ndarray, " n"]
    barycentric: Float[np.ndarray, "n 3"]


def texels_of(mesh: Mesh, texture_size: int) -> Texels:
    """Finds the surface behind each texel, by rays onto the flattened mesh. Raises `MeshError` without uvs."""
    check_mesh(mesh)
    if mesh.uvs is None:
        raise MeshError("the mesh has no texture coordinates; unwrap it first")
    # z is 0 throughout: the charts lie side by side on a plane, texel centres at +0.5, row 0 at the top.
    flat = np.zeros((len(mesh.uvs), 3), np.float32)
    flat[:, 0], flat[:, 1] = mesh.uvs[:, 0] * texture_size, (1 - mesh.uvs[:, 1]) * texture_size
    caster = RayCaster(Mesh(flat, mesh.faces))
    parts = []
    rows = max(1, TEXELS_PER_CHUNK // texture_size)
    for top in range(0, texture_size, rows):
        row, column = np.mgrid[top : min(top + rows, texture_size), 0:texture_size].reshape(2, -1)
        origins = np.stack([column + 0.5, row + 0.5, np.ones(len(row))], axis=1)
        hits = caster.cast(origins, np.broadcast_to([0.0, 0.0, -1.0], origins.shape))
        met = hits.face >= 0
        parts.append((row[met] * texture_size + column[met], hits.face[met], hits.barycentric[met]))
    return Texels(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def bake_texture(
    mesh: Mesh,
    views: Float[np.ndarray, "t h w 3"],
    alphas: Float[np.ndarray, "t h w"],
    cameras: Cameras,
    texture_size: int = 1024,
) -> Mesh:
    """`mesh`, which must have uvs, with the texture that the views (sRGB over white, with their alphas) show.

    Raises `MeshError` when no view sees any of it, or when views, alphas and cameras do not belong together.
    """
    check(cameras)
    if views.shape[:3] != alphas.shape or alphas.shape != (len(cameras), cameras.height, cameras.width):
        raise MeshError(
            f"views {views.shape}, alphas {alphas.shape} and {len(cameras)} cameras of {cameras.width} x "
            f"{cameras.height} pixels do not belong together; resize the cameras to the views"
        )
    texels, normals = texels_of(mesh, texture_size), smooth_normals(mesh)
    blender = ViewBlender(mesh, views, alphas, cameras)
    colours, scores = np.empty((len(texels.index), 3), np.float32), np.empty(len(texels.index), np.float32)
    for start in range(0, len(scores), TEXELS_PER_CHUNK):
        chunk = slice(start, start + TEXELS_PER_CHUNK)
        points = _at_texels(mesh.vertices, mesh, texels, chunk)
        directions = _at_texels(normals, mesh, texels, chunk)
        directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
        colours[chunk], scores[chunk] = blender.blend(points, directions)
    if not (scores > 0).any():
        raise MeshError("no view sees any part of the mesh; check that the cameras look at it")
    trust = np.clip(scores / TRUSTED_SCORE, 0, 1)
    diffused = _diffuse(mesh, texels, colours, trust)
    colours = trust[:, None] * colours + (1 - trust[:, None]) * _at_texels(diffused, mesh, texels)
    return dataclasses.replace(mesh, texture=_with_gutter(texels, colours, texture_size))


def paint_texture(
    mesh: Mesh, colour_at: Callable[[Float[np.ndarray, "n 3"]], Float[np.ndarray, "n 3"]], texture_size: int = 1024
) -> Mesh:
    """`mesh`, which must have uvs, with the texture that `colour_at` (positions to sRGB in [0, 1]) gives."""
    texels = texels_of(mesh, texture_size)
    colours = np.clip(colour_at(_at_texels(mesh.vertices, mesh, texels)), 0, 1).astype(np.float32)
    return dataclasses.replace(mesh, texture=_with_gutter(texels, colours, texture_size))


def _at_texels(values: Float[np.ndarray, "v c"], mesh: Mesh, texels: Texels, chunk: slice = slice(None)):
    """Interpolates values of the vertices."""
    return np.einsum("nkc,nk->nc", values[mesh.faces[texels.face[chunk]]], texels.barycentric[chunk])


def _diffuse(mesh: Mesh, texels: Texels, colours, trust) -> Float[np.ndarray, "v 3"]:
    """Vertex colours: what the texels around a seen vertex show; harmonic in between; grey where nothing connects."""
    position = same_position(mesh.vertices)
    num = int(position.max()) + 1
    corners = position[mesh.faces[texels.face]]
    weights = texels.barycentric * trust[:, None]
    total = np.bincount(corners.reshape(-1), weights=weights.reshape(-1), minlength=num)
    sums = [
        np.bincount(corners.reshape(-1), weights=(weights * colours[:, c : c + 1]).reshape(-1), minlength=num)
        for c in range(3)
    ]
    around = np.bincount(corners.reshape(-1), weights=texels.barycentric.reshape(-1), minlength=num)
    seen = total > 0.3 * np.maximum(around, 1e-6)
    values = np.stack(sums, axis=1) / np.maximum(total, 1e-12)[:, None]
    values[~seen] = GREY
    faces = position[mesh.faces]
    links = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    adjacency = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(num, num)).tocsr()
    adjacency = ((adjacency + adjacency.T) > 0).astype(np.float64)
    island = connected_components(adjacency, directed=False)[1]
    reached = np.bincount(island, weights=seen) > 0
    unknown = ~seen & reached[island]
    if unknown.any():
        laplacian = (diags_array(adjacency.sum(axis=1)) - adjacency).tocsr()[unknown]
        known_part = -(laplacian[:, ~unknown] @ values[~unknown])
        values[unknown] = splu(laplacian[:, unknown].tocsc()).solve(known_part)
    return values[position].astype(np.float32)


def _with_gutter(texels: Texels, colours: Float[np.ndarray, "n 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """The texture; texels outside the charts copy the nearest one inside."""
    texture, empty = np.zeros((size * size, 3), np.float32), np.ones(size * size, bool)
    texture[texels.index], empty[texels.index] = colours, False
    nearest = distance_transform_edt(empty.reshape(size, size), return_distances=False, return_indices=True)
    return texture[(nearest[0] * size + nearest[1]).reshape(-1)].reshape(size, size, 3)
