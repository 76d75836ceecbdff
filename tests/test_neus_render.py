"""NeuS's fields and volume rendering against recorded numbers, closed forms and finite differences.

tests/fixtures/neus.npz: numbers made by running instant-nsr-pl's get_alpha (models/neus.py), float32, CPU.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hi3d_jax.neus import fields as neus_fields
from hi3d_jax.neus.fields import FieldConfig
from hi3d_jax.neus.hash_grid import HashGridConfig
from hi3d_jax.neus.render import (
    SamplingConfig,
    alpha_from_sdf,
    cube_span,
    render_rays,
    sample_distances,
    transmittance,
)

RECORDED = np.load(Path(__file__).parent / "fixtures" / "neus.npz")
CONFIG = FieldConfig(grid=HashGridConfig(num_levels=2, log2_table_size=12))
LEVELS = jnp.ones(2)


def sphere_fields(radius=0.3, resolution=48):
    axis = jnp.linspace(-CONFIG.half_side, CONFIG.half_side, resolution)
    x, y, z = jnp.meshgrid(axis, axis, axis, indexing="ij")
    return neus_fields.init_fields(CONFIG, jax.random.key(0), jnp.sqrt(x**2 + y**2 + z**2) - radius)


@pytest.mark.parametrize("variance", [0.3, 0.6])
@pytest.mark.parametrize("anneal", [0.0, 0.4, 1.0])
def test_alpha_equals_the_recorded_numbers(variance, anneal):
    cosine = (RECORDED["dirs"] * RECORDED["normal"]).sum(axis=-1)
    sdf, step = jnp.asarray(RECORDED["sdf"]), jnp.asarray(RECORDED["dists"])
    alpha = alpha_from_sdf(sdf, jnp.asarray(cosine), step, float(np.exp(10 * variance)), anneal)
    np.testing.assert_allclose(alpha, RECORDED[f"alpha_var{variance}_cos{anneal}"].reshape(-1), atol=1e-5)


def test_a_field_without_a_grid_starts_as_a_sphere():
    fields = neus_fields.init_fields(CONFIG, jax.random.key(3))
    directions = jax.random.normal(jax.random.key(1), (3, 300))
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    for radius in (0.1, 0.4, 0.5):
        sdf, _, _ = neus_fields.evaluate(fields, CONFIG, radius * directions, directions, LEVELS)
        # Theorem 1 of Atzmon & Lipman holds in the limit of many units; here there are 32.
        np.testing.assert_allclose(sdf.mean(), radius - CONFIG.sphere_radius, atol=0.08)


def test_gradient_is_the_slope_of_the_distance():
    fields = sphere_fields()
    tables = 0.02 * jax.random.normal(jax.random.key(5), fields.tables.shape)
    kernel, bias = fields.sdf_layers[1]
    layers = (fields.sdf_layers[0], (kernel.at[0].set(0.1), bias))
    fields = neus_fields.Fields(tables, fields.dense, layers, fields.colour_layers)
    points = jax.random.uniform(jax.random.key(1), (3, 200), minval=-0.5, maxval=0.5)
    _, gradient = neus_fields.value_and_gradient(fields, CONFIG, points, LEVELS)

    def distance(points):
        return neus_fields.evaluate(fields, CONFIG, points, jnp.zeros_like(points), LEVELS)[0]

    step = 1e-4
    for axis in range(3):
        offset = jnp.zeros((3, 1)).at[axis].set(step)
        slope = (distance(points + offset) - distance(points - offset)) / (2 * step)
        # Cell faces, where the slope jumps, are met by a few points.
        close = jnp.abs(slope - gradient[axis]) < 2e-2
        assert close.mean() > 0.9


def test_transmittance_is_the_product_of_what_passes():
    alpha = np.random.default_rng(0).uniform(0, 1, (7, 5)).astype(np.float32)
    expected = np.stack([np.prod(1 - alpha[:sample], axis=0) for sample in range(7)])
    np.testing.assert_allclose(transmittance(jnp.asarray(alpha)), expected, rtol=1e-4, atol=1e-6)
    assert np.isfinite(jax.grad(lambda a: transmittance(a).sum())(jnp.ones((4, 2)))).all()


def test_cube_span_of_hits_and_misses():
    origins = jnp.array([[2.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    directions = jnp.array([[-1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    near, far = cube_span(origins, directions, 0.5)
    np.testing.assert_allclose(near, [1.5, near[1], 0.0], atol=1e-5)
    np.testing.assert_allclose(far - near, [1.0, 0.0, 0.5], atol=1e-5)


def rays_at_a_sphere():
    offsets = jnp.array([0.0, 0.1, 0.2, 0.27, 0.33, 0.45])
    origins = jnp.stack([jnp.full(6, -1.5), offsets, jnp.zeros(6)])
    directions = jnp.broadcast_to(jnp.array([[1.0], [0.0], [0.0]]), (3, 6))
    return offsets, origins, directions


def test_rays_stop_where_they_meet_a_sphere():
    fields, (offsets, origins, directions) = sphere_fields(), rays_at_a_sphere()
    sampling = SamplingConfig(fine=32)
    distances = sample_distances(fields.dense, sampling, 0.55, 400.0, origins, directions, jax.random.key(0))
    assert (jnp.diff(distances, axis=0) >= 0).all()
    out = render_rays(fields, CONFIG, LEVELS, origins, directions, distances, 400.0, 1.0)
    np.testing.assert_allclose(out.opacity, [1, 1, 1, 1, 0, 0], atol=0.03)
    met = (out.weights * 0.5 * (distances[1:] + distances[:-1])).sum(axis=0)[:4]
    np.testing.assert_allclose(met, 1.5 - jnp.sqrt(0.3**2 - offsets[:4] ** 2), atol=5e-3)


def test_gradients_are_finite_where_rays_miss_or_graze():
    fields, (_, origins, directions) = sphere_fields(), rays_at_a_sphere()
    origins = origins.at[:, 5].set(jnp.array([-1.5, 3.0, 0.0]))  # misses the cube
    origins = origins.at[1, 4].set(0.3)  # touches the sphere
    distances = sample_distances(fields.dense, SamplingConfig(), 0.55, 400.0, origins, directions, jax.random.key(0))

    def total(fields):
        out = render_rays(fields, CONFIG, LEVELS, origins, directions, distances, 400.0, 0.5)
        return (out.colour**2).sum() + jnp.log(out.opacity + 1e-3).sum()

    leaves = jax.tree.leaves(jax.grad(total)(fields))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.abs(leaf).max() > 0 for leaf in leaves)
