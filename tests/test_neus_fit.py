"""Fits of a sphere whose pictures are known in closed form."""

import dataclasses

import numpy as np
import pytest

from hi3d_jax import cameras as camera_module
from hi3d_jax import neus, visual_hull
from hi3d_jax.neus.fit import RayPool, _step, schedule

RADIUS = 0.35


@pytest.fixture(scope="module")
def sphere_orbit():
    """Eight views of a sphere whose colour changes with height."""
    cameras = camera_module.orbit(np.arange(8) * 45.0, 10.0, width=48)
    origins, directions = camera_module.pixel_rays(cameras)
    closest = -(origins * directions).sum(-1)
    inside = RADIUS**2 - ((origins + closest[..., None] * directions) ** 2).sum(-1)
    alphas = (inside > 0).astype(np.float32)
    points = origins + (closest - np.sqrt(np.maximum(inside, 0)))[..., None] * directions
    colours = np.stack([0.5 + points[..., 2], np.full_like(alphas, 0.3), 0.5 - points[..., 2]], axis=-1)
    views = colours * alphas[..., None] + (1 - alphas[..., None])
    return views.astype(np.float32), alphas, cameras


def small_config(**changes):
    fields = neus.FieldConfig(grid=neus.HashGridConfig(num_levels=3, log2_table_size=10, base_resolution=8))
    config = neus.NeuSConfig(
        fields=fields, iterations=60, rays=256, cache_resolution=24, cache_interval=20,
        sampling=neus.SamplingConfig(coarse=48, fine=10),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def shell(radius):
    directions = np.random.default_rng(0).normal(size=(300, 3))
    return (radius * directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)


def test_fit_from_the_hull_finds_surface_and_colours(sphere_orbit):
    hull = visual_hull.carve(sphere_orbit[1], sphere_orbit[2], 32)
    surface = neus.fit(*sphere_orbit, small_config(), hull.sdf, progress=False)
    on_sphere = shell(RADIUS)
    assert np.abs(surface.sdf(on_sphere)).mean() < 0.012
    assert (surface.sdf(shell(RADIUS - 0.05)) < 0).all()
    assert (surface.sdf(shell(RADIUS + 0.06)) > 0).all()
    # Views at elevation 10 see the belt well.
    belt = on_sphere[np.abs(on_sphere[:, 2]) < 0.2]
    expected = np.stack([0.5 + belt[:, 2], np.full(len(belt), 0.3), 0.5 - belt[:, 2]], axis=1)
    assert np.abs(surface.colour(belt) - expected).mean() < 0.08


def test_points_that_are_known_draw_the_surface_to_them(sphere_orbit):
    hull = visual_hull.carve(sphere_orbit[1], sphere_orbit[2], 32)
    # Views at elevation 10 leave a bulge on top.
    top = shell(RADIUS)
    top = top[top[:, 2] > 0.25]
    known = neus.fit(*sphere_orbit, small_config(), hull.sdf, surface_points=top, progress=False)
    config = small_config(loss=neus.LossWeights(surface=0.0))
    ignored = neus.fit(*sphere_orbit, config, hull.sdf, surface_points=top, progress=False)
    assert np.abs(known.sdf(top)).mean() < 0.5 * np.abs(ignored.sdf(top)).mean()


def test_fit_without_a_hull_shrinks_the_first_sphere_towards_the_masks(sphere_orbit):
    config = small_config(iterations=100, inv_s=(40.0, 150.0), colour_first=0.0)
    surface = neus.fit(*sphere_orbit, config, progress=False)
    assert (surface.sdf(shell(RADIUS + 0.12)) > 0).mean() > 0.95
    assert (surface.sdf(shell(RADIUS - 0.12)) < 0).mean() > 0.95


def test_same_seed_same_surface(sphere_orbit):
    hull = visual_hull.carve(sphere_orbit[1], sphere_orbit[2], 24)
    points = shell(0.3)
    config = small_config(iterations=8)
    _step.clear_cache()
    first = neus.fit(*sphere_orbit, config, hull.sdf, progress=False).sdf(points)
    again = neus.fit(*sphere_orbit, config, hull.sdf, progress=False).sdf(points)
    other = neus.fit(*sphere_orbit, dataclasses.replace(config, seed=1), hull.sdf, progress=False).sdf(points)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # A process that makes many meshes would end for want of memory maps, each program taking thousands.
    assert _step._cache_size() == 1


def test_nan_in_the_views_stops_the_fit(sphere_orbit):
    views, alphas, cameras = sphere_orbit
    broken = np.full((24, 24, 24), np.nan, np.float32)
    with pytest.raises(neus.NeuSError, match="diverged at iteration 7"):
        neus.fit(views, alphas, cameras, small_config(iterations=8), broken, progress=False)


def test_rays_show_what_the_pixels_show(sphere_orbit):
    views, alphas, cameras = sphere_orbit
    batch = RayPool.build(views, alphas, cameras).draw(np.random.default_rng(0), 500)
    np.testing.assert_allclose(np.linalg.norm(batch["directions"], axis=0), 1, atol=1e-5)
    closest = -(batch["origins"] * batch["directions"]).sum(0)
    distance = np.linalg.norm(batch["origins"] + closest * batch["directions"], axis=0)
    np.testing.assert_array_equal(distance < RADIUS, batch["alpha"] > 0.5)
    assert np.abs(batch["colour"][:, batch["alpha"] < 0.5]).max() < 1e-2


def test_schedule_runs_from_soft_to_sharp():
    config = small_config()
    start, end = schedule(config, 0.0), schedule(config, 1.0)
    assert start["inv_s"] == config.inv_s[0]
    np.testing.assert_allclose(end["inv_s"], config.inv_s[1], rtol=1e-5)
    assert start["anneal"] == 0
    assert end["anneal"] == 1
    assert start["level_weights"].sum() == 1.5
    assert end["level_weights"].sum() == 3
