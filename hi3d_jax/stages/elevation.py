"""From how far above the horizon was the picture taken? Asked of the model itself.

Stage 1 is told an elevation. Told a wrong one, it draws views that do not belong to one object seen from there: no
solid has all their silhouettes at once. So a few orbits are drawn coarsely, each for another elevation, and the one
whose silhouettes their common visual hull fills best is believed.

Measured with true views in place of drawn ones, from 0 and 20 degrees, six candidates 10 degrees apart: with true masks
of 25 objects the true candidate scores best in 48 of 50 cases where all views are from the true elevation, in 47 of 50
where only the input view is. With masks keyed from the views, as a run has them, 27 and 23 of 28 on 14 of the objects;
mean errors 1.4 and 3.4 degrees, the largest 5 and 40 (experiments/benchmarks/elevation.py). Objects that look the same
from all sides, like cans, tell little: the scores, which are kept, are nearly equal then.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from hi3d_jax import visual_hull
from hi3d_jax.atomic import written_aside
from hi3d_jax.cameras import Cameras, pixel_rays
from hi3d_jax.images import resize
from hi3d_jax.stages.background import without_background
from hi3d_jax.stages.checks import StageError
from hi3d_jax.stages.orbit_files import as_orbit, recipe_cameras
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.video import Orbit, OrbitError

# Degrees between candidates.
SPACING_DEG = 10.0
# Of the recipe's sampling steps, what a candidate gets: silhouettes are there long before detail.
STEPS_SHARE, FEWEST_STEPS = 0.3, 4
# The hull and the pixels that it is compared in: fine enough to tell 10 degrees apart, 0.2 seconds each.
MASK_SIZE, HULL_RESOLUTION, SAMPLES = 64, 48, 48

Views = UInt8[np.ndarray, "t s s 3"]


@dataclasses.dataclass(frozen=True)
class ElevationEstimate:
    """The estimate in degrees, and for each candidate how much of the silhouettes agreed, in [0, 1]."""

    elevation_deg: float
    candidates_deg: tuple[float, ...]
    agreements: tuple[float, ...]


def estimate_elevation(
    recipe: Recipe, draw: Callable[[float, int], Views], num_steps: int | None = None, progress: bool = True
) -> ElevationEstimate:
    """The elevation that `draw` (elevation in degrees, sampling steps) -> views of stage 1 fits best.

    Raises `StageError` where no candidate's views show an object.
    """
    candidates = candidate_elevations(recipe)
    steps = max(round(STEPS_SHARE * (num_steps or recipe.num_steps)), FEWEST_STEPS)
    agreements = []
    for candidate in tqdm(candidates, "elevation", unit="candidate", disable=None if progress else True):
        cameras = recipe_cameras(recipe, candidate)
        agreements.append(_agreement_of_views(draw(candidate, steps), cameras))
    if not max(agreements) > 0:
        raise StageError(
            "elevation: the views that were drawn for it show no object, whatever the elevation; give --elevation-deg"
        )
    return ElevationEstimate(_peak(candidates, agreements), tuple(candidates), tuple(agreements))


def candidate_elevations(recipe: Recipe) -> list[float]:
    """Those that the model was trained on, if they are few, or one every 10 degrees of the range it was trained on."""
    if recipe.elevations_deg is not None:
        return [float(elevation) for elevation in recipe.elevations_deg]
    low, high = recipe.elevation_range_deg
    return [float(x) for x in np.linspace(low, high, max(round((high - low) / SPACING_DEG), 1) + 1)]


def _agreement_of_views(views: Views, cameras: Cameras) -> float:
    try:
        return silhouette_agreement(without_background(as_orbit(views, cameras)))
    except OrbitError:
        return 0.0


def silhouette_agreement(views: Orbit) -> float:
    """How much of the masks alpha > 1/2 their common visual hull fills, in [0, 1], as a mean over the views.

    1 where one solid casts all of them. The hull never exceeds a mask (Laurentini 1994), so this is their IoU.
    """
    alphas = np.stack([resize(alpha[..., None], MASK_SIZE, MASK_SIZE)[..., 0] for alpha in views.alphas])
    cameras = views.cameras.resized(MASK_SIZE, MASK_SIZE)
    if not (alphas > 0.5).any((1, 2)).all():
        return 0.0
    try:
        hull = visual_hull.carve(alphas, cameras, HULL_RESOLUTION)
    except visual_hull.EmptyHullError:
        return 0.0
    return float(np.mean([_filled(hull, *view) for view in zip(alphas > 0.5, *pixel_rays(cameras), strict=True)]))


def _filled(
    hull: visual_hull.VisualHull,
    mask: np.ndarray,
    origins: Float[np.ndarray, "h w 3"],
    directions: Float[np.ndarray, "h w 3"],
) -> float:
    """The share of a mask's pixels whose rays meet the hull."""
    middle, half = np.linalg.norm(origins[0, 0]), np.sqrt(3) * visual_hull.HALF_SIDE
    along = np.linspace(middle - half, middle + half, SAMPLES, dtype=np.float32)
    points = origins[mask][:, None] + directions[mask][:, None] * along[:, None]
    distances = hull.sample(points.reshape(-1, 3)).reshape(len(points), SAMPLES)
    return float((distances.min(axis=1) < 0.5 * hull.spacing).mean())


def _peak(candidates: Sequence[float], agreements: Sequence[float]) -> float:
    """Where the parabola through the best candidate and its neighbours is highest, in whole degrees."""
    best = int(np.argmax(agreements))
    if not 0 < best < len(candidates) - 1:
        return candidates[best]
    nearest = slice(best - 1, best + 2)
    a, b, _ = np.polyfit(np.subtract(candidates[nearest], candidates[best]), agreements[nearest], 2)
    return float(round(candidates[best] + (-b / (2 * a) if a < 0 else 0.0)))


def write_estimate(path: Path, estimate: ElevationEstimate) -> None:
    """The estimate as JSON."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(dataclasses.asdict(estimate), indent=1) + "\n")


def read_estimate(path: Path) -> ElevationEstimate:
    """What `write_estimate` wrote. Raises `StageError` for anything else."""
    try:
        fields = json.loads(path.read_text())
        return ElevationEstimate(
            float(fields["elevation_deg"]), tuple(fields["candidates_deg"]), tuple(fields["agreements"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"elevation: {path} is damaged ({error}); delete it and continue with --resume") from error
