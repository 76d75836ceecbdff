"""Triangles: from a signed-distance function to a textured mesh file, and pictures of it (paper section 4.4)."""

from hi3d_jax.mesh.files import read_mesh, write_mesh
from hi3d_jax.mesh.rays import RayCaster
from hi3d_jax.mesh.render import Renders, depth_maps, render
from hi3d_jax.mesh.triangles import Mesh, MeshError, check_mesh, creased_normals, smooth_normals

__all__ = [
    "Mesh",
    "MeshError",
    "RayCaster",
    "Renders",
    "check_mesh",
    "creased_normals",
    "depth_maps",
    "read_mesh",
    "render",
    "smooth_normals",
    "write_mesh",
]
