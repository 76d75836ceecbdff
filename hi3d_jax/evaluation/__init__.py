"""Evaluation: named protocols that compare views and surfaces with the truth."""

from hi3d_jax.evaluation.perceptual import perceptual_metrics, view_metrics
from hi3d_jax.evaluation.protocols import (
    StrictScores,
    SyncdreamerScores,
    check_frame,
    floors,
    strict,
    syncdreamer,
    syncdreamer_cameras,
)
from hi3d_jax.evaluation.published_weights import WeightsError, load_network
from hi3d_jax.evaluation.self_consistency import self_consistency
from hi3d_jax.evaluation.tables import Row, Summary, summarise
from hi3d_jax.evaluation.views import EvaluationError, ViewScores, psnr, ssim, view_scores

__all__ = [
    "EvaluationError",
    "Row",
    "StrictScores",
    "Summary",
    "SyncdreamerScores",
    "ViewScores",
    "WeightsError",
    "check_frame",
    "floors",
    "load_network",
    "perceptual_metrics",
    "psnr",
    "self_consistency",
    "ssim",
    "strict",
    "summarise",
    "syncdreamer",
    "syncdreamer_cameras",
    "view_metrics",
    "view_scores",
]
