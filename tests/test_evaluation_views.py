import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from hi3d_jax.evaluation import EvaluationError, psnr, ssim, view_scores
from hi3d_jax.evaluation.views import ssim_gaussian
from hi3d_jax.images import over_white, read_image

RNG = np.random.default_rng(0)


def test_psnr_has_its_closed_form():
    image = np.zeros((8, 9, 3), np.float32)
    assert psnr(image, image + np.float32(0.1)) == pytest.approx(20, abs=1e-5)
    assert psnr(image, image) == 100


def test_ssim_equals_the_formula_of_wang_2004_with_a_uniform_window():
    a, b = RNG.uniform(size=(2, 20, 24, 3))
    size = (7, 7, 1)
    mean_a, mean_b = uniform_filter(a, size), uniform_filter(b, size)
    sample = 49 / 48
    var_a = sample * (uniform_filter(a * a, size) - mean_a**2)
    var_b = sample * (uniform_filter(b * b, size) - mean_b**2)
    both = sample * (uniform_filter(a * b, size) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    assert ssim(a, b) == pytest.approx(values[3:-3, 3:-3].mean(), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1)


def test_scores_are_means_of_images_with_and_without_the_first():
    truth = RNG.uniform(0, 0.9, size=(3, 16, 16, 3)).astype(np.float32)
    views = truth.copy()
    views[1] += 0.1
    views[2] += 0.01
    scores = view_scores(views, truth)
    assert scores.psnr == pytest.approx((100 + 20 + 40) / 3, abs=1e-3)
    means = scores.means()
    assert means["psnr_without_first"] == pytest.approx(30, abs=1e-3)
    assert means["ssim"] > means["ssim_without_first"]
    np.testing.assert_allclose(scores.per_view["psnr"], [100, 20, 40], atol=1e-3)


def test_views_that_do_not_match_are_refused():
    views = np.zeros((2, 16, 16, 3), np.float32)
    with pytest.raises(EvaluationError, match="1 missing"):
        view_scores(views, np.zeros((3, 16, 16, 3), np.float32))
    with pytest.raises(EvaluationError, match="two or more"):
        view_scores(views[:1], views[:1])


def test_gaussian_ssim_equals_the_formula_with_windows_inside_the_image():
    a, b = RNG.uniform(0.2, 0.7, size=(2, 1, 20, 24, 3))
    reach = np.arange(-5, 6)
    line = np.exp(-(reach**2) / (2 * 1.5**2))
    window = np.outer(line, line)[..., None] / line.sum() ** 2
    data_range = max(np.ptp(a), np.ptp(b))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for row in range(5, 15):
        for column in range(5, 19):
            x, y = (image[0, row - 5 : row + 6, column - 5 : column + 6] for image in (a, b))
            mean_x, mean_y = ((window * p).sum((0, 1)) for p in (x, y))
            var_x, var_y = ((window * p * p).sum((0, 1)) - m * m for p, m in ((x, mean_x), (y, mean_y)))
            both = (window * x * y).sum((0, 1)) - mean_x * mean_y
            like = (2 * mean_x * mean_y + c1) * (2 * both + c2)
            values.append(like / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    assert ssim_gaussian(a, b)[0] == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim_gaussian(np.ones_like(a), np.ones_like(a))[0] == 1


def test_views_with_values_that_are_no_colours_are_refused():
    truth = RNG.uniform(size=(3, 16, 16, 3)).astype(np.float32)
    broken = truth.copy()
    broken[1, 3, 3] = np.nan
    with pytest.raises(EvaluationError, match=r"views \[1\] hold NaN"):
        view_scores(broken, truth)
    with pytest.raises(EvaluationError, match=r"values from .* to 25\d; scale them to 0 to 1"):
        view_scores(truth, 255 * truth)
    with pytest.raises(EvaluationError, match="resize the true views to 16 x 16"):
        view_scores(truth, np.zeros((3, 32, 32, 3), np.float32))


def test_published_figures_of_syncdreamers_chicken(shared):
    """shared/evaluation/README.md: PSNR 25.413, SSIM 0.8854; torchmetrics 1.9, its border cut off: 0.88566.

    That sums in float32, which loses digits of variances where both images are white.
    """
    folder = shared / "evaluation" / "chicken"
    truth, sample = (
        np.stack([over_white(read_image(folder / kind / f"{view:03d}.png")) for view in range(16)])
        for kind in ("gt", "sample")
    )
    scores = view_scores(sample, truth)
    assert scores.psnr == pytest.approx(25.413, abs=5e-4)
    assert scores.ssim == pytest.approx(0.8854, abs=5e-5)
    assert ssim_gaussian(sample, truth).mean() == pytest.approx(0.88566, abs=2e-4)
