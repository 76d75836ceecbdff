"""The hash grid against SciPy's interpolation, finite differences and JAX's own differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from hi3d_jax.neus import hash_grid
from hi3d_jax.neus.hash_grid import HashGridConfig

CONFIG = HashGridConfig(num_levels=3, features=2, log2_table_size=10, base_resolution=4, growth=2.0)


def random_positions(count=200):
    positions = jax.random.uniform(jax.random.key(1), (3, count))
    # The corners of the cube and cell faces are positions too.
    special = jnp.array([[0.0, 1.0, 0.5, 0.25], [0.0, 1.0, 0.5, 1.0], [0.0, 1.0, 0.5, 0.125]])
    return jnp.concatenate([positions, special], axis=1)


def test_dense_grid_is_trilinear_interpolation():
    grid = jax.random.normal(jax.random.key(0), (9, 9, 9))
    positions = random_positions()
    value, _ = hash_grid.interpolate(grid, positions, jnp.ones_like(positions))
    expected = ndimage.map_coordinates(np.asarray(grid), np.asarray(positions) * 8, order=1)
    np.testing.assert_allclose(value, expected, atol=1e-5)


def test_derivative_along_a_direction_is_the_slope_of_the_value():
    tables = jax.random.normal(jax.random.key(0), (3, 2, 1024))
    positions = jax.random.uniform(jax.random.key(1), (3, 400))
    directions = jax.random.normal(jax.random.key(2), positions.shape)
    _, slope = hash_grid.encode(tables, CONFIG, positions, directions)
    step = 1e-3 * directions
    # Trilinear along a line is cubic inside a cell: compare only where the whole step stays inside the finest one.
    finest = CONFIG.resolutions[-1]
    same_cell = (jnp.floor((positions + step) * finest) == jnp.floor((positions - step) * finest)).all(axis=0)
    after, _ = hash_grid.encode(tables, CONFIG, positions + step, directions)
    before, _ = hash_grid.encode(tables, CONFIG, positions - step, directions)
    assert same_cell.sum() > 200
    difference = (after - before) / 2e-3
    np.testing.assert_allclose(slope[..., same_cell], difference[..., same_cell], rtol=2e-2, atol=0.2)


def test_gradient_equals_automatic_differentiation_of_a_plain_implementation():
    grid = jax.random.normal(jax.random.key(0), (5, 5, 5))
    positions = random_positions()
    directions = jax.random.normal(jax.random.key(2), positions.shape)
    by_value, by_slope = jax.random.normal(jax.random.key(3), (2, positions.shape[1]))

    def plain(grid, positions):
        return jax.scipy.ndimage.map_coordinates(grid, list(positions * 4), order=1, mode="nearest")

    def plain_total(grid):
        value, slope = jax.jvp(lambda p: plain(grid, p), (positions[:, :200],), (directions[:, :200],))
        return (by_value[:200] * value).sum() + (by_slope[:200] * slope).sum()

    def total(grid):
        value, slope = hash_grid.interpolate(grid, positions[:, :200], directions[:, :200])
        return (by_value[:200] * value).sum() + (by_slope[:200] * slope).sum()

    np.testing.assert_allclose(jax.grad(total)(grid), jax.grad(plain_total)(grid), atol=1e-4)


def test_coarse_levels_are_dense_and_fine_ones_hashed():
    sizes = [(resolution + 1) ** 3 for resolution in CONFIG.resolutions]
    assert sizes[0] <= 1024 < sizes[2]
    tables = jax.random.normal(jax.random.key(0), (3, 2, 1024))
    positions = random_positions()
    values, _ = hash_grid.encode(tables, CONFIG, positions, jnp.zeros_like(positions))
    coarse = np.asarray(tables[0, :, : sizes[0]]).reshape(2, 5, 5, 5)
    for feature in range(2):
        expected = ndimage.map_coordinates(coarse[feature], np.asarray(positions) * 4, order=1)
        np.testing.assert_allclose(values[0, feature], expected, atol=1e-5)
    assert np.isfinite(values).all()
    # Hashed or not, a level is continuous across cell faces.
    left, _ = hash_grid.encode(tables, CONFIG, jnp.full((3, 1), 0.5 - 1e-6), jnp.zeros((3, 1)))
    right, _ = hash_grid.encode(tables, CONFIG, jnp.full((3, 1), 0.5 + 1e-6), jnp.zeros((3, 1)))
    np.testing.assert_allclose(left, right, atol=1e-3)
