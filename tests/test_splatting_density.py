"""Relocation keeps the picture, moves only the dead, and its correction equals the paper's sum of binomials."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hi3d_jax import cameras
from hi3d_jax.splatting.density import DEAD_OPACITY, position_noise, relocate, split, without_floaters
from hi3d_jax.splatting.gaussians import Gaussians


def scene(opacities) -> Gaussians:
    opacities = np.asarray(opacities)
    rng = np.random.default_rng(0)
    count = len(opacities)
    return Gaussians(
        means=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        quats=jnp.asarray(rng.normal(size=(count, 4)), jnp.float32),
        log_scales=jnp.asarray(rng.normal(size=(count, 3)), jnp.float32),
        opacity_logits=jnp.asarray(np.log(opacities / (1 - opacities)), jnp.float32),
        sh=jnp.asarray(rng.normal(size=(count, 1, 3)), jnp.float32),
    )


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
@pytest.mark.parametrize("opacity", [0.02, 0.5, 0.95])
def test_split_equals_the_papers_sum(opacity, copies):
    new, shrink = split(jnp.array([opacity]), jnp.array([float(copies)]))
    expected = 1 - (1 - opacity) ** (1 / copies)
    total = sum(
        math.comb(i - 1, k) * (-1) ** k * expected ** (k + 1) / math.sqrt(k + 1)
        for i in range(1, copies + 1)
        for k in range(i)
    )
    assert float(new[0]) == pytest.approx(expected, rel=1e-5)
    assert float(shrink[0]) == pytest.approx(opacity / total, rel=1e-4)


def test_the_dead_move_onto_the_living():
    before = scene([0.9, 0.001, 0.5, 0.003, 0.2, 0.001])
    after, changed = jax.jit(relocate)(jax.random.key(0), before)
    dead = np.asarray(before.opacities) <= DEAD_OPACITY
    assert np.asarray(changed)[dead].all()
    assert (np.asarray(after.opacities) > DEAD_OPACITY * 0.999).all()
    living = np.asarray(before.means)[~dead]
    for mean in np.asarray(after.means)[dead]:
        assert (mean == living).all(axis=1).any()
    untouched = ~np.asarray(changed)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(old)[untouched], np.asarray(new)[untouched])
    # Copies of one Gaussian and itself together are as opaque at their centre as it was.
    for mean, opacity in zip(np.asarray(before.means)[~dead], np.asarray(before.opacities)[~dead], strict=True):
        same = (np.asarray(after.means) == mean).all(axis=1)
        assert 1 - np.prod(1 - np.asarray(after.opacities)[same]) == pytest.approx(opacity, rel=1e-4)


@pytest.mark.parametrize("opacity", [0.5, 0.001])
def test_nothing_moves_when_all_or_none_are_dead(opacity):
    before = scene([opacity] * 4)
    after, changed = relocate(jax.random.key(0), before)
    assert not np.asarray(changed).any()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_noise_follows_the_covariance_of_transparent_gaussians():
    count = 20000
    one = scene([0.001])
    many = jax.tree.map(lambda values: jnp.repeat(values, count, axis=0), one)
    noise = np.asarray(position_noise(jax.random.key(0), many))
    w, x, y, z = np.asarray(one.quats[0]) / np.linalg.norm(one.quats[0])
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    covariance = rotation @ np.diag(np.exp(2 * np.asarray(one.log_scales[0]))) @ rotation.T
    gate = 1 / (1 + np.exp(-100 * (0.005 - 0.001)))
    expected = gate**2 * covariance @ covariance
    assert np.abs(np.cov(noise.T) - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(position_noise(jax.random.key(0), scene([0.5, 0.9]))).max() < 1e-12


def test_floaters_and_the_invisible_are_dropped_and_no_others():
    seen = cameras.orbit(width=64)
    y, x = np.mgrid[:64, :64] + 0.5 - 32
    # A ball of radius 0.3 at the origin.
    disc = (np.hypot(x, y) < 0.3 / 1.5 * seen.K[0, 0, 0]).astype(np.float32)
    before = scene([0.5, 0.5, 0.5, 0.001])
    means = jnp.array([[0.0, 0, 0], [0.2, 0.1, 0.1], [0.0, 0.0, 0.45], [0.0, 0.0, 0.0]])
    before = Gaussians(means, before.quats, before.log_scales, before.opacity_logits, before.sh)
    after = without_floaters(before, np.stack([disc] * 16), seen)
    np.testing.assert_array_equal(after.means, means[:2])
    emptied = without_floaters(before, np.zeros((16, 64, 64), np.float32), seen)
    assert len(emptied) == 4
