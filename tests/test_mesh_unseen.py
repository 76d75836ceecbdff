"""Undersides that no camera sees."""

import numpy as np
import pytest
import trimesh

from hi3d_jax import cameras as camera_module
from hi3d_jax.mesh import Mesh, extract_surface, flatten_unseen, is_watertight, seen_vertices


def as_mesh(shape):
    return Mesh(np.asarray(shape.vertices, np.float32), np.asarray(shape.faces, np.int32))


def nowhere_outside(points):
    return np.full(len(points), -1.0)


def test_cameras_see_one_side():
    sphere = as_mesh(trimesh.creation.icosphere(3, 0.3))
    seen = seen_vertices(sphere, camera_module.orbit([0.0], 0.0, width=8))
    assert seen[sphere.vertices[:, 0] > 0.12].all()
    assert not seen[sphere.vertices[:, 0] < 0.05].any()


def test_something_in_front_hides_a_surface():
    pair = trimesh.util.concatenate(
        [
            trimesh.creation.icosphere(3, 0.1),
            trimesh.creation.box([0.05, 1, 1], transform=np.eye(4) + np.diag([0.5], 3)),
        ]
    )
    mesh = as_mesh(pair)
    seen = seen_vertices(mesh, camera_module.orbit([0.0], 0.0, width=8))
    assert not seen[np.linalg.norm(mesh.vertices, axis=1) < 0.11].any()


def cylinder_on_a_cone(points, bumps=0.0):
    """A cylinder, and below it what cameras 20 degrees up cannot rule out, as rough as a fit leaves it."""
    radius = np.hypot(points[:, 0], points[:, 1])
    below = (-0.2 - points[:, 2]) - np.tan(np.radians(20)) * (0.3 - radius)
    below += bumps * np.sin(40 * points[:, 0]) * np.sin(40 * points[:, 1])
    return np.maximum.reduce([radius - 0.3, points[:, 2] - 0.2, below])


@pytest.mark.parametrize("bumps", [0.0, 0.02])
def test_the_cone_below_a_cylinder_becomes_its_flat_base(bumps):
    corner = np.full(3, 0.5)
    mesh = extract_surface(lambda points: cylinder_on_a_cone(points, bumps), -corner, corner, 64)
    assert mesh.vertices[:, 2].min() < -0.29
    flat = flatten_unseen(mesh, camera_module.orbit(elevation_deg=20.0, width=8), nowhere_outside)
    assert is_watertight(flat)
    assert flat.vertices[:, 2].min() > -0.225
    seen = mesh.vertices[:, 2] > -0.17
    np.testing.assert_array_equal(flat.vertices[seen], mesh.vertices[seen])


def test_a_ball_keeps_what_is_seen_of_its_underside():
    ball = as_mesh(trimesh.creation.icosphere(5, 0.3))
    cameras = camera_module.orbit(elevation_deg=20.0, width=8)
    # Cameras at a distance of 1.5 and a height of .51 look along the ball where its normal is about 59 degrees down.
    lowest_seen = -0.3 * np.sin(np.radians(90 - 20 - np.degrees(np.arcsin(0.3 / 1.5))))
    flat = flatten_unseen(ball, cameras, nowhere_outside)
    assert lowest_seen - 0.02 < flat.vertices[:, 2].min() < lowest_seen + 0.012


def test_vertices_that_would_leave_the_allowed_space_stay():
    sphere = as_mesh(trimesh.creation.icosphere(3, 0.3))
    cameras = camera_module.orbit(elevation_deg=30.0, width=8)
    same = flatten_unseen(sphere, cameras, lambda points: np.ones(len(points)))
    np.testing.assert_array_equal(same.vertices, sphere.vertices)
    moved = flatten_unseen(sphere, cameras, nowhere_outside)
    assert moved.vertices[:, 2].min() > sphere.vertices[:, 2].min() + 0.05


def test_unseen_parts_that_collapse_leave_a_closed_body():
    # A thin tail below a ball: its rim is so short that the harmonic surface over it is nearly a point.
    def ball_with_tail(points):
        radius = np.hypot(points[:, 0], points[:, 1])
        tail = np.maximum(radius - 0.02, np.abs(points[:, 2] + 0.3) - 0.15)
        return np.minimum(np.linalg.norm(points, axis=1) - 0.25, tail)

    corner = np.full(3, 0.5)
    mesh = extract_surface(ball_with_tail, -corner, corner, 80)
    flat = flatten_unseen(mesh, camera_module.orbit([0.0], 60.0, width=8), nowhere_outside)
    assert is_watertight(flat)
