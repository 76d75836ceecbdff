"""Parts with materials of their own become one mesh with one texture."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from hi3d_jax.mesh.render import GREY
from hi3d_jax.mesh.triangles import Mesh, MeshError, smooth_normals

# Edge of the atlas's largest tile; larger textures, and textures repeated over a part, are scaled to it.
MAX_TILE = 4096
# Texels around a tile that continue it, so that bilinear lookup does not reach a neighbour.
PADDING = 2


class Part(NamedTuple):
    """A mesh in the common frame with a texture, vertex colours or one `colour` (sRGB [3]); grey without any."""

    mesh: Mesh
    colour: Float[np.ndarray, " 3"] | None


def merge_parts(parts: list[Part]) -> Mesh:
    """All triangles of `parts`. Raises `MeshError` where some have vertex colours and others textures."""
    textured = any(part.mesh.texture is not None for part in parts)
    if textured and any(part.mesh.colours is not None for part in parts):
        raise MeshError("the object mixes textures and vertex colours; bake it to one texture")
    if len(parts) == 1 and (textured or parts[0].mesh.colours is not None):
        return parts[0].mesh
    merged = _concatenate(parts)
    if textured:
        pieces = [_tile(part) for part in parts]
        texture, uvs, faces, origin = _stack_tiles(pieces, [len(part.mesh.vertices) for part in parts])
        normals = None if merged.normals is None else merged.normals[origin]
        return Mesh(merged.vertices[origin], faces, uvs=uvs, texture=texture, normals=normals)
    if all(part.mesh.colours is None and part.colour is None for part in parts):
        return merged
    return dataclasses.replace(merged, colours=np.concatenate([_vertex_colours(part) for part in parts]))


def _concatenate(parts: list[Part]) -> Mesh:
    meshes = [part.mesh for part in parts]
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes[:-1])]).astype(np.int32)
    faces = np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=True)])
    normals = None
    if any(mesh.normals is not None for mesh in meshes):
        normals = np.concatenate([smooth_normals(mesh) if mesh.normals is None else mesh.normals for mesh in meshes])
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]), faces, normals=normals)


def _vertex_colours(part: Part) -> Float[np.ndarray, "v 3"]:
    if part.mesh.colours is not None:
        return part.mesh.colours
    colour = np.full(3, GREY) if part.colour is None else part.colour
    return np.broadcast_to(colour.astype(np.float32), part.mesh.vertices.shape).copy()


class _Tile(NamedTuple):
    texture: Float[np.ndarray, "h w 3"]
    uvs: Float[np.ndarray, "v 2"]  # in [0, 1] of the tile
    faces: np.ndarray
    origin: np.ndarray  # the part's vertex behind each of the tile's vertices


def _tile(part: Part) -> _Tile:
    mesh = part.mesh
    if mesh.texture is None:
        colour = np.full(3, GREY) if part.colour is None else part.colour
        texture = np.broadcast_to(colour.astype(np.float32), (4, 4, 3))
        return _Tile(
            texture, np.full((len(mesh.vertices), 2), 0.5, np.float32), mesh.faces, np.arange(len(mesh.vertices))
        )
    # Each face moves by whole texture widths next to the origin; vertices shared by faces that move apart are split.
    corners = mesh.uvs[mesh.faces]
    shift = np.floor(corners.min(axis=1) + 1e-6)
    keys = np.concatenate([mesh.faces.reshape(-1, 1), np.repeat(shift, 3, axis=0)], axis=1).astype(np.int64)
    unique, faces = np.unique(keys, axis=0, return_inverse=True)
    uvs = np.maximum(mesh.uvs[unique[:, 0]] - unique[:, 1:], 0)
    repeats = np.maximum(np.ceil(uvs.max(axis=0) - 1e-3), 1).astype(int)
    texture = _repeated(mesh.texture, repeats)
    uvs = np.minimum(uvs / repeats, 1).astype(np.float32)
    return _Tile(texture, uvs, faces.reshape(-1, 3).astype(np.int32), unique[:, 0])


def _repeated(texture: Float[np.ndarray, "h w 3"], repeats) -> Float[np.ndarray, "h2 w2 3"]:
    across, down = repeats.tolist()
    height, width = texture.shape[:2]
    limit = max(1, MAX_TILE // across), max(1, MAX_TILE // down)
    if width > limit[0] or height > limit[1]:
        image = Image.fromarray(np.round(texture * 255).astype(np.uint8))
        image = image.resize((min(width, limit[0]), min(height, limit[1])), Image.Resampling.LANCZOS)
        texture = np.asarray(image, np.float32) / 255
    return np.tile(texture, (down, across, 1))


def _stack_tiles(tiles: list[_Tile], num_vertices: list[int]):
    """One texture with the tiles below each other; uvs, faces and origins of all vertices in it."""
    padded = [np.pad(tile.texture, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)), mode="edge") for tile in tiles]
    width, height = max(image.shape[1] for image in padded), sum(image.shape[0] for image in padded)
    texture = np.zeros((height, width, 3), np.float32)
    uvs, faces, origins = [], [], []
    top, vertex, source = 0, 0, 0
    for tile, image, num in zip(tiles, padded, num_vertices, strict=True):
        texture[top : top + image.shape[0], : image.shape[1]] = image
        inner_height, inner_width = tile.texture.shape[:2]
        x = PADDING + tile.uvs[:, 0] * inner_width
        y = top + PADDING + (1 - tile.uvs[:, 1]) * inner_height
        uvs.append(np.stack([x / width, 1 - y / height], axis=1).astype(np.float32))
        faces.append(tile.faces + np.int32(vertex))
        origins.append(tile.origin + source)
        top, vertex, source = top + image.shape[0], vertex + len(tile.uvs), source + num
    return texture, np.concatenate(uvs), np.concatenate(faces), np.concatenate(origins)
