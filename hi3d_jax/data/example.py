"""A toy rocket, made of formulas: something to reconstruct where no object file is at hand.

It is one closed body with what makes reconstruction hard or easy to judge: fins with deep angles between them, a hollow
nozzle, thin rings, plain and busy colours, a front (the yellow hatch, at azimuth 0) that differs from the back.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator

from hi3d_jax.data.render import normalise
from hi3d_jax.mesh import Mesh, decimate, extract_surface, paint_texture, unwrap

CREAM, RED, NAVY, ORANGE = (0.93, 0.89, 0.78), (0.80, 0.16, 0.13), (0.13, 0.20, 0.42), (0.93, 0.52, 0.12)
YELLOW, SKY, STEEL, TEAL = (0.97, 0.80, 0.22), (0.45, 0.74, 0.88), (0.55, 0.57, 0.60), (0.16, 0.55, 0.52)

# The rocket stands on z from -0.5 to 0.5; the hull's radius at these heights, smoothly joined.
HEIGHTS = np.array([-0.36, -0.30, -0.15, 0.05, 0.20, 0.33, 0.43, 0.475, 0.492, 0.498])
RADII = np.array([0.090, 0.118, 0.160, 0.175, 0.163, 0.120, 0.066, 0.034, 0.015, 0.0])
# Monotone between its points, so that the hull has no bulges of its own.
PROFILE = PchipInterpolator(HEIGHTS, RADII)
NUM_FINS = 4
# Azimuth and height of the round windows on the hull's sides.
WINDOWS = ((np.radians(100), 0.10), (np.radians(260), 0.10))
HATCH_HEIGHT = 0.12


def example_mesh(num_faces: int = 12_000, texture_size: int = 1024, resolution: int = 192) -> Mesh:
    """The textured rocket: watertight, one body, longest side 1, centred."""
    bound = np.full(3, 0.54)
    body = decimate(extract_surface(rocket_distance, -bound, bound, resolution), num_faces)
    return normalise(paint_texture(unwrap(body, texture_size), rocket_colour, texture_size))


def rocket_distance(points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
    """A signed distance, negative inside; its zero is exact, its slope about 1."""
    radius, azimuth, height = _cylindrical(points)
    hull = np.maximum(radius - _hull_radius(height), np.abs(height - 0.069) - 0.4295) * 0.9
    solid = _smooth_union(hull, _fins(radius, azimuth, height), 0.02)
    bell = np.maximum(np.abs(radius - (0.052 - 0.28 * (height + 0.36))) - 0.014, np.abs(height + 0.40) - 0.075)
    solid = _smooth_union(solid, bell, 0.012)
    for at in (-0.285, 0.235):
        solid = _smooth_union(solid, np.hypot(radius - _hull_radius(np.full(1, at)), height - at) - 0.013, 0.008)
    for window_azimuth, window_height in WINDOWS:
        solid = _smooth_union(solid, _rim(points, window_azimuth, window_height, 0.060), 0.006)
    return _smooth_union(solid, _rim(points, 0.0, HATCH_HEIGHT, 0.085), 0.006).astype(np.float32)


def rocket_colour(points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """sRGB in [0, 1] of points on the surface."""
    radius, azimuth, height = _cylindrical(points)
    outside = radius - _hull_radius(height)
    colour = np.empty((len(points), 3))
    colour[:] = CREAM
    checks = (np.floor(azimuth / (np.pi / 12)) + np.floor(height / 0.04)) % 2 < 1
    _paint(colour, NAVY, (height > -0.20) & (height < -0.04) & checks)
    _paint(colour, TEAL, np.abs(height + 0.02 + 0.012 * np.sin(8 * azimuth)) < 0.012)
    _paint(colour, RED, height > 0.235)
    _paint(colour, CREAM, (height > 0.30) & (np.sin(5 * azimuth + 60 * height) > 0.55))
    _paint(colour, STEEL, (np.abs(height + 0.285) < 0.016) | (np.abs(height - 0.235) < 0.016))
    for number, (window_azimuth, window_height) in enumerate(WINDOWS):
        gap = _distance_on_hull(points, window_azimuth, window_height)
        _paint(colour, STEEL, gap < 0.074)
        _paint(colour, SKY if number == 0 else TEAL, gap < 0.048)
    gap = _distance_on_hull(points, 0.0, HATCH_HEIGHT)
    _paint(colour, NAVY, gap < 0.100)
    _paint(colour, YELLOW, gap < 0.072)
    turn = np.arctan2(points[:, 2] - HATCH_HEIGHT, points[:, 1])
    _paint(colour, RED, gap < 0.030 + 0.016 * np.cos(5 * (turn - np.pi / 2)))
    fin = (outside > 0.018) & (height < -0.06) & (radius > 0.1)
    number = np.round(azimuth / (2 * np.pi / NUM_FINS) - 0.5).astype(int) % NUM_FINS
    for k, tint in enumerate((ORANGE, RED, ORANGE, TEAL)):
        _paint(colour, tint, fin & (number == k))
    _paint(colour, CREAM, fin & (np.abs(radius - 0.27) < 0.014))
    _paint(colour, STEEL, (height < -0.365) & (radius < 0.12))
    grain = 0.03 * np.sin(90 * points[:, 0] + 40 * points[:, 2]) * np.sin(70 * points[:, 1] - 30 * points[:, 2])
    return np.clip(colour + grain[:, None], 0, 1).astype(np.float32)


def _cylindrical(points):
    points = points.astype(np.float64)
    return np.hypot(points[:, 0], points[:, 1]), np.arctan2(points[:, 1], points[:, 0]), points[:, 2]


def _hull_radius(height):
    return PROFILE(np.clip(height, HEIGHTS[0], HEIGHTS[-1]))


def _fins(radius, azimuth, height):
    """Swept-back plates with rounded edges, between the windows' azimuths."""
    sector = 2 * np.pi / NUM_FINS
    local = (azimuth % sector) - sector / 2
    outward, sideways = radius * np.cos(local), radius * np.sin(local)
    leading = (height - (0.02 - 1.15 * (outward - 0.12))) * 0.66
    trailing = ((-0.44 - 0.55 * (outward - 0.30)) - height) * 0.87
    plate = np.maximum.reduce([leading, trailing, outward - 0.36, 0.06 - outward])
    return np.hypot(np.maximum(plate, 0), sideways) - 0.014


def _rim(points, azimuth, height, size):
    """A ring that lies on the hull around (azimuth, height)."""
    radius, _, at = _cylindrical(points)
    gap = _distance_on_hull(points, azimuth, height)
    return np.hypot(gap - size, radius - _hull_radius(at)) - 0.013


def _distance_on_hull(points, azimuth, height):
    """Distance from the hull's axis-normal at (azimuth, height), seen along it; large on the far side."""
    along = points[:, 0] * np.cos(azimuth) + points[:, 1] * np.sin(azimuth)
    across = points[:, 1] * np.cos(azimuth) - points[:, 0] * np.sin(azimuth)
    return np.where(along > 0, np.hypot(across, points[:, 2] - height), 9.0)


def _smooth_union(one, other, blend):
    """The union of two distances, rounded over `blend` where they meet."""
    part = np.maximum(blend - np.abs(one - other), 0) / blend
    return np.minimum(one, other) - part * part * blend / 4


def _paint(colour, tint, where):
    colour[where] = tint
