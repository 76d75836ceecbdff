"""Visual hulls of shapes whose silhouettes are known in closed form."""

import numpy as np
import pytest

from hi3d_jax import cameras as camera_module
from hi3d_jax import visual_hull
from hi3d_jax.visual_hull import EmptyHullError

RADIUS = 0.3


def sphere_depths(cameras, radius=RADIUS):
    """Masks and depths (infinite beside it) of a sphere at the origin."""
    origins, directions = camera_module.pixel_rays(cameras)
    closest = -(origins * directions).sum(-1)
    inside = radius**2 - ((origins + closest[..., None] * directions) ** 2).sum(-1)
    forward = cameras.c2w[:, None, None, :3, 2]
    depth = (closest - np.sqrt(np.maximum(inside, 0))) * (directions * forward).sum(-1)
    return (inside > 0).astype(np.float32), np.where(inside > 0, depth, 10.0).astype(np.float32)


@pytest.fixture(scope="module")
def cameras():
    low = camera_module.orbit(elevation_deg=10.0, width=96)
    return camera_module.Cameras.concatenate([low, camera_module.orbit(elevation_deg=70.0, width=96)])


def test_hull_of_a_sphere_is_nearly_the_sphere(cameras):
    hull = visual_hull.carve(sphere_depths(cameras)[0], cameras, 48)
    directions = np.random.default_rng(0).normal(size=(500, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    upper = directions[directions[:, 2] > -0.2]
    assert np.abs(hull.sample(RADIUS * upper)).max() < 0.02
    # The hull contains the object, everywhere.
    assert hull.sample((RADIUS - 0.015) * directions).max() < 0


def test_points_lie_on_the_surface_and_take_its_colour(cameras):
    alphas, _ = sphere_depths(cameras)
    hull = visual_hull.carve(alphas, cameras, 48)
    points = visual_hull.surface_points(hull, 400, seed=1)
    assert np.abs(hull.sample(points)).max() < 0.5 * hull.spacing
    views = np.where(alphas[..., None] > 0.5, np.float32([0.2, 0.6, 0.4]), np.float32(1))
    colours = visual_hull.colours_at(points, views, alphas, cameras)
    # Points at the outline mix in a little of the white beyond it.
    assert np.abs(colours - [0.2, 0.6, 0.4]).mean() < 0.05


def test_masks_that_contradict_each_other_are_refused(cameras):
    alphas = np.zeros((len(cameras), 96, 96), np.float32)
    alphas[::2, 40:56, 2:14], alphas[1::2, 40:56, 82:94] = 1, 1
    with pytest.raises(EmptyHullError, match="elevation, radius"):
        visual_hull.carve(alphas, cameras, 32)


def test_a_mask_cut_by_the_frame_carves_nothing_outside_it():
    cameras = camera_module.orbit([0.0], 0.0, width=64)
    alphas = np.zeros((1, 64, 64), np.float32)
    alphas[0, 24:40] = 1  # a bar through the whole width
    hull = visual_hull.carve(alphas, cameras, 48, half_side=0.8)
    assert hull.sample(np.array([[0.7, 0.6, 0.0]])) < 0  # beyond the frame's side
    assert hull.sample(np.array([[0.0, 0.0, 0.5]])) > 0  # seen to be empty


def test_outline_is_found_between_pixels():
    alpha = np.zeros((9, 9), np.float32)
    alpha[:, 5:], alpha[:, 4] = 1, 0.25  # the edge runs at three quarters of column 4
    distance = visual_hull.silhouette_distance(alpha)
    np.testing.assert_allclose(distance[4, 3:6], [1.5, 0.25, -0.5], atol=0.3)
    assert distance[4, 4] == 0.25


def test_depths_carve_what_masks_cannot():
    cameras = camera_module.orbit(elevation_deg=10.0, width=96)
    alphas, _ = sphere_depths(cameras)
    _, small = sphere_depths(cameras, 0.2)
    depths = np.where(small < 5, small, 1.6).astype(np.float32)
    hull = visual_hull.carve(alphas, cameras, 48)
    carved = visual_hull.carve_by_depths(hull, depths, alphas, cameras)
    assert (carved.sdf >= hull.sdf).all()
    belt = np.array([[0.26, 0.0, 0.0], [0.0, -0.26, 0.0], [0.18, 0.18, 0.0]])
    assert (hull.sample(belt) < 0).all()
    assert (carved.sample(belt) > 0).all()
    assert (carved.sample(0.17 / 0.26 * belt) < 0).all()


def test_true_depths_leave_the_hull_as_it_is(cameras):
    alphas, depths = sphere_depths(cameras)
    hull = visual_hull.carve(alphas, cameras, 48)
    carved = visual_hull.carve_by_depths(hull, depths, alphas, cameras)
    near = np.abs(hull.sdf) < 0.01
    assert np.abs(carved.sdf - hull.sdf)[near].max() < 0.006


def test_two_views_that_look_too_deep_dig_no_hole(cameras):
    alphas, depths = sphere_depths(cameras)
    hull = visual_hull.carve(alphas, cameras, 48)
    depths = depths.copy()
    depths[3:5] += 0.2
    carved = visual_hull.carve_by_depths(hull, depths, alphas, cameras)
    inside = RADIUS - 0.03
    towards = cameras.centres[3:5] / np.linalg.norm(cameras.centres[3:5], axis=1, keepdims=True)
    assert (carved.sample(inside * towards) < 0).all()
    depths[5] += 0.2
    deeper = visual_hull.carve_by_depths(hull, depths, alphas, cameras)
    assert (deeper.sample(inside * towards) > 0).any()


def test_pixels_that_know_nothing_carve_nothing(cameras):
    alphas, _ = sphere_depths(cameras)
    hull = visual_hull.carve(alphas, cameras, 48)
    carved = visual_hull.carve_by_depths(hull, np.full(alphas.shape, -np.inf, np.float32), alphas, cameras)
    np.testing.assert_array_equal(carved.sdf < 0, hull.sdf < 0)
