"""How near generated or re-rendered views come to the true ones: PSNR and SSIM.

PSNR is taken per image over all pixels and then averaged, as SyncDreamer's eval_nvs.py does. SSIM is scikit-image's
default (uniform 7 x 7 window, sample covariance, mean over pixels and channels, data range 1). View 0 is the input:
a method that hands it back has an unbounded PSNR there, so both means are also given without it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from skimage.metrics import structural_similarity

SSIM_WINDOW = 7
# Of two equal images: the PSNR of an error of one part in 10^10.
MAX_PSNR = 100.0


class EvaluationError(ValueError):
    """Things that cannot be compared; the text names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class ViewScores:
    """Means over views, with and without view 0, and the values of each view. PSNR in dB, SSIM up to 1."""

    psnr: float
    ssim: float
    psnr_without_first: float
    ssim_without_first: float
    psnr_per_view: Float[np.ndarray, " t"]
    ssim_per_view: Float[np.ndarray, " t"]


def view_scores(views: Float[np.ndarray, "t h w 3"], truth: Float[np.ndarray, "t2 h2 w2 3"]) -> ViewScores:
    """Compares views with the true ones, both sRGB in [0, 1] over white. Raises `EvaluationError`."""
    if views.shape != truth.shape:
        raise EvaluationError(f"views {views.shape} and true views {truth.shape} differ in shape; resize one of them")
    if len(views) < 2 or min(views.shape[1:3]) < SSIM_WINDOW:
        raise EvaluationError(f"views {views.shape}: give two or more, of {SSIM_WINDOW} pixels or more each way")
    psnrs = np.array([psnr(a, b) for a, b in zip(views, truth, strict=True)])
    ssims = np.array([ssim(a, b) for a, b in zip(views, truth, strict=True)])
    means = (float(part.mean()) for part in (psnrs, ssims, psnrs[1:], ssims[1:]))
    return ViewScores(*means, psnrs, ssims)


def psnr(image: Float[np.ndarray, "h w c"], truth: Float[np.ndarray, "h w c"]) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]; at most `MAX_PSNR`, for equal images."""
    error = float(np.mean((image.astype(np.float64) - truth) ** 2))
    return -10 * np.log10(max(error, 10 ** (-MAX_PSNR / 10)))


def ssim(image: Float[np.ndarray, "h w c"], truth: Float[np.ndarray, "h w c"]) -> float:
    """Structural similarity of images in [0, 1], by the window that the head of this file states."""
    return float(structural_similarity(image, truth, win_size=SSIM_WINDOW, channel_axis=-1, data_range=1.0))
