"""Perceptual distances between whole orbits: LPIPS on AlexNet and VGG16, DISTS. Lower is nearer.

Each is a compiled function from views and true views in [0, 1] to one number per view. A few views go at once, which
bounds the memory (VGG16 keeps 64 channels at full size).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from hi3d_jax.evaluation.published_weights import load_network
from hi3d_jax.evaluation.views import Metric, ssim_gaussian

# Pixels of one call, both images counted: about 1 GB of features.
PIXELS_AT_ONCE = 1 << 19


def perceptual_metrics(names: Iterable[str], folder: str | Path | None = None) -> dict[str, Metric]:
    """The metrics of these names, their weights from `folder` or the installed packages. Raises `WeightsError`."""
    return {name: metric_of(load_network(name, folder)) for name in names}


# What the protocols report beside PSNR and SSIM 7 x 7.
BY_PROTOCOL = {
    "syncdreamer": ("ssim_gaussian", "lpips_vgg"),
    "strict": ("lpips_vgg", "lpips_alex", "dists"),
}


def view_metrics(
    protocol: str, chosen: Iterable[str] | None = None, folder: str | Path | None = None
) -> dict[str, Metric]:
    """The metrics of a protocol beside PSNR and SSIM; `chosen` replaces its perceptual ones. Raises `WeightsError`."""
    wanted = BY_PROTOCOL[protocol]
    exact = {"ssim_gaussian": ssim_gaussian} if "ssim_gaussian" in wanted else {}
    perceptual = [name for name in wanted if name not in exact] if chosen is None else chosen
    return exact | perceptual_metrics(perceptual, folder)


def metric_of(network: nnx.Module) -> Metric:
    """Makes a network that compares images in [-1, 1] a metric of whole orbits in [0, 1]."""
    graphdef, params = nnx.split(network)
    distance = jax.jit(lambda params, images, references: nnx.merge(graphdef, params)(images, references))

    def metric(views, truth):
        at_once = max(PIXELS_AT_ONCE // (2 * views.shape[1] * views.shape[2]), 1)
        at_once = min(at_once, len(views))
        # Filled up with copies of the last view, so that one program fits all calls.
        padded = -(-len(views) // at_once) * at_once
        order = np.minimum(np.arange(padded), len(views) - 1).reshape(-1, at_once)
        parts = [distance(params, 2 * views[part] - 1, 2 * truth[part] - 1) for part in order]
        return np.concatenate([np.asarray(part) for part in parts])[: len(views)].astype(np.float64)

    return metric
