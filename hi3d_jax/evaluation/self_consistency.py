"""Quality without a ground truth: do disjoint halves of the views describe one object?

A generated back is not the true one and need not be; but views of a real object agree. After the idea of MVGBench
(arXiv 2507.00006), the views are split (even and odd ones), a surface is reconstructed from each half,
and the two are compared with each other: shapes by the `strict` protocol, looks (where the meshes have colours) by
drawing both from halfway between the cameras. It measures views and reconstruction together: the true views of an
object are its floor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hi3d_jax.cameras import between_neighbours
from hi3d_jax.evaluation.pictures import has_colours
from hi3d_jax.evaluation.protocols import strict
from hi3d_jax.evaluation.views import EvaluationError, view_scores
from hi3d_jax.mesh import Mesh, render
from hi3d_jax.video import Orbit

# A half needs views from all around: three see 120 degrees apart.
MIN_HALF = 3
DRAWN_SIZE = 256

Reconstruct = Callable[[Orbit], Mesh]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How near the meshes of the two halves are, by name of metric, and the meshes."""

    scores: dict[str, float]
    meshes: tuple[Mesh, Mesh]


def self_consistency(orbit: Orbit, reconstruct: Reconstruct) -> Agreement:
    """Compares what `reconstruct` makes of the even and of the odd views. Raises `EvaluationError`."""
    if len(orbit) < 2 * MIN_HALF:
        raise EvaluationError(
            f"self-consistency compares halves of {MIN_HALF} views or more; {len(orbit)} views are too few"
        )
    one, other = (reconstruct(orbit[start::2]) for start in (0, 1))
    scores = dataclasses.asdict(strict(one, other))
    if not (has_colours(one) and has_colours(other)):
        return Agreement(scores, (one, other))
    cameras = between_neighbours(orbit.cameras, len(orbit))
    shrink = min(DRAWN_SIZE / max(cameras.width, cameras.height), 1.0)
    cameras = cameras.resized(round(cameras.width * shrink), round(cameras.height * shrink))
    drawn = [render(mesh, cameras).views for mesh in (one, other)]
    looks = view_scores(*drawn)
    return Agreement(scores | {"mesh_psnr": looks.psnr, "mesh_ssim": looks.ssim}, (one, other))
