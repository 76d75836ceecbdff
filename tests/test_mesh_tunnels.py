"""Tunnels are closed where nobody looks through them, and nothing else changes."""

import numpy as np
import pytest

from hi3d_jax import mesh
from hi3d_jax.mesh.tunnels import close_tunnels

CELL = 0.02


def block(*holes):
    """Signed distances of a cube with round holes: each (axis, other two coordinates, radius)."""
    axis = (np.arange(60) - 29.5) * CELL
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    sdf = np.abs(points).max(axis=0) - 0.4
    for along, first, second, radius in holes:
        a, b = (points[i] for i in range(3) if i != along)
        sdf = np.maximum(sdf, radius - np.hypot(a - first, b - second))
    return sdf.astype(np.float32)


def genus(values):
    lower = np.full(3, -29.5 * CELL)

    def sdf(points):
        return values[tuple(np.clip(np.round((points - lower) / CELL).astype(int), 0, 59).T)]

    return mesh.mesh_report(mesh.extract_surface(sdf, lower, -lower, 59)).genus


def everywhere(index):
    return np.ones(len(index), bool)


def test_a_tunnel_is_plugged_with_little_matter():
    values = block((0, 0.1, 0.05, 0.05), (2, -0.2, -0.2, 0.07))
    assert genus(values) == 2
    closed, changed = close_tunnels(values, CELL, everywhere)
    assert genus(closed) == 0
    np.testing.assert_array_equal(closed[~changed], values[~changed])
    assert (closed <= values).all()
    # Not more than the tunnels hold.
    assert 0 < ((closed < 0) & (values >= 0)).sum() * CELL**3 < 1.3 * 0.8 * np.pi * (0.05**2 + 0.07**2)


def test_where_views_look_through_the_hole_stays():
    values = block((0, 0.1, 0.05, 0.05), (2, -0.2, -0.2, 0.07))

    def not_along_z(index):
        x, y = (index[:, :2].T - 29.5) * CELL
        return np.hypot(x + 0.2, y + 0.2) > 0.09

    closed, _ = close_tunnels(values, CELL, not_along_z)
    assert genus(closed) == 1


@pytest.mark.parametrize("values", [block(), block((0, 0.0, 0.0, 0.25)), np.maximum(block(), -block((2, 0, 0, 0.39)))])
def test_a_block_a_wide_hole_and_a_shape_without_tunnels_stay_as_they_are(values):
    closed, changed = close_tunnels(values, CELL, everywhere)
    assert not changed.any()
    np.testing.assert_array_equal(closed, values)


def test_a_pit_stays_open():
    values = block((0, 0.1, 0.05, 0.05))
    values[:30] = np.minimum(values[:30], block()[:30])  # one half of the tunnel is filled
    assert genus(values) == 0
    assert not close_tunnels(values, CELL, everywhere)[1].any()
