"""Charts: every face gets a place of its own on a square texture.

xatlas makes the charts, in a process that is ended when its time is over; then a simpler unwrapping takes over whose
time is bounded: faces that look along the same axis and hang together are projected along it and packed in rows.
"""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from hi3d_jax.mesh import xatlas_process
from hi3d_jax.mesh.topology import component_of_faces
from hi3d_jax.mesh.triangles import Mesh, MeshError, check_mesh, face_normals, same_position

log = logging.getLogger(__name__)

# Faces that xatlas takes at a time: 10k take 1.4 CPU seconds, 50k at once take 22.
PIECE_FACES = 6000
TEXTURE_SIZES = (64, 8192)


def unwrap(mesh: Mesh, texture_size: int = 1024, time_limit_s: float = 60.0) -> Mesh:
    """`mesh` with `uvs` in [0, 1] for a texture of `texture_size` squared; vertices are split along the seams.

    Neighbouring charts stay `texture_size` / 128 texels apart. When xatlas needs more than `time_limit_s` seconds or
    fails, a warning is logged and the mesh is unwrapped by projection along the axes.
    """
    check_mesh(mesh)
    if not TEXTURE_SIZES[0] <= texture_size <= TEXTURE_SIZES[1]:
        raise MeshError(f"texture size {texture_size} is outside {TEXTURE_SIZES}; 1024 or 2048 suit most objects")
    mesh = Mesh(mesh.vertices, mesh.faces)
    padding = max(4, texture_size // 128)
    try:
        return _xatlas_unwrap(mesh, texture_size, padding, time_limit_s)
    except subprocess.TimeoutExpired:
        problem = f"needs more than {time_limit_s:g} s for {len(mesh.faces)} faces"
    except subprocess.CalledProcessError as error:
        problem = f"failed ({error.stderr.decode(errors='replace').strip().splitlines()[-1:]})"
    log.warning("xatlas %s; unwrapping by projection instead (fewer faces, or more time, give neater charts)", problem)
    return project_unwrap(mesh, texture_size, padding)


def _xatlas_unwrap(mesh: Mesh, texture_size: int, padding: int, time_limit_s: float) -> Mesh:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "in.npz", Path(folder) / "out.npz"
        piece = pieces_of_faces(mesh, PIECE_FACES)
        np.savez(given, vertices=mesh.vertices, faces=mesh.faces, piece=piece, resolution=texture_size, padding=padding)
        # -P: the package's own folder must not come before numpy's modules.
        command = [sys.executable, "-P", xatlas_process.__file__, str(given), str(made)]
        subprocess.run(command, timeout=time_limit_s, check=True, capture_output=True)
        with np.load(made) as result:
            origin, uvs, faces = result["origin"], result["uvs"], result["faces"]
    return Mesh(mesh.vertices[origin], faces.astype(np.int32), uvs=np.clip(uvs, 0, 1).astype(np.float32))


def pieces_of_faces(mesh: Mesh, most: int) -> Int[np.ndarray, " f"]:
    """The number of each face's piece: faces are halved across their longest extent until no piece exceeds `most`."""
    centres = mesh.triangles.mean(axis=1)
    piece = np.zeros(len(centres), np.int64)
    waiting, number = [np.arange(len(centres))], 0
    while waiting:
        members = waiting.pop()
        if len(members) <= most:
            piece[members] = number
            number += 1
            continue
        axis = np.ptp(centres[members], axis=0).argmax()
        order = members[np.argsort(centres[members, axis], kind="stable")]
        waiting += [order[: len(order) // 2], order[len(order) // 2 :]]
    return piece


def project_unwrap(mesh: Mesh, texture_size: int, padding: int) -> Mesh:
    """Unwraps by projection along the six axis directions; takes about a second for 100k faces.

    Where a chart lies over itself along its axis, its layers share their texels.
    """
    normals, _ = face_normals(mesh)
    axis = np.abs(normals).argmax(axis=1)
    side = np.take_along_axis(normals, axis[:, None], axis=1)[:, 0] >= 0
    chart = _charts(mesh, axis * 2 + side)
    keys = np.stack([np.repeat(chart, 3), mesh.faces.reshape(-1)], axis=1)
    wedge, faces = np.unique(keys, axis=0, return_inverse=True)
    axis_of_chart = np.zeros(int(chart.max()) + 1, np.int64)
    axis_of_chart[chart] = axis
    across = np.array([[1, 2], [0, 2], [0, 1]])[axis_of_chart[wedge[:, 0]]]
    flat = np.take_along_axis(mesh.vertices[wedge[:, 1]].astype(np.float64), across, axis=1)
    low = np.full((len(axis_of_chart), 2), np.inf)
    high = np.full((len(axis_of_chart), 2), -np.inf)
    np.minimum.at(low, wedge[:, 0], flat)
    np.maximum.at(high, wedge[:, 0], flat)
    corner, scale = _pack_rows(high - low, texture_size, padding)
    texels = (flat - low[wedge[:, 0]]) * scale + corner[wedge[:, 0]]
    uvs = (texels / texture_size).astype(np.float32)
    return dataclasses.replace(
        mesh, vertices=mesh.vertices[wedge[:, 1]], faces=faces.reshape(-1, 3).astype(np.int32), uvs=uvs
    )


def _charts(mesh: Mesh, direction: Int[np.ndarray, " f"]) -> Int[np.ndarray, " f"]:
    """Connected faces of one direction; joining by edges, as if faces of different directions shared none."""
    faces = same_position(mesh.vertices)[mesh.faces]
    return component_of_faces(faces + (direction * (int(faces.max()) + 1))[:, None])


def _pack_rows(
    sizes: Float[np.ndarray, "n 2"], texture_size: int, padding: int
) -> tuple[Float[np.ndarray, "n 2"], float]:
    """Lower left corners in texels, and texels per unit, of rectangles set in rows, highest first; as large as fits."""
    order = np.argsort(-sizes[:, 1], kind="stable")
    scale = texture_size / max(np.sqrt(sizes.prod(axis=1).sum()), 1e-12)
    while True:
        corners, height = _rows(sizes[order] * scale, texture_size, padding)
        if height <= texture_size:
            placed = np.empty_like(corners)
            placed[order] = corners
            return placed, float(scale)
        scale *= 0.95
        if scale * sizes.max() < 1:
            raise MeshError(f"{len(sizes)} charts do not fit a texture of {texture_size}; use a larger one")


def _rows(sizes: Float[np.ndarray, "n 2"], width: int, padding: int) -> tuple[Float[np.ndarray, "n 2"], float]:
    corners = np.zeros_like(sizes)
    x, y, row = float(padding), float(padding), 0.0
    for number, (across, up) in enumerate(sizes.tolist()):
        if x + across + padding > width and x > padding:
            x, y, row = float(padding), y + row + padding, 0.0
        if across + 2 * padding > width:
            return corners, np.inf
        corners[number] = x, y
        x, row = x + across + padding, max(row, up)
    return corners, y + row + padding
