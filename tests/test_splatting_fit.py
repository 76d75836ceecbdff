"""Losses against scikit-image, initialisation, and a small scene that must be recovered from its own pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from hi3d_jax import cameras
from hi3d_jax.splatting import FitConfig, Gaussians, fit, from_points, render
from hi3d_jax.splatting.losses import photometric, ssim, ssim_map
from hi3d_jax.splatting.tiles import Capacity

SIZE = 32
SHORT = FitConfig(steps=150, sh_degree=0, relocate_every=40)

SHORTER = FitConfig(steps=6, sh_degree=0)


def sphere(count=300, seed=0):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    points = (0.35 * points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    return points, (points / 0.7 + 0.5).astype(np.float32)


@pytest.fixture(scope="module")
def orbit():
    """Pictures of a coloured ball from eight sides: views, alphas, cameras."""
    points, colours = sphere(2000, seed=1)
    truth = from_points(points, colours)
    seen = cameras.orbit(np.arange(8) * 45.0, 15.0, width=SIZE)
    drawn = [render(truth, w2c, K, SIZE, SIZE) for w2c, K in zip(seen.w2c, seen.K, strict=True)]
    return np.stack([np.asarray(d.colour) for d in drawn]), np.stack([np.asarray(d.alpha) for d in drawn]), seen


def psnr(gaussians: Gaussians, orbit) -> float:
    views, _, seen = orbit
    drawn = [render(gaussians, w2c, K, SIZE, SIZE).colour for w2c, K in zip(seen.w2c, seen.K, strict=True)]
    return float(-10 * np.log10(np.mean((np.stack(drawn) - views) ** 2)))


def test_ssim_equals_scikit_image():
    rng = np.random.default_rng(0)
    # More rows than one block of the blur, and no multiple of it.
    first = rng.random((75, 40, 3)).astype(np.float32)
    second = np.clip(first + 0.1 * rng.normal(size=first.shape), 0, 1).astype(np.float32)
    _, expected = structural_similarity(
        first,
        second,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=2,
        full=True,
        truncate=3.5,
    )
    inner = expected[5:-5, 5:-5].mean()
    # Where the window does not cross the border: there scikit-image mirrors the image and we see black.
    ours = ssim_map(jnp.asarray(first), jnp.asarray(second))[5:-5, 5:-5].mean()
    assert float(ours) == pytest.approx(inner, abs=1e-5)
    assert float(ssim(jnp.asarray(first), jnp.asarray(first))) == pytest.approx(1, abs=1e-6)


def test_loss_of_equal_pictures_is_zero_with_finite_gradient():
    image, alpha = jnp.ones((20, 20, 3)), jnp.ones((20, 20))
    value, gradient = jax.value_and_grad(lambda x: photometric(x, alpha, image, alpha, 0.2, 0.5))(image)
    assert float(value) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(gradient).all()


def test_from_points_spaces_gaussians_like_their_neighbours():
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), axis=-1).reshape(-1, 3).astype(np.float32)
    colours = np.full(grid.shape, 0.25, np.float32)
    gaussians = from_points(grid, colours, 2)
    np.testing.assert_allclose(gaussians.scales, 1.0, rtol=1e-5)
    np.testing.assert_allclose(0.28209479 * gaussians.sh[:, 0] + 0.5, 0.25, rtol=1e-5)
    assert gaussians.sh.shape == (64, 9, 3)
    twice = from_points(np.repeat(grid, 5, axis=0), np.repeat(colours, 5, axis=0))
    assert np.isfinite(twice.log_scales).all()


@pytest.mark.parametrize("points", [np.zeros((1, 3)), np.full((5, 3), np.nan)])
def test_from_points_refuses_what_is_no_cloud(points):
    with pytest.raises(ValueError, match="points"):
        from_points(points.astype(np.float32), np.zeros_like(points, dtype=np.float32))


def test_fit_recovers_a_ball_and_repeats_itself(orbit):
    points, colours = sphere()
    grey = np.full_like(colours, 0.5)
    fitted = fit(*orbit, SHORT, points, grey, progress=False)
    assert psnr(fitted, orbit) > psnr(from_points(points, grey), orbit) + 6
    again = fit(*orbit, SHORT, points, grey, progress=False)
    for first, second in zip(jax.tree.leaves(fitted), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(first, second)


def test_fit_grows_its_lists_when_gaussians_spread(orbit, monkeypatch):
    expected = fit(*orbit, SHORTER, *sphere(), progress=False)
    real = Capacity.holding
    starved = iter([Capacity(64, 64), Capacity(64, 64)])
    points, colours = sphere()
    calls = []

    def holding(pairs, steps):
        calls.append((pairs, steps))
        return next(starved, None) or real(pairs, steps)

    monkeypatch.setattr(Capacity, "holding", staticmethod(holding))
    grown = fit(*orbit, SHORTER, points, colours, progress=False)
    assert len(calls) > 2
    np.testing.assert_allclose(grown.means, expected.means, atol=1e-5)


def test_fit_refuses_views_that_do_not_match(orbit):
    views, alphas, seen = orbit
    with pytest.raises(ValueError, match="do not fit 8 cameras"):
        fit(views[:4], alphas[:4], seen, SHORT, *sphere(), progress=False)
