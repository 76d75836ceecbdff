"""Named ways to compare a mesh with the true one, so that a number says how it came about.

`syncdreamer` is the benchmark of SyncDreamer that Hi3D follows: what 16 cameras see, so nothing below or inside, on a
coarse grid whose zero misleads (the same pixels are sampled twice). `strict` looks at the whole surface at fine scales.
No protocol moves, turns or scales a mesh: the truth is centred with its longest side 1, and the other is in its frame;
`check_frame` says so where it is not. `floors` tells what a protocol says of the truth itself, and of the truth shifted
by half a thousandth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float

from hi3d_jax.cameras import Cameras, orbit
from hi3d_jax.evaluation.occupancy import parity_inside, winding_inside
from hi3d_jax.evaluation.surfaces import (
    f_score,
    nearest_distances,
    sample_surface,
    visible_points,
    volume_iou,
    voxel_downsample,
)
from hi3d_jax.evaluation.views import EvaluationError
from hi3d_jax.mesh import Mesh, check_mesh, mesh_report

VOXEL_SIZE = 0.01
IOU_RESOLUTION = 64
STRICT_POINTS = 50_000
STRICT_RESOLUTION = 128
FLOOR_SHIFT = 5e-4
# A mesh this many times larger or smaller than the truth is in another unit.
MAX_SIZE_RATIO = 3.0

Scores = TypeVar("Scores")


@dataclasses.dataclass(frozen=True)
class SyncdreamerScores:
    """`chamfer`: mean of the two mean nearest distances, not squared; `iou`: of the volumes."""

    chamfer: float
    iou: float


@dataclasses.dataclass(frozen=True)
class StrictScores:
    """`chamfer`: mean of the two mean nearest distances; F-scores at .01 and .02; `normals`: mean |cosine|; `iou`."""

    chamfer: float
    f_score_01: float
    f_score_02: float
    normal_consistency: float
    iou: float


def syncdreamer_cameras() -> Cameras:
    """The benchmark's 16 cameras: 256 x 256 pixels, focal length 280, elevation 30 degrees, distance 1.5."""
    return orbit(elevation_deg=30.0, width=256)


def syncdreamer(mesh: Mesh, truth: Mesh) -> SyncdreamerScores:
    """As SyncDreamer's eval_mesh.py: back-projected depth maps, one point per .01 voxel; IoU of mesh2sdf's signs.

    The signs are those of a 64^3 lattice over [-1, 1]^3, computed here without that package, which needs a compiler.
    Raises `EvaluationError` for a mesh that the cameras do not see.
    """
    clouds = [voxel_downsample(_seen(m), VOXEL_SIZE) for m in (check_mesh(mesh), check_mesh(truth))]
    there, back = nearest_distances(*clouds)[0], nearest_distances(*clouds[::-1])[0]
    chamfer = float(there.mean() + back.mean()) / 2
    lattice = np.full(3, -1.0), 2 / IOU_RESOLUTION, IOU_RESOLUTION
    return SyncdreamerScores(chamfer, volume_iou(parity_inside(mesh, *lattice), parity_inside(truth, *lattice)))


def strict(mesh: Mesh, truth: Mesh, seed: int = 0) -> StrictScores:
    """50,000 points spread evenly over each surface; volumes by winding numbers at 128^3 over a cube around both."""
    points, normals = sample_surface(check_mesh(mesh), STRICT_POINTS, seed)
    true_points, true_normals = sample_surface(check_mesh(truth), STRICT_POINTS, seed + 1)
    there, nearest_true = nearest_distances(points, true_points)
    back, nearest = nearest_distances(true_points, points)
    consistency = [
        np.abs((normals * true_normals[nearest_true]).sum(axis=1)).mean(),
        np.abs((true_normals * normals[nearest]).sum(axis=1)).mean(),
    ]
    return StrictScores(
        chamfer=float(there.mean() + back.mean()) / 2,
        f_score_01=f_score(there, back, 0.01),
        f_score_02=f_score(there, back, 0.02),
        normal_consistency=float(np.mean(consistency)),
        iou=volume_iou(*_strict_insides(mesh, truth)),
    )


MESH_PROTOCOLS: dict[str, Callable[[Mesh, Mesh], SyncdreamerScores | StrictScores]] = {
    "syncdreamer": syncdreamer,
    "strict": strict,
}


def floors(protocol: Callable[[Mesh, Mesh], Scores], truth: Mesh) -> tuple[Scores, Scores]:
    """What `protocol` says of the truth against itself, and against itself moved by .0005 along the diagonal."""
    return protocol(truth, truth), protocol(moved(truth), truth)


def moved(mesh: Mesh) -> Mesh:
    """`mesh`, moved by `FLOOR_SHIFT` along the diagonal."""
    return dataclasses.replace(mesh, vertices=mesh.vertices + np.float32(FLOOR_SHIFT / 3**0.5))


def check_frame(mesh: Mesh, truth: Mesh) -> tuple[str, ...]:
    """What a reader of the scores has to know of the mesh: open, inside out. Raises `EvaluationError`, `MeshError`.

    An error is a mesh that is elsewhere than the truth or in another unit, and a truth that is not normalised: scores
    would be numbers without meaning.
    """
    boxes = [_box(check_mesh(m)) for m in (mesh, truth)]
    (low, high), (true_low, true_high) = boxes
    said = f"the mesh fills {_written(low, high)}, the truth {_written(true_low, true_high)}"
    side, true_side = float((high - low).max()), float((true_high - true_low).max())
    if abs(true_side - 1) > 0.01 or np.abs(true_low + true_high).max() > 0.02:
        raise EvaluationError(f"the truth is not centred with its longest side 1: {said}; normalise it")
    if not 1 / MAX_SIZE_RATIO < side / true_side < MAX_SIZE_RATIO:
        raise EvaluationError(f"the mesh is in another unit: {said}; scale it to the truth's frame")
    if (low > true_high).any() or (high < true_low).any():
        raise EvaluationError(f"the mesh lies elsewhere: {said}; move it to the truth's frame")
    report = mesh_report(mesh)
    notes = [] if report.watertight else ["not watertight: its inside is decided by winding numbers or parity"]
    if report.volume < 0:
        notes.append("inside out: its faces run clockwise seen from outside")
    return tuple(notes)


def _box(mesh: Mesh):
    used = mesh.vertices[mesh.faces].reshape(-1, 3).astype(np.float64)
    return used.min(axis=0), used.max(axis=0)


def _written(low, high) -> str:
    return " x ".join(f"[{a:.3g}, {b:.3g}]" for a, b in zip(low, high, strict=True))


def _seen(mesh: Mesh) -> Float[np.ndarray, "n 3"]:
    points = visible_points(mesh, syncdreamer_cameras())
    if len(points) == 0:
        raise EvaluationError("no camera of the protocol sees the mesh; centre it and scale its longest side to 1")
    return points


def _strict_insides(mesh: Mesh, truth: Mesh) -> list[Bool[np.ndarray, "r r r"]]:
    """Both meshes on one grid: a cube around both, with a margin of one cell."""
    used = np.concatenate([m.vertices[m.faces].reshape(-1, 3) for m in (mesh, truth)]).astype(np.float64)
    low, high = used.min(axis=0), used.max(axis=0)
    spacing = float((high - low).max() / (STRICT_RESOLUTION - 2))
    first = (low + high - spacing * (STRICT_RESOLUTION - 1)) / 2
    return [winding_inside(m, first, spacing, STRICT_RESOLUTION) for m in (mesh, truth)]
