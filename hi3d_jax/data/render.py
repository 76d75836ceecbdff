"""Ground truth from 3D assets: an object file becomes an orbit of pictures, masks, depths and normals.

The object is centred and scaled so that the longest side of its bounding box is 1, as SyncDreamer, Hi3D and the
evaluation do. A written orbit is a folder that `hi3d reconstruct` accepts: `views/000.png` (RGBA, straight alpha),
`cameras.json` (nerfstudio's transforms.json fields), and `depths/000.png` (16 bit).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hi3d_jax import video
from hi3d_jax.atomic import written_aside
from hi3d_jax.cameras import ORBIT_FOV_DEG, ORBIT_RADIUS, Cameras, orbit
from hi3d_jax.mesh import Mesh, MeshError, Renders, face_normals, read_mesh, render

# Depth files hold units of 1/10000 of the object's longest side; 0 is empty.
DEPTH_UNITS = 10_000
MIN_AREA = 1e-12


def load_object(path: str | Path) -> Mesh:
    """Reads a GLB, glTF, OBJ or PLY and normalises it. Raises `MeshError` for a file that shows nothing."""
    return normalise(read_mesh(path))


def normalise(mesh: Mesh) -> Mesh:
    """`mesh` with its bounding box centred on the origin and its longest side 1; faces without area are dropped.

    Raises `MeshError` when no face has an area.
    """
    used = mesh.vertices[mesh.faces].reshape(-1, 3).astype(np.float64)
    low, high = used.min(axis=0), used.max(axis=0)
    longest = (high - low).max()
    if not longest > 0:
        raise MeshError("all faces of the object lie in one point; export it again")
    vertices = ((mesh.vertices - (low + high) / 2) / longest).astype(np.float32)
    scaled = dataclasses.replace(mesh, vertices=vertices)
    areas = face_normals(scaled)[1]
    if not (areas > MIN_AREA).any():
        raise MeshError(f"none of the object's {len(areas)} faces has an area; export it as triangles with a surface")
    return dataclasses.replace(scaled, faces=scaled.faces[areas > MIN_AREA])


def render_orbit(
    mesh: Mesh,
    *,
    azimuths_deg: Sequence[float] | None = None,
    elevation_deg: float | Sequence[float] = 20.0,
    radius: float = ORBIT_RADIUS,
    fov_deg: float = ORBIT_FOV_DEG,
    width: int = 512,
    light: str = "soft",
    supersample: int = 3,
) -> tuple[Renders, Cameras]:
    """Square pictures of `mesh` from an orbit (without `azimuths_deg`, the paper's 16 views), and their cameras."""
    cameras = orbit(azimuths_deg, elevation_deg, radius, fov_deg, width)
    return render(mesh, cameras, light=light, supersample=supersample), cameras


def write_orbit(folder: str | Path, renders: Renders, cameras: Cameras) -> None:
    """Writes pictures, cameras and depths as the folder that the head of this file describes, over existing files."""
    depths = Path(folder) / "depths"
    depths.mkdir(parents=True, exist_ok=True)
    for view, depth in enumerate(renders.depths):
        _write_depth(depths / f"{view:03d}.png", depth)
    # Last, because its cameras.json says that the folder is complete.
    video.write_orbit(folder, video.Orbit(renders.views, renders.alphas, cameras))


def _write_depth(path: Path, depth) -> None:
    units = np.where(np.isfinite(depth), np.clip(np.round(depth * DEPTH_UNITS), 1, 65535), 0).astype(np.uint16)
    with written_aside(path) as aside:
        Image.fromarray(units).save(aside, format="PNG")
