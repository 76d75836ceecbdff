"""Meshes as files: GLB, OBJ and PLY, in and out.

The only place where axes and texture coordinates change: glTF is y up, this library (and the OBJ and PLY files it
writes and reads) z up; glTF's uvs start at the top left, which trimesh converts. PLY carries colours per vertex.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import trimesh
from jaxtyping import Float
from PIL import Image

from hi3d_jax.atomic import written_aside
from hi3d_jax.cameras import y_up_to_z_up, z_up_to_y_up
from hi3d_jax.mesh.atlas import Part, merge_parts
from hi3d_jax.mesh.render import linear_to_srgb, sample_texture, srgb_to_linear
from hi3d_jax.mesh.texture_files import check_textures, decode_texture
from hi3d_jax.mesh.triangles import Mesh, MeshError, check_mesh, same_position, smooth_normals

SUFFIXES = (".glb", ".obj", ".ply")
READABLE_SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
MAX_FILE_BYTES = 1 << 30
MAX_FACES = 5_000_000


def write_mesh(path: str | Path, mesh: Mesh) -> None:
    """Writes `mesh` as its suffix says, atomically, with smooth normals and a matte material (metallic 0, roughness 1).

    An OBJ comes with a .mtl and a .png named after it. A PLY takes its vertex colours from the texture. Raises
    `MeshError` for another suffix, and `OSError` when the folder cannot be written.
    """
    path = Path(path)
    check_mesh(mesh)
    writers = {".glb": _glb_files, ".obj": _obj_files, ".ply": _ply_files}
    if path.suffix.lower() not in writers:
        raise MeshError(f"meshes are written as {', '.join(SUFFIXES)}, not {path.name!r}; change the suffix")
    for name, content in writers[path.suffix.lower()](mesh, path.stem).items():
        with written_aside(path.with_name(name)) as aside:
            aside.write_bytes(content if isinstance(content, bytes) else content.encode())


def read_mesh(path: str | Path) -> Mesh:
    """Reads a GLB, glTF, OBJ or PLY into one mesh, z up, whatever number of parts and materials it has.

    Only base colours are read: textures (transparency ignored), factors and vertex colours; several materials become
    one texture atlas. Raises `MeshError` for a file that is damaged, empty, too large or lacks a texture it names.
    """
    path = Path(path)
    _check_file(path)
    parts = _load_parts(path)
    if not parts:
        raise MeshError(f"{path} holds no triangles; export the object as triangles")
    num_faces = sum(len(part.mesh.faces) for part in parts)
    if num_faces > MAX_FACES:
        raise MeshError(f"{path} has {num_faces} faces, more than {MAX_FACES}; decimate it first")
    mesh = check_mesh(merge_parts(parts))
    return _to_z_up(mesh) if path.suffix.lower() in (".glb", ".gltf") else mesh


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in READABLE_SUFFIXES:
        raise MeshError(f"meshes are read from {', '.join(READABLE_SUFFIXES)}, not {path.name!r}; convert it first")
    if not path.is_file():
        raise MeshError(f"{path} is not a file; check the path")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise MeshError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; decimate it first")
    check_textures(path)


def _load_parts(path: Path) -> list[Part]:
    """The triangles of every node of the file's scene."""
    try:
        scene = trimesh.load_scene(path, process=False)
        nodes = [scene.graph[node] for node in scene.graph.nodes_geometry]
        meshes = [(scene.geometry[name], transform) for transform, name in nodes]
        meshes = [(mesh, transform) for mesh, transform in meshes if isinstance(mesh, trimesh.Trimesh)]
        return [_part(mesh, transform, path) for mesh, transform in meshes if len(mesh.faces)]
    except MeshError:
        raise
    # A parser of files from anywhere raises anything, or makes arrays of any shape; whatever it is, the file is what
    # the user can change.
    except Exception as error:
        raise MeshError(
            f"{path} cannot be read as a mesh ({type(error).__name__}: {error}); export it again"
        ) from error


def _part(loaded: trimesh.Trimesh, transform: Float[np.ndarray, "4 4"], path: Path) -> Part:
    faces = np.asarray(loaded.faces, np.int32)
    linear = np.asarray(transform, np.float64)[:3, :3]
    if np.linalg.det(linear) < 0:
        faces = faces[:, ::-1]
    vertices = np.asarray(loaded.vertices) @ linear.T + transform[:3, 3]
    normals = None
    if "vertex_normals" in loaded._cache.cache:
        normals = loaded.vertex_normals @ np.linalg.pinv(linear)
        normals = (normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    mesh = Mesh(vertices.astype(np.float32), np.ascontiguousarray(faces), normals=normals)
    visual, linear_colours = loaded.visual, path.suffix.lower() in (".glb", ".gltf")
    if visual.kind == "texture":
        image, factor = _material(visual.material, path)
        uvs = None if visual.uv is None else np.asarray(visual.uv, np.float32)
        return Part(dataclasses.replace(mesh, uvs=uvs, texture=None if uvs is None else image), factor)
    if visual.kind in ("vertex", "face"):
        colours = np.asarray(visual.vertex_colors, np.float32)[:, :3] / 255
        colours = linear_to_srgb(colours) if linear_colours else colours
        return Part(dataclasses.replace(mesh, colours=colours), None)
    return Part(mesh, None)


def _material(material, path: Path) -> tuple[Float[np.ndarray, "h w 3"] | None, Float[np.ndarray, " 3"] | None]:
    """The base colour texture with its factor multiplied in, or only the factor as an sRGB colour."""
    if isinstance(material, trimesh.visual.material.PBRMaterial):
        image, factor = material.baseColorTexture, material.baseColorFactor
        factor = None if factor is None else np.asarray(factor, np.float32)[:3] / (255 if np.max(factor) > 1 else 1)
    else:
        image, factor = getattr(material, "image", None), None
        if image is None:
            return None, np.asarray(material.main_color, np.float32)[:3] / 255
    if image is None:
        return None, None if factor is None else linear_to_srgb(factor)
    texture = decode_texture(image, path)
    if factor is not None and (factor != 1).any():
        texture = linear_to_srgb(srgb_to_linear(texture) * factor)
    return texture, None


def _to_z_up(mesh: Mesh) -> Mesh:
    normals = None if mesh.normals is None else y_up_to_z_up(mesh.normals)
    return dataclasses.replace(mesh, vertices=y_up_to_z_up(mesh.vertices), normals=normals)


def _glb_files(mesh: Mesh, stem: str) -> dict[str, bytes]:
    return {f"{stem}.glb": _trimesh_of(mesh, stem, y_up=True).export(file_type="glb", include_normals=True)}


def _obj_files(mesh: Mesh, stem: str) -> dict[str, bytes]:
    text, extra = trimesh.exchange.obj.export_obj(
        _trimesh_of(mesh, stem), include_normals=True, return_texture=True, mtl_name=f"{stem}.mtl", header=None
    )
    return {**extra, f"{stem}.obj": text.encode()}


def _ply_files(mesh: Mesh, stem: str) -> dict[str, bytes]:
    """One vertex per position: a PLY has no uvs, so the seams can be closed."""
    position = same_position(mesh.vertices)
    first = np.unique(position, return_index=True)[1]
    colours = mesh.colours if mesh.texture is None else sample_texture(mesh.texture, mesh.uvs)
    merged = Mesh(mesh.vertices[first], position[mesh.faces].astype(np.int32))
    if colours is not None:
        counts = np.bincount(position)[:, None]
        sums = np.stack([np.bincount(position, weights=channel) for channel in colours.T], axis=1)
        merged = dataclasses.replace(merged, colours=(sums / counts).astype(np.float32))
    return {f"{stem}.ply": trimesh.exchange.ply.export_ply(_trimesh_of(merged, stem), vertex_normal=True)}


def _trimesh_of(mesh: Mesh, name: str, y_up: bool = False) -> trimesh.Trimesh:
    normals = smooth_normals(mesh) if mesh.normals is None else mesh.normals
    turn = z_up_to_y_up if y_up else np.asarray
    visual = None
    if mesh.texture is not None:
        image = Image.fromarray(np.round(np.clip(mesh.texture, 0, 1) * 255).astype(np.uint8))
        visual = trimesh.visual.TextureVisuals(uv=mesh.uvs, material=_matte_material(image, name, pbr=y_up))
    elif mesh.colours is not None:
        colours = srgb_to_linear(mesh.colours) if y_up else mesh.colours
        colours = np.round(np.clip(colours, 0, 1) * 255).astype(np.uint8)
        visual = trimesh.visual.ColorVisuals(vertex_colors=colours)
    return trimesh.Trimesh(
        turn(mesh.vertices), mesh.faces, vertex_normals=turn(normals), visual=visual, process=False, validate=False
    )


def _matte_material(image: Image.Image, name: str, pbr: bool):
    if not pbr:
        return trimesh.visual.material.SimpleMaterial(
            image=image, name=name, ambient=[255] * 4, diffuse=[255] * 4, specular=[0, 0, 0, 255]
        )
    return trimesh.visual.material.PBRMaterial(
        name=name, baseColorTexture=image, metallicFactor=0.0, roughnessFactor=1.0, doubleSided=False
    )
