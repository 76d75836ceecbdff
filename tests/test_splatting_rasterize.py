"""The tile rasteriser against its brute-force twin, in value and gradient, and what must not change a picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hi3d_jax import cameras
from hi3d_jax.splatting import reference
from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.projection import Footprints
from hi3d_jax.splatting.rasterize import capacity_for, light_stops, render
from hi3d_jax.splatting.tiles import TILE, Capacity, bin_footprints, needed_capacity

WIDTH, HEIGHT = 45, 38  # no multiple of the tile size
FIELDS = ("means", "quats", "log_scales", "opacity_logits", "sh")


def random_gaussians(seed: int, count: int = 80, degree: int = 3) -> Gaussians:
    rng = np.random.default_rng(seed)
    parts = (
        rng.normal(size=(count, 3)) * 0.3,
        rng.normal(size=(count, 4)),
        rng.normal(size=(count, 3)) * 0.6 - 2.5,
        rng.normal(size=count) * 3,
        rng.normal(size=(count, (degree + 1) ** 2, 3)) * 0.3,
    )
    return Gaussians(*(jnp.asarray(part, jnp.float32) for part in parts))


def changed(gaussians: Gaussians, **columns) -> Gaussians:
    values = {name: getattr(gaussians, name) for name in FIELDS}
    return Gaussians(**{name: jnp.asarray(columns.get(name, values[name]), jnp.float32) for name in FIELDS})


def overlapping():
    scene = random_gaussians(1)
    return changed(scene, means=scene.means * 0.2)


def behind_and_off_screen():
    scene = random_gaussians(2)
    shift = np.zeros((80, 3), np.float32)
    shift[::4] = [3.0, 0.0, 0.0]  # behind the camera, which looks along -x
    shift[1::4] = [0.0, 2.0, 0.0]
    shift[2::8] = [1.47, 0.0, 0.0]  # about the camera itself
    return changed(scene, means=scene.means + shift)


def huge_and_tiny():
    scene = random_gaussians(3)
    return changed(
        scene, log_scales=np.where(np.arange(80)[:, None] % 3 == 0, scene.log_scales + 3.2, scene.log_scales * 3)
    )


def transparent_and_opaque():
    scene = random_gaussians(4)
    return changed(scene, opacity_logits=np.where(np.arange(80) % 2, -7.0, 12.0))


def camera(azimuth_deg=0.0):
    view = cameras.orbit([azimuth_deg], 10.0, width=WIDTH, height=HEIGHT)
    return jnp.asarray(view.w2c[0]), jnp.asarray(view.K[0])


SCENES = [random_gaussians, overlapping, behind_and_off_screen, huge_and_tiny, transparent_and_opaque]


@pytest.fixture(scope="module")
def tests():
    """Fixed random weights of every output, so that one number depends on all of them."""
    rng = np.random.default_rng(9)
    shapes = (HEIGHT, WIDTH, 3), (HEIGHT, WIDTH), (HEIGHT, WIDTH)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def total(drawn, tests):
    return sum((part * test).sum() for part, test in zip((drawn.colour, drawn.alpha, drawn.depth), tests, strict=True))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_value_and_gradient_equal_brute_force(scene, tests):
    gaussians = scene(0) if scene is random_gaussians else scene()
    w2c, K = camera()
    background = jnp.array([0.1, 0.5, 0.9])
    capacity = Capacity(2048, 256)

    def fast(gaussians):
        drawn = render(gaussians, w2c, K, WIDTH, HEIGHT, background, capacity)
        return total(drawn, tests), drawn

    def slow(gaussians):
        drawn = reference.render(gaussians, w2c, K, WIDTH, HEIGHT, background)
        return total(drawn, tests), drawn

    (_, drawn), gradient = jax.value_and_grad(fast, has_aux=True)(gaussians)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(slow, has_aux=True))(gaussians)
    assert float(expected.alpha.max()) > 0.2
    for name in ("colour", "alpha", "depth"):
        np.testing.assert_allclose(getattr(drawn, name), getattr(expected, name), atol=1e-4, err_msg=name)
    for name in FIELDS:
        got, want = np.asarray(getattr(gradient, name)), np.asarray(getattr(expected_gradient, name))
        assert np.isfinite(got).all()
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * max(np.abs(want).max(), 1), err_msg=name)


def test_order_in_the_arrays_changes_nothing():
    gaussians = random_gaussians(5)
    w2c, K = camera(40.0)
    order = np.random.default_rng(0).permutation(len(gaussians))
    first, second = render(gaussians, w2c, K, WIDTH, HEIGHT), render(gaussians[order], w2c, K, WIDTH, HEIGHT)
    # The matrix product of the projection may round differently at another row: nothing else may differ.
    np.testing.assert_allclose(first.colour, second.colour, atol=1e-5)
    np.testing.assert_allclose(first.depth, second.depth, atol=1e-5)


def test_turning_world_and_camera_together_changes_nothing():
    gaussians = random_gaussians(6, degree=0)
    w2c, K = camera()
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    half = np.sqrt(0.5)
    w, x, y, z = np.asarray(gaussians.quats).T
    quats = half * np.stack([w - z, x - y, y + x, z + w], axis=1)
    turned = changed(gaussians, means=gaussians.means @ turn.T, quats=quats)
    turned_w2c = w2c.at[:3, :3].set(w2c[:3, :3] @ turn.T)
    first, second = render(gaussians, w2c, K, WIDTH, HEIGHT), render(turned, turned_w2c, K, WIDTH, HEIGHT)
    np.testing.assert_allclose(first.colour, second.colour, atol=2e-5)


def test_one_gaussian_in_closed_form():
    w2c, K = camera()
    scale, opacity = 0.05, 0.6
    gaussians = Gaussians(
        means=jnp.zeros((1, 3)),
        quats=jnp.array([[1.0, 0, 0, 0]]),
        log_scales=jnp.full((1, 3), np.log(scale)),
        opacity_logits=jnp.full(1, np.log(opacity / (1 - opacity))),
        sh=jnp.zeros((1, 1, 3)),
    )
    drawn = render(gaussians, w2c, K, WIDTH, HEIGHT)
    variance = (float(K[0, 0]) * scale / cameras.ORBIT_RADIUS) ** 2 + 0.3
    offset = np.array([0.5, 0.0])  # centre of the image (22.5, 19) to the pixel centre (22.5, 18.5)
    expected = opacity * np.exp(-(offset @ offset) / 2 / variance)
    assert float(drawn.alpha[18, 22]) == pytest.approx(expected, rel=1e-4)
    assert float(drawn.depth[18, 22]) == pytest.approx(cameras.ORBIT_RADIUS, rel=1e-5)
    np.testing.assert_allclose(drawn.colour[18, 22], 1 - 0.5 * expected, rtol=1e-4)


def test_gradients_stay_finite_at_degenerate_parameters(tests):
    gaussians = random_gaussians(7)
    w2c, K = camera()
    centre = -np.linalg.inv(np.asarray(w2c)[:3, :3]) @ np.asarray(w2c)[:3, 3]
    means = np.array(gaussians.means)
    means[0] = centre
    means[1:3] = means[3]
    quats = np.array(gaussians.quats)
    quats[4] = 0
    log_scales = np.array(gaussians.log_scales)
    log_scales[5], log_scales[6], log_scales[7] = -40, 5, [3, -20, -20]
    gaussians = changed(
        gaussians,
        means=means,
        quats=quats,
        log_scales=log_scales,
        opacity_logits=np.where(np.arange(80) < 10, 40.0, -40.0),
    )
    capacity = capacity_for(gaussians, w2c, K, WIDTH, HEIGHT)
    gradient = jax.grad(lambda g: total(render(g, w2c, K, WIDTH, HEIGHT, 1.0, capacity), tests))(gaussians)
    for name in FIELDS:
        assert np.isfinite(getattr(gradient, name)).all(), name


@pytest.mark.parametrize(("count", "size"), [(2_000, 256), (140_000, 1024)])
def test_every_tile_lists_its_gaussians_front_to_back_also_where_keys_do_not_fit_in_one_word(count, size):
    rng = np.random.default_rng(0)
    means, depths, reach = (
        part.astype(np.float32)
        for part in (
            rng.uniform(-20, size + 20, (count, 2)),
            rng.uniform(1, 2, count),
            np.where(np.arange(count)[:, None] % 10 == 0, -1.0, rng.uniform(0, 6, (count, 2))),
        )
    )
    unused = jnp.zeros((count, 3))
    footprints = Footprints(*map(jnp.asarray, (means, unused, depths, unused[:, 0], unused, reach)))
    lists = bin_footprints(footprints, size, size, Capacity(*needed_capacity(footprints, size, size).tolist()))
    assert not lists.overflow
    columns = size // TILE
    for group in np.flatnonzero(np.diff(lists.first_steps))[:: max(len(lists.tiles) // 5, 1)]:
        for place in (0, 17):
            tile = int(lists.tiles[group, place])
            begun, ended = lists.first_steps[group : group + 2]
            listed = np.asarray(lists.members[begun:ended, :, place]).reshape(-1)
            first = np.array([tile % columns, tile // columns]) * TILE + 0.5
            touched = (means + reach >= first) & (means - reach <= first + TILE - 1) & (reach >= 0)
            expected = np.flatnonzero(touched.all(axis=1))
            np.testing.assert_array_equal(listed[listed < count], expected[np.argsort(depths[expected])])


def test_too_small_a_capacity_shows():
    w2c, K = camera()
    assert np.isnan(render(random_gaussians(0), w2c, K, WIDTH, HEIGHT, 1.0, Capacity(64, 64)).colour).all()
    assert np.isnan(render(random_gaussians(0), w2c, K, WIDTH, HEIGHT, 1.0, Capacity(2048, 1)).colour).all()


def test_capacity_is_asked_for_under_jit():
    w2c, K = camera()
    with pytest.raises(ValueError, match="capacity_for"):
        jax.jit(lambda g: render(g, w2c, K, WIDTH, HEIGHT).colour)(random_gaussians(0))


def test_nothing_in_view_is_background():
    w2c, K = camera()
    away = changed(random_gaussians(0), means=np.full((80, 3), 50.0))
    drawn = render(away, w2c, K, WIDTH, HEIGHT, jnp.array([0.2, 0.4, 0.6]))
    np.testing.assert_allclose(
        drawn.colour, np.broadcast_to(np.float32([0.2, 0.4, 0.6]), (HEIGHT, WIDTH, 3)), rtol=1e-6
    )
    assert not drawn.alpha.any()
    assert not drawn.depth.any()


def test_one_pixel_image():
    view = cameras.orbit([0.0], width=1, height=1)
    drawn = render(random_gaussians(0), view.w2c[0], view.K[0], 1, 1)
    assert drawn.colour.shape == (1, 1, 3)
    assert np.isfinite(drawn.colour).all()


def test_light_stops_around_the_mean_depth_as_far_as_its_square_says():
    scene, (w2c, K) = overlapping(), camera()
    stops = light_stops(scene, w2c, K, WIDTH, HEIGHT)
    z = np.asarray(scene.means) @ np.asarray(w2c[2, :3]) + float(w2c[2, 3])
    # Colour without view dependence that carries (z, z², 0) instead.
    moments = np.zeros(scene.sh.shape, np.float32)
    moments[:, 0, 0], moments[:, 0, 1] = (z - 0.5) / 0.28209479, (z * z - 0.5) / 0.28209479
    drawn = reference.render(changed(scene, sh=moments), w2c, K, WIDTH, HEIGHT, 0.0)
    shown = np.asarray(drawn.alpha) > 1e-2
    first, second = (np.asarray(drawn.colour[..., i] / drawn.alpha)[shown] for i in range(2))
    np.testing.assert_allclose(np.asarray(stops.mean)[shown], first, atol=1e-4)
    np.testing.assert_allclose(np.asarray(stops.spread)[shown] ** 2, second - first**2, atol=1e-3)
