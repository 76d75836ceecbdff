"""What a reconstruction refuses, and why: input it cannot work with, and numbers that are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from hi3d_jax.cameras import check, nearest_point_to_axes
from hi3d_jax.video import Orbit
from hi3d_jax.visual_hull import VisualHull

MIN_VIEWS = 3
# World units; the object's longest side should be 1.
FARTHEST_CENTRE = 0.25
SMALLEST_OBJECT = 0.15
# Of the cube's six sides, how many the hull may reach: an object that leaves the frame reaches some.
MOST_SIDES_REACHED = 3


class StageError(ValueError):
    """A step that cannot go on; the text begins with its name, then says what is wrong and what to do."""


def check_orbit(orbit: Orbit) -> None:
    """Raises `StageError` or `CameraError` for views, masks or cameras that show no object around the origin."""
    check(orbit.cameras)
    expected = (len(orbit.cameras), orbit.cameras.height, orbit.cameras.width)
    if orbit.views.shape != (*expected, 3) or orbit.alphas.shape != expected:
        raise StageError(
            f"views: {orbit.views.shape} and alphas {orbit.alphas.shape} do not fit {expected[0]} cameras of "
            f"{expected[2]} x {expected[1]} pixels; resize the cameras to the views"
        )
    if len(orbit) < MIN_VIEWS:
        raise StageError(f"views: {len(orbit)} views bound no shape; give {MIN_VIEWS} or more, better 16")
    check_finite("views", orbit)
    for view, alpha in enumerate(orbit.alphas):
        if not (alpha > 0.5).any():
            raise StageError(f"views: the mask of view {view} is empty; cut the object out again or leave the view out")
        if (alpha > 0.5).all():
            raise StageError(f"views: the mask of view {view} fills the picture; cut the object out, with a margin")
    centre = nearest_point_to_axes(orbit.cameras)
    if np.linalg.norm(centre) > FARTHEST_CENTRE:
        raise StageError(
            f"views: the cameras look at ({', '.join(f'{x:.2f}' for x in centre)}), not at the origin; move their "
            "positions so that the object's centre is the origin, and scale them so that its longest side is 1"
        )


def check_hull(hull: VisualHull) -> VisualHull:
    """Returns `hull`, or raises `StageError` where the cameras' scale cannot be right for an object of size 1."""
    inside = hull.sdf < 0
    # The outermost samples are empty by construction.
    reached = sum(bool(side.any()) for axis in range(3) for side in (inside.take(1, axis), inside.take(-2, axis)))
    if reached > MOST_SIDES_REACHED:
        raise StageError(
            f"hull: the masks allow a shape beyond the cube of {hull.upper[0] - hull.lower[0]:g} units around the "
            "origin; scale the cameras' positions down so that the object's longest side is 1 unit, or check radius "
            "and field of view"
        )
    extent = np.ptp(np.argwhere(inside), axis=0).max() * hull.spacing
    if extent < SMALLEST_OBJECT:
        raise StageError(
            f"hull: the object is only {extent:.3f} units long; scale the cameras' positions up so that its longest "
            "side is 1 unit, or check radius, elevation and field of view"
        )
    return hull


def check_finite(name: str, value: Any) -> None:
    """Raises `StageError` where arrays within `value` (dataclasses, tuples, lists, arrays) hold NaN or infinity."""
    for array in _arrays_in(value):
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise StageError(f"{name}: NaN or infinite numbers came out; try another --seed, and report it if it stays")


def _arrays_in(value: Any) -> Iterator[np.ndarray]:
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        for part in value:
            yield from _arrays_in(part)
    elif hasattr(value, "dtype"):
        yield np.asarray(value)
