import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from hi3d_jax.data import blur_kernels
from hi3d_jax.data.blur_kernels import KernelConfig, bell, blur, draw_kernel, padded, sinc
from hi3d_jax.data.degrade import Degradation, DegradationRound, degrade_views, poisson_noise, random_mask
from hi3d_jax.data.interpolate import RESIZE_MODES, interpolate, interpolate_by
from hi3d_jax.data.jpeg import jpeg


@pytest.fixture(scope="module")
def official():
    return np.load(Path(__file__).parent / "fixtures" / "degrade.npz")


@pytest.fixture(scope="module")
def pictures(official):
    return official["x"].transpose(0, 2, 3, 1)


def orbit(num_views=3, size=64, seed=0):
    """Smooth coloured discs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    colours = 0.5 + 0.4 * np.sin(7 * x[..., None] + rng.uniform(0, 6, 3) + 5 * y[..., None])
    alpha = np.clip(0.5 + size * (0.35 - np.hypot(x, y)), 0, 1)[..., None]
    view = np.round(255 * np.concatenate([np.where(alpha > 0, colours, 1), alpha], axis=-1)).astype(np.uint8)
    return np.stack([view] * num_views)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("iso", bell("iso", 21, 2.0, 2.0, 0.0)),
        ("aniso", bell("aniso", 21, 2.5, 0.8, 0.6)),
        ("gen_iso", bell("generalized_iso", 13, 1.7, 1.7, 0.0, 0.7)),
        ("gen_aniso", bell("generalized_aniso", 13, 2.2, 0.9, -1.1, 2.5)),
        ("plateau_iso", bell("plateau_iso", 15, 1.5, 1.5, 0.0, 1.5)),
        ("plateau_aniso", bell("plateau_aniso", 15, 2.8, 1.1, 2.0, 1.2)),
        ("sinc7", sinc(math.pi / 2, 7)),
        ("sinc21", sinc(math.pi / 4, 21)),
        ("sinc_pad", padded(sinc(math.pi / 3, 11))),
    ],
)
def test_kernels_equal_the_official_ones(official, name, kernel):
    np.testing.assert_allclose(kernel, official[f"k_{name}"], rtol=0, atol=1e-15)


def test_blur_jpeg_and_resizing_equal_the_official_ones(official, pictures):
    for view, name, wanted in zip(pictures, ("iso", "aniso", "sinc21"), official["filter2D"], strict=True):
        np.testing.assert_allclose(blur(view, official[f"k_{name}"]), wanted.transpose(1, 2, 0), atol=5e-6)
    for view, quality, wanted in zip(pictures, official["jpeg_q"], official["jpeg"], strict=True):
        np.testing.assert_allclose(jpeg(view, float(quality)), wanted.transpose(1, 2, 0), atol=2e-6)
    resized = [name for name in official.files if name.startswith(("scale_", "size_"))]
    assert len(resized) == 9
    for name in resized:
        kind, mode, value = name.split("_")
        sides = [int(side) for side in value.split("x")] if kind == "size" else []
        made = interpolate(pictures[0], *sides, mode) if sides else interpolate_by(pictures[0], float(value), mode)
        np.testing.assert_allclose(made, official[name][0].transpose(1, 2, 0), atol=2e-6, err_msg=name)


def test_kernels_are_drawn_in_the_stated_shares(monkeypatch):
    drawn = []
    monkeypatch.setattr(blur_kernels, "bell", lambda family, *rest: drawn.append((family, rest)) or bell(family, *rest))
    rng, count = np.random.default_rng(0), 4000
    kernels = [draw_kernel(rng, KernelConfig()) for _ in range(count)]
    np.testing.assert_allclose([kernel.sum() for kernel in kernels], 1, atol=1e-12)
    # Binomial shares of 4000 draws stay within 4 standard deviations, at most .032.
    assert 1 - len(drawn) / count == pytest.approx(0.1, abs=0.02)
    for family, share in zip(blur_kernels.FAMILIES, KernelConfig().families, strict=True):
        assert np.mean([name == family for name, _ in drawn]) == pytest.approx(share, abs=0.033)
    plateau = np.array([rest[-1] for name, rest in drawn if name.startswith("plateau")])
    assert np.mean(plateau == 1) == pytest.approx(0.5, abs=0.1)
    assert plateau.min() == 1 < plateau.max() <= 2
    general = np.array([rest[-1] for name, rest in drawn if name.startswith("generalized")])
    assert 0.5 <= general.min() < 1 < general.max() <= 4
    sigmas = np.array([rest[1:3] for _, rest in drawn])
    assert 0.2 <= sigmas.min() < 0.25
    assert 2.95 < sigmas.max() <= 3


# Every step on, but none of them strong enough to change anything; JPEG of quality 100 rounds.
GENTLE = DegradationRound(
    blur=0.0, resize=(0.0, 0.0, 1.0), gaussian=1.0, gaussian_sigma=(0.0, 0.0), quality=(99.5, 99.5)
)
UNTOUCHED = Degradation(first=GENTLE, second=GENTLE, shrink=1, final_sinc=0.0, clean_background=False, masked=0.0)


def test_without_strength_nothing_changes():
    views = orbit()
    # JPEG halves chroma whatever its quality; grey has none.
    views[..., :3] = views[..., :1]
    alpha = views[..., 3:] / 255
    over_white = 255 * (views[..., :3] / 255 * alpha + 1 - alpha)
    coarse = degrade_views(views, np.random.default_rng(0), UNTOUCHED)
    assert np.abs(coarse[0] - over_white[0]).max() <= 0.5001
    assert np.abs(coarse[1:] - over_white[1:]).max() < 1.1


def test_degraded_views_follow_from_the_seed_differ_between_views_and_spare_the_input_view():
    views = orbit()
    first, again, other = (degrade_views(views, np.random.default_rng(seed), Degradation()) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    clean = degrade_views(views, np.random.default_rng(0), UNTOUCHED)[0]
    np.testing.assert_array_equal(first[0], clean)
    np.testing.assert_array_equal(other[0], clean)
    assert (first[1] != other[1]).any()
    # The views are equal before, so what differs are draws of their own.
    assert (first[1] != first[2]).any()
    assert (first[1:][views[1:, ..., 3] == 0] == 255).all()
    assert np.abs(first[1].astype(float) - clean)[views[1, ..., 3] > 0].mean() > 2


def test_scale_and_kind_of_noise_belong_to_the_orbit_and_strengths_to_the_view():
    strong = dataclasses.replace(GENTLE, gaussian=0.5, gaussian_sigma=(0.0, 60.0), poisson_scale=(0.0, 0.0), grey=1.0)
    config = dataclasses.replace(UNTOUCHED, first=strong)
    views = np.full((9, 64, 64, 4), 128, np.uint8)
    views[..., 3] = 255
    spreads = []
    for seed in range(8):
        coarse = degrade_views(views, np.random.default_rng(seed), config)[1:].astype(float)
        spreads.append(coarse.std(axis=(1, 2))[:, 0])
    # Poisson noise has no strength here: all views of an orbit have noise, or none has.
    noisy = [spread.max() > 2 for spread in spreads]
    assert 0 < sum(noisy) < 8
    for spread, is_noisy in zip(spreads, noisy, strict=True):
        assert (np.ptp(spread) > 10) if is_noisy else (spread.max() < 2)


def test_how_views_are_enlarged_is_drawn_or_chosen_and_changes_nothing_else():
    views, drawn = orbit(), Degradation()
    for mode in RESIZE_MODES:
        chosen = Degradation(enlarge=mode)
        same = [
            np.array_equal(*(degrade_views(views, np.random.default_rng(seed), config) for config in (drawn, chosen)))
            for seed in range(20)
        ]
        assert 2 <= sum(same) <= 12, f"a third of the orbits would draw {mode}"
    with pytest.raises(ValueError, match="enlarge 'cubic' must be empty or one of"):
        Degradation(enlarge="cubic")


def test_noise_has_the_stated_size():
    rng = np.random.default_rng(0)
    grey_view = np.full((200, 200, 3), 100 / 255, np.float32)
    grey_view[:100] = 200 / 255
    # Two values: two photons at full light, a variance of light / 2.
    noise = poisson_noise(grey_view, rng, grey=False)
    assert noise.shape == (200, 200, 3)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise[:100].var() == pytest.approx(200 / 255 / 2, rel=0.05)
    assert noise[100:].var() == pytest.approx(100 / 255 / 2, rel=0.05)
    assert poisson_noise(grey_view, rng, grey=True).shape == (200, 200, 1)


def test_masks_take_up_to_the_stated_share_and_make_holes_in_the_object():
    rng = np.random.default_rng(0)
    shares = [random_mask(rng, 64, 64, 0.15).mean() for _ in range(200)]
    assert max(shares) <= 0.151
    assert np.mean(shares) == pytest.approx(0.075, abs=0.012)
    views = np.zeros((3, 64, 64, 4), np.uint8)
    views[..., 3] = 255
    coarse = degrade_views(views, np.random.default_rng(3), dataclasses.replace(UNTOUCHED, masked=1.0))
    assert coarse[0].max() == 0
    holes = coarse[1:, ..., 0] > 128
    assert 0 < holes[0].mean() < 0.16
    assert (holes[0] != holes[1]).any()


def test_choices_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        Degradation(first=DegradationRound(resize=(0.5, 0.7, 0.1)))
    with pytest.raises(ValueError, match="shrink 0"):
        Degradation(shrink=0)
