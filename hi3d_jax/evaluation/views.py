"""How near generated or re-rendered views come to the true ones: PSNR, SSIM, and what perceptual metrics are given.

PSNR is taken per image over all pixels and then averaged, as SyncDreamer's eval_nvs.py does. `ssim` is scikit-image's
default (uniform 7 x 7 window, sample covariance); `ssim_gaussian` is what that script calls, torchmetrics' default when
it was written (Gaussian window of 11 pixels, sigma 1.5, data range that of the pair, mean over whole windows; since
1.4.2 torchmetrics also counts windows mirrored at the border, which is more where the border is white). View 0 is the
input: a method that hands it back has an unbounded PSNR there, so means are also given without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float
from skimage.metrics import structural_similarity

SSIM_WINDOW = 7
# What a Gaussian of sigma 1.5, cut off at 3.5 sigma, reaches.
GAUSSIAN_WINDOW = 11
# Of two equal images: the PSNR of an error of one part in 10^10.
MAX_PSNR = 100.0
WITHOUT_FIRST = "_without_first"

# Views and true views in [0, 1] -> one number per view.
Metric = Callable[[Float[np.ndarray, "t h w 3"], Float[np.ndarray, "t h w 3"]], Float[np.ndarray, " t"]]


class EvaluationError(ValueError):
    """Things that cannot be compared; the text names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class ViewScores:
    """`per_view`: metric -> its value for each view. PSNR in dB, SSIM up to 1, distances from 0."""

    per_view: Mapping[str, Float[np.ndarray, " t"]]

    @property
    def psnr(self) -> float:
        """Mean over all views, in dB."""
        return float(self.per_view["psnr"].mean())

    @property
    def ssim(self) -> float:
        """Mean over all views."""
        return float(self.per_view["ssim"].mean())

    def means(self) -> dict[str, float]:
        """Every metric's mean over all views, then every metric's mean without view 0 under `<name>_without_first`."""
        whole = {name: float(values.mean()) for name, values in self.per_view.items()}
        return whole | {name + WITHOUT_FIRST: float(values[1:].mean()) for name, values in self.per_view.items()}


def view_scores(
    views: Float[np.ndarray, "t h w 3"],
    truth: Float[np.ndarray, "t2 h2 w2 3"],
    more: Mapping[str, Metric] | None = None,
) -> ViewScores:
    """PSNR, SSIM and `more` metrics of views, both sRGB in [0, 1] over white. Raises `EvaluationError`."""
    check_comparable(views, truth)
    per_view = {
        "psnr": np.array([psnr(a, b) for a, b in zip(views, truth, strict=True)]),
        "ssim": np.array([ssim(a, b) for a, b in zip(views, truth, strict=True)]),
    }
    return ViewScores(per_view | {name: metric(views, truth) for name, metric in (more or {}).items()})


def check_comparable(views: Float[np.ndarray, "t h w 3"], truth: Float[np.ndarray, "t2 h2 w2 3"]) -> None:
    """Raises `EvaluationError` for numbers, sizes and values of views that cannot be compared."""
    if len(views) != len(truth):
        extra = "extra" if len(views) > len(truth) else "missing"
        raise EvaluationError(
            f"{len(views)} views against {len(truth)} true ones: {abs(len(views) - len(truth))} {extra}; "
            "both must be the same orbit, view for view"
        )
    if views.shape != truth.shape:
        (h, w), (true_h, true_w) = views.shape[1:3], truth.shape[1:3]
        larger = "the views" if h * w > true_h * true_w else "the true views"
        raise EvaluationError(
            f"views of {w} x {h} pixels against true views of {true_w} x {true_h}; resize {larger} to "
            f"{min(w, true_w)} x {min(h, true_h)} (--size {min(w, true_w)} does it by area means)"
        )
    if len(views) < 2 or min(views.shape[1:3]) < SSIM_WINDOW:
        raise EvaluationError(f"views {views.shape}: give two or more, of {SSIM_WINDOW} pixels or more each way")
    for name, images in (("views", views), ("true views", truth)):
        if not np.isfinite(images).all():
            bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3))).tolist()
            raise EvaluationError(f"{name} {bad} hold NaN or infinite values; generate them again")
        if images.min() < -1e-3 or images.max() > 1 + 1e-3:
            raise EvaluationError(
                f"{name} have values from {images.min():.3g} to {images.max():.3g}; scale them to 0 to 1"
            )


def psnr(image: Float[np.ndarray, "h w c"], truth: Float[np.ndarray, "h w c"]) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]; at most `MAX_PSNR`, for equal images."""
    error = float(np.mean((image.astype(np.float64) - truth) ** 2))
    return -10 * np.log10(max(error, 10 ** (-MAX_PSNR / 10)))


def ssim(image: Float[np.ndarray, "h w c"], truth: Float[np.ndarray, "h w c"]) -> float:
    """Structural similarity of images in [0, 1], by the window that the head of this file states."""
    return float(structural_similarity(image, truth, win_size=SSIM_WINDOW, channel_axis=-1, data_range=1.0))


def ssim_gaussian(views: Float[np.ndarray, "t h w 3"], truth: Float[np.ndarray, "t h w 3"]) -> Float[np.ndarray, " t"]:
    """Structural similarity by the Gaussian window of the head of this file, one value per view.

    Raises `EvaluationError` for views smaller than the window.
    """
    if min(views.shape[1:3]) < GAUSSIAN_WINDOW:
        raise EvaluationError(f"views {views.shape}: ssim_gaussian needs {GAUSSIAN_WINDOW} pixels or more each way")
    return np.array([_gaussian_similarity(a, b) for a, b in zip(views, truth, strict=True)])


def _gaussian_similarity(image, truth) -> float:
    data_range = max(float(np.ptp(image)), float(np.ptp(truth)))
    if data_range == 0:  # two images of one colour each: the limit of the formula with its constants gone
        return float(np.array_equal(image, truth))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(image, truth, channel_axis=-1, data_range=data_range, **options))
