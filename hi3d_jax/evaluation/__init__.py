"""Evaluation: named protocols that compare views and surfaces with the truth."""

from hi3d_jax.evaluation.protocols import (
    StrictScores,
    SyncdreamerScores,
    floors,
    strict,
    syncdreamer,
    syncdreamer_cameras,
)
from hi3d_jax.evaluation.views import EvaluationError, ViewScores, psnr, ssim, view_scores

__all__ = [
    "EvaluationError",
    "StrictScores",
    "SyncdreamerScores",
    "ViewScores",
    "floors",
    "psnr",
    "ssim",
    "strict",
    "syncdreamer",
    "syncdreamer_cameras",
    "view_scores",
]
