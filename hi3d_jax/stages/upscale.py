"""Larger views without stage 2: bicubic, or Real-ESRGAN view by view, the baselines of Hi3D's appendix A.

Neither sees more than one view at a time, so neither makes views agree; stage 2 has to beat both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from hi3d_jax.evaluation import load_network
from hi3d_jax.images import resize

UpscalerName = Literal["bicubic", "realesrgan"]
Upscaler = Callable[[Float[np.ndarray, "t h w 3"], int], Float[np.ndarray, "t s s 3"]]


class UpscaleError(ValueError):
    """Views that cannot be enlarged so; the text names the sizes."""


def upscaler(name: UpscalerName, progress: bool = True) -> Upscaler:
    """A function (square views in [0, 1], new width) -> larger views.

    `realesrgan` makes pictures four times as large and reduces them by area means to what was asked. Raises
    `WeightsError` where its weights are not installed, and what it returns `UpscaleError` for sizes it cannot make.
    """
    if name == "bicubic":
        return lambda views, size: np.stack([_bicubic(view, size) for view in _checked(views, size, None)])
    network = load_network("realesrgan")
    graphdef, params = nnx.split(network)
    enlarge = jax.jit(lambda params, view: nnx.merge(graphdef, params)(view[None])[0])

    def realesrgan(views, size):
        made = []
        for view in tqdm(_checked(views, size, 4), desc="upscale", unit="view", disable=None if progress else True):
            made.append(resize(np.clip(np.asarray(enlarge(params, view)), 0, 1), size, size))
        return np.stack(made)

    return realesrgan


def _checked(views: Float[np.ndarray, "t h w 3"], size: int, most: int | None) -> Float[np.ndarray, "t h w 3"]:
    height, width = views.shape[1:3]
    if height != width or size < width or (most is not None and size > most * width):
        limit = "" if most is None else f" and at most {most * width}"
        raise UpscaleError(
            f"views of {width} x {height} pixels cannot be enlarged to {size}: give square views, and a size of at "
            f"least {width}{limit}"
        )
    return views


def _bicubic(view: Float[np.ndarray, "h w 3"], size: int) -> Float[np.ndarray, "s s 3"]:
    channels = [Image.fromarray(np.ascontiguousarray(view[..., channel], np.float32)) for channel in range(3)]
    enlarged = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.clip(np.stack(enlarged, axis=-1), 0, 1)
