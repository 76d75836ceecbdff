"""Triangles: from a signed-distance function to a textured mesh file, and pictures of it (paper section 4.4)."""

from hi3d_jax.mesh.files import read_mesh, write_mesh
from hi3d_jax.mesh.rays import RayCaster
from hi3d_jax.mesh.render import Renders, depth_maps, render
from hi3d_jax.mesh.simplify import decimate
from hi3d_jax.mesh.smoothing import smooth
from hi3d_jax.mesh.surface import extract_surface
from hi3d_jax.mesh.texture import bake_texture, paint_texture
from hi3d_jax.mesh.topology import MeshReport, clean, is_watertight, mesh_report
from hi3d_jax.mesh.triangles import Mesh, MeshError, check_mesh, creased_normals, face_normals, smooth_normals
from hi3d_jax.mesh.unseen import flatten_unseen, seen_vertices
from hi3d_jax.mesh.unwrap import unwrap

__all__ = [
    "Mesh",
    "MeshError",
    "MeshReport",
    "RayCaster",
    "Renders",
    "bake_texture",
    "check_mesh",
    "clean",
    "creased_normals",
    "decimate",
    "depth_maps",
    "extract_surface",
    "face_normals",
    "flatten_unseen",
    "is_watertight",
    "mesh_report",
    "paint_texture",
    "read_mesh",
    "render",
    "seen_vertices",
    "smooth",
    "smooth_normals",
    "unwrap",
    "write_mesh",
]
