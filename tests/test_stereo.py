"""Plane sweep on a textured ball whose depths are known, below a "hull" that bulges over it; the matching of its depths
beside paths followed one by one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hi3d_jax import cameras as camera_module
from hi3d_jax import stereo, visual_hull
from hi3d_jax.cameras import Cameras
from hi3d_jax.stages import ReconstructConfig
from hi3d_jax.stages.reconstruct import _Fits, _uncovered
from hi3d_jax.stereo import SweepConfig
from hi3d_jax.video import Orbit

RADIUS, BULGE = 0.35, 0.06
SIZE = 96
SWEEP = SweepConfig(reach=0.144, step=0.003)


def ball(cameras: Cameras, radius: float = RADIUS):
    """Colours (a solid texture, over white), masks, and depths (infinite beside the ball) of a ball at the origin."""
    origins, directions = camera_module.pixel_rays(cameras)
    closest = -(origins * directions).sum(-1)
    inside = radius**2 - ((origins + closest[..., None] * directions) ** 2).sum(-1)
    seen = inside > 0
    distance = closest - np.sqrt(np.maximum(inside, 0))
    points = origins + distance[..., None] * directions
    generator = np.random.default_rng(0)
    waves = generator.normal(size=(12, 3)) * 25
    colours = 0.5 + 0.12 * np.einsum("...i,ic->...c", np.sin(points @ waves.T), generator.normal(size=(12, 3)))
    colours = np.where(seen[..., None], np.clip(colours, 0, 1), 1).astype(np.float32)
    depth = distance * (directions * cameras.c2w[:, None, None, :3, 2]).sum(-1)
    return colours, seen.astype(np.float32), np.where(seen, depth, np.inf).astype(np.float32)


@pytest.fixture(scope="module")
def cameras():
    return camera_module.orbit(elevation_deg=20.0, width=SIZE)


@pytest.fixture(scope="module")
def swept(cameras):
    views, alphas, depths = ball(cameras)
    fronts = np.where(np.isfinite(depths), depths - BULGE, np.inf)
    return *stereo.sweep(views, alphas, cameras, fronts, SWEEP), depths


def test_depths_are_found_behind_the_bulge(cameras, swept):
    found, told, depths = swept
    seen = np.isfinite(depths)
    np.testing.assert_array_equal(np.isfinite(found), seen)
    assert not told[~seen].any()
    assert told.sum() > 0.6 * seen.sum()
    pixel = 1.5 / cameras.K[0, 0, 0]
    errors = np.abs(found - depths)[told]
    assert np.median(errors) < 0.6 * pixel
    assert (errors < 1.5 * pixel).mean() > 0.9


def test_neighbours_confirm_what_is_right_and_not_what_is_chance(cameras, swept):
    found, told, depths = swept
    confirmed = stereo.confirmed(found, cameras)
    assert not confirmed[~np.isfinite(found)].any()
    assert confirmed[told].mean() > 0.5  # the rest is hidden from one of them
    one_wrong = found.copy()
    one_wrong[4] += 0.05
    assert stereo.confirmed(one_wrong, cameras)[[3, 4, 5]].sum() < 0.1 * confirmed[[3, 4, 5]].sum()
    chance = depths - BULGE + np.random.default_rng(0).uniform(0, 0.144, depths.shape)
    assert stereo.confirmed(np.where(told, chance, np.nan), cameras)[told].mean() < 0.05
    # Opposite views have no neighbours.
    assert not stereo.confirmed(found[[0, 8]], cameras[[0, 8]]).any()


def test_plain_things_tell_no_depth(cameras):
    views, alphas, depths = ball(cameras)
    plain = np.where(alphas[..., None] > 0, np.float32(0.5), np.ones_like(views))
    assert not stereo.sweep(plain, alphas, cameras, depths, SWEEP)[1].any()


def test_plain_patches_get_their_depth_from_around_them(cameras):
    views, alphas, depths = ball(cameras)
    _, directions = camera_module.pixel_rays(cameras)
    scale = depths / (directions * cameras.c2w[:, None, None, :3, 2]).sum(-1)
    with np.errstate(invalid="ignore"):
        points = cameras.centres[:, None, None] + directions * scale[..., None]
        patch = np.isfinite(depths) & (np.abs(points[..., 2] - 0.1) < 0.06)
    views = np.where(patch[..., None], np.float32(0.5), views)
    fronts = np.where(np.isfinite(depths), depths - BULGE, np.inf)
    free = dataclasses.replace(SWEEP, bend=0.0, jump=0.0)
    priced, each_for_itself = (
        np.abs(stereo.sweep(views, alphas, cameras, fronts, config)[0] - depths)[patch] for config in (SWEEP, free)
    )
    assert np.median(priced) < 0.01
    assert np.median(each_for_itself) > 0.02


def test_without_a_neighbour_nothing_is_told(cameras):
    views, alphas, depths = ball(cameras)
    opposite = [0, 8]
    found, told = stereo.sweep(views[opposite], alphas[opposite], cameras[opposite], depths[opposite], SWEEP)
    assert np.isnan(found).all()
    assert not told.any()


def test_semi_global_costs_are_those_of_paths_followed_one_by_one():
    generator = np.random.default_rng(2)
    labels, height, width, bend, jump = 5, 6, 7, 0.1, 0.45
    costs = generator.uniform(size=(labels, height, width)).astype(np.float32)
    seen = generator.uniform(size=(height, width)) > 0.2
    difference = np.abs(np.arange(labels)[:, None] - np.arange(labels))
    price = np.select([difference == 0, difference == 1], [0.0, bend], jump)

    def path(row, column, step):
        """Costs of the labels at a pixel that a path in direction `step` (row, column) has come to."""
        if not (0 <= row < height and 0 <= column < width and seen[row, column]):
            return np.zeros(labels)
        before = path(row - step[0], column - step[1], step)
        return costs[:, row, column] + (before + price).min(axis=1) - before.min()

    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    expected = [[sum(path(row, column, step) for step in steps) for column in range(width)] for row in range(height)]
    found = stereo.semi_global(jnp.asarray(costs), jnp.asarray(seen), bend, jump)
    np.testing.assert_allclose(found, np.moveaxis(np.array(expected), 2, 0), atol=1e-5)


def test_neighbours_in_an_orbit_stand_beside(cameras):
    chosen = stereo.neighbours(cameras)
    assert [set(others) for others in chosen] == [{(view - 1) % 16, (view + 1) % 16} for view in range(16)]
    assert [list(others) for others in stereo.neighbours(cameras[[0, 1, 8]])] == [[1, 1], [0, 0], []]


def test_correlation_is_that_of_every_window():
    generator = np.random.default_rng(1)
    one, other = generator.uniform(0.6, 1, (2, 4, 12, 14)).astype(np.float32)
    window = 5
    correlation, contrast = stereo._correlate(jnp.asarray(one), jnp.asarray(other), window)
    for row, column in ((2, 2), (5, 7), (9, 11)):
        part = np.s_[:, row - 2 : row + 3, column - 2 : column + 3]
        weight = one[3:][part] * other[3:][part]
        a, b = one[:3][part], other[:3][part]
        a, b = (x - (weight * x).sum((1, 2), keepdims=True) / weight.sum() for x in (a, b))
        variances = [(weight * x * x).sum() / weight.sum() for x in (a, b)]
        expected = (weight * a * b).sum() / weight.sum() / np.sqrt(np.prod(np.add(variances, stereo.NOISE)))
        np.testing.assert_allclose(correlation[row, column], expected, atol=1e-4)
        np.testing.assert_allclose(contrast[row, column], np.sqrt(variances[0]), atol=1e-4)


def test_what_lies_before_the_agreed_surface_is_carved(cameras, swept):
    _, alphas, _ = ball(cameras, RADIUS + BULGE)
    hull = visual_hull.carve(alphas, cameras, 64)
    carved = visual_hull.carve_by_stereo(hull, swept[0], cameras)
    angles = np.linspace(0, 2 * np.pi, 40)
    belt = np.stack([np.cos(angles), np.sin(angles), np.full(40, 0.2)], 1) / np.hypot(1, 0.2)
    assert (hull.sample((RADIUS + 0.03) * belt) < 0).all()
    assert (carved.sample((RADIUS + 0.03) * belt) > 0).all()
    assert (carved.sample((RADIUS - 0.03) * belt) < 0).all()


def test_a_minority_that_looks_too_deep_digs_no_pit(cameras):
    _, alphas, depths = ball(cameras)
    hull = visual_hull.carve(alphas, cameras, 64)
    depths = np.where(np.isfinite(depths), depths, np.nan)
    depths[4] += 0.1
    inside = (RADIUS - 0.03) * cameras.centres[4] / np.linalg.norm(cameras.centres[4])
    assert visual_hull.carve_by_stereo(hull, depths, cameras).sample(inside[None]) < 0
    # The same where that view is the only one: nothing else holds it back but the number of witnesses.
    alone = np.full_like(depths, np.nan)
    alone[4] = depths[4]
    assert visual_hull.carve_by_stereo(hull, alone, cameras).sample(inside[None]) < 0
    assert visual_hull.carve_by_stereo(hull, alone, cameras, witnesses=1).sample(inside[None]) > 0


def test_what_the_masks_miss_comes_back(cameras):
    _, alphas, _ = ball(cameras)
    hull = visual_hull.carve(alphas, cameras, 48)
    axis = np.linspace(hull.lower[2], hull.upper[2], 48)
    without_cap = dataclasses.replace(hull, sdf=np.maximum(hull.sdf, (axis - 0.15).astype(np.float32)))
    fits = _Fits(
        Orbit(np.ones((*alphas.shape, 3), np.float32), alphas, cameras), ReconstructConfig.preset("draft"), False
    )
    uncovered = _uncovered(fits._body(without_cap, None), fits.small)
    assert uncovered.any(axis=(1, 2)).all()
    whole = visual_hull.give_back(without_cap, hull, uncovered, cameras)
    inside = np.array([[0, 0, 0.3], [0.1, 0.1, 0.25]])
    assert (without_cap.sample(inside) > 0).all()
    np.testing.assert_allclose(whole.sample(inside), hull.sample(inside))
    assert (whole.sdf >= hull.sdf).all()
    assert (whole.sdf <= without_cap.sdf).all()
    # One view alone, or two, may be wrong.
    uncovered[2:] = False
    np.testing.assert_array_equal(visual_hull.give_back(without_cap, hull, uncovered, cameras).sdf, without_cap.sdf)


def test_no_depths_carve_nothing(cameras):
    _, alphas, _ = ball(cameras)
    hull = visual_hull.carve(alphas, cameras, 48)
    carved = visual_hull.carve_by_stereo(hull, np.full(alphas.shape, np.nan, np.float32), cameras)
    np.testing.assert_array_equal(carved.sdf < 0, hull.sdf < 0)


def test_views_that_contradict_one_another_carve_nothing(cameras):
    _, alphas, _ = ball(cameras)
    azimuths = np.arange(16) * 22.5 + np.random.default_rng(0).uniform(-6, 6, 16)
    contradicting, _, _ = ball(camera_module.orbit(azimuths, elevation_deg=20.0, width=SIZE))
    fits = _Fits(Orbit(contradicting, alphas, cameras), ReconstructConfig.preset("draft"), False)
    start, known = fits.carve_by_stereo(fits.hull)
    assert start is fits.hull
    assert known is None


def test_points_of_the_surface_are_known_where_colours_are_plain_too(cameras):
    views, alphas, depths = ball(cameras)
    origins, directions = camera_module.pixel_rays(cameras)
    along = np.where(alphas > 0, depths, 0) / np.einsum("thwi,ti->thw", directions, cameras.c2w[:, :3, 2])
    height = (origins + along[..., None] * directions)[..., 2]
    views[(alphas > 0) & (height > 0.1)] = 0.5
    fits = _Fits(Orbit(views, alphas, cameras), ReconstructConfig.preset("draft"), False)
    carved, known = fits.carve_by_stereo(fits.hull)
    assert (carved.sdf > fits.hull.sdf).any()
    off = np.abs(np.linalg.norm(known, axis=1) - RADIUS)
    plain = known[:, 2] > 0.15
    assert off[~plain].mean() < 0.003
    assert plain.sum() > 0.8 * ((alphas > 0) & (height > 0.15)).sum()
    assert off[plain].mean() < 0.01
