"""One result against its truth: what is read, brought to one size, compared and drawn.

The functions here take what other parts of the package do as functions: `load_object` (an object file, normalised),
`reconstruct` (an orbit's mesh) and `upscale` (larger views), so that evaluation stays below the data and the stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from hi3d_jax import cameras as camera_files
from hi3d_jax import video
from hi3d_jax.cameras import Cameras
from hi3d_jax.evaluation.importers import Views, read_views
from hi3d_jax.evaluation.pictures import compare_meshes, compare_views
from hi3d_jax.evaluation.protocols import MESH_PROTOCOLS, check_frame
from hi3d_jax.evaluation.results import MESH_SUFFIXES, Result
from hi3d_jax.evaluation.self_consistency import Reconstruct, self_consistency
from hi3d_jax.evaluation.tables import Row
from hi3d_jax.evaluation.views import WITHOUT_FIRST, EvaluationError, Metric, psnr, view_scores
from hi3d_jax.images import resize
from hi3d_jax.mesh import Mesh, is_watertight, read_mesh, render

ProtocolName = Literal["syncdreamer", "strict", "self-consistency"]
# Views that fit the truth so much better in the other order were made the other way round.
REVERSED_GAIN_DB = 1.0


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How results are scored.

    `size`: views are compared at this many pixels each way, larger ones reduced to it by area means; None: as they are.
    Object files as truths are drawn by the cameras beside the views, else from `elevation_deg`, `radius`, `fov_deg`.
    `metrics` are those beside PSNR and SSIM. `upscale` enlarges views that are smaller than `size`; without it they are
    refused. `load_object`, `reconstruct` and `upscale`: see the head of this file.
    """

    protocol: ProtocolName
    load_object: Callable[[Path], Mesh]
    reconstruct: Reconstruct
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    upscale: Callable[[np.ndarray, int], np.ndarray] | None = None
    layout: str = "hi3d"
    reverse: bool = False
    size: int | None = None
    elevation_deg: float = 30.0
    radius: float = camera_files.ORBIT_RADIUS
    fov_deg: float = camera_files.ORBIT_FOV_DEG
    light: Literal["unlit", "soft"] = "unlit"


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row of the table, and pictures of what was compared by name."""

    row: Row
    pictures: Mapping[str, Float[np.ndarray, "_ _ 3"]] = dataclasses.field(default_factory=dict)


def score_views(result: Result, scoring: Scoring) -> Scored:
    """The views of one result. Raises what reading and comparing raise."""
    found = read_views(result.path, scoring.layout, scoring.reverse)
    if scoring.protocol == "self-consistency":
        return _agreement(result, _cut_out(found, scoring), scoring)
    views = found.views
    if scoring.upscale is not None and scoring.size is not None and views.shape[2] < scoring.size:
        views = scoring.upscale(views, scoring.size)
    views = to_size(views, scoring.size, "the views")
    truth = true_views(result.truth, found, scoring, views.shape[2])
    means = view_scores(views, truth, scoring.metrics).means()
    if scoring.protocol == "strict":
        means = {name.removesuffix(WITHOUT_FIRST): means[name] for name in means if name.endswith(WITHOUT_FIRST)}
    row = Row(result.object_name, result.seed, means, _direction(views, truth))
    return Scored(row, {"views": compare_views(views, truth)})


def score_mesh(result: Result, scoring: Scoring) -> Scored:
    """The mesh of one result. Raises what reading and comparing raise."""
    mesh, truth = read_mesh(result.path), scoring.load_object(result.truth)
    notes = check_frame(mesh, truth)
    scores = dataclasses.asdict(MESH_PROTOCOLS[scoring.protocol](mesh, truth))
    return Scored(
        Row(result.object_name, result.seed, scores, notes), {"mesh": compare_meshes({"mesh": mesh, "truth": truth})}
    )


def score_asset(result: Result, scoring: Scoring) -> Scored:
    """A run's folder: its mesh against its own views, is it closed; and views and mesh against a truth, if any."""
    mesh = read_mesh(result.path / "mesh.glb")
    own = video.read_orbit(result.path)
    scores, notes, pictures = {}, (), {}
    if scoring.protocol == "self-consistency":
        parts = [_agreement(result, own, scoring)]
    elif result.truth is not None:
        parts = [score_views(result, dataclasses.replace(scoring, layout="hi3d"))]
        if result.truth.suffix.lower() in MESH_SUFFIXES:
            parts.append(score_mesh(result._replace(path=result.path / "mesh.glb"), scoring))
    else:
        parts, pictures = [], {"mesh": compare_meshes({"mesh": mesh})}
    for part in parts:
        scores |= part.row.scores
        notes += part.row.notes
        pictures |= part.pictures
    if scoring.protocol != "self-consistency":
        scores |= _against_own_views(mesh, own)
    scores["watertight"] = float(is_watertight(mesh))
    return Scored(Row(result.object_name, result.seed, scores, notes), pictures)


def _against_own_views(mesh: Mesh, orbit: video.Orbit) -> dict[str, float]:
    drawn = render(mesh, orbit.cameras)
    scores = view_scores(drawn.views, orbit.views)
    one, other = drawn.alphas > 0.5, orbit.alphas > 0.5
    iou = (one & other).sum((1, 2)) / np.maximum((one | other).sum((1, 2)), 1)
    return {"mesh_psnr": scores.psnr, "mesh_ssim": scores.ssim, "silhouette_iou": float(iou.mean())}


def _agreement(result: Result, orbit: video.Orbit, scoring: Scoring) -> Scored:
    agreement = self_consistency(orbit, scoring.reconstruct)
    row = Row(result.object_name, result.seed, agreement.scores)
    return Scored(
        row, {"halves": compare_meshes(dict(zip(("even views", "odd views"), agreement.meshes, strict=True)))}
    )


def _cut_out(found: Views, scoring: Scoring) -> video.Orbit:
    """The views with masks and cameras, as a reconstruction wants them."""
    frames = np.concatenate([found.views, np.ones((*found.views.shape[:3], 1), np.float32)], axis=-1)
    return video.cut_out(frames, _cameras(found, scoring, *found.views.shape[2:0:-1]))


def _cameras(found: Views, scoring: Scoring, width: int, height: int) -> Cameras:
    if found.cameras is not None:
        return found.cameras.resized(width, height)
    angles = found.azimuths_deg, scoring.elevation_deg, scoring.radius, scoring.fov_deg
    return camera_files.orbit(*angles, width, height)


def true_views(truth: Path, found: Views, scoring: Scoring, width: int) -> Float[np.ndarray, "t h w 3"]:
    """The true views of an orbit's folder, or an object file drawn from where the views were taken."""
    if truth.suffix.lower() not in MESH_SUFFIXES:
        return to_size(read_views(truth).views, scoring.size, "the true views")
    height = round(width * found.views.shape[1] / found.views.shape[2])
    cameras = _cameras(found, scoring, width, height)
    return render(scoring.load_object(truth), cameras, light=scoring.light, supersample=3).views


def to_size(views: Float[np.ndarray, "t h w 3"], size: int | None, what: str) -> Float[np.ndarray, "t h2 w2 3"]:
    """Views reduced by area means to `size` pixels across. Raises `EvaluationError` where they would have to grow."""
    height, width = views.shape[1:3]
    if size is None or width == size:
        return views
    if width < size:
        raise EvaluationError(
            f"{what} are {width} x {height} pixels, fewer than the {size} at which the protocol compares; resize the "
            f"others to {width} (--size {width}), since what is enlarged shows less than it was"
        )
    return np.stack([resize(view, size, round(height * size / width)) for view in views])


def _direction(views: Float[np.ndarray, "t h w 3"], truth: Float[np.ndarray, "t h w 3"]) -> tuple[str, ...]:
    """Says so where the views fit the truth better the other way round."""
    backward = views[np.r_[0, np.arange(len(views) - 1, 0, -1)]]
    given, turned = (
        np.mean([psnr(a, b) for a, b in zip(order[1:], truth[1:], strict=True)]) for order in (views, backward)
    )
    if turned < given + REVERSED_GAIN_DB:
        return ()
    return (f"in reverse order the views come {turned - given:.1f} dB nearer to the truth: are they clockwise?",)
