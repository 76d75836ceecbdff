"""Classifier-free guidance with a scale for every view (SVD; HI3D.md section 4).

The scale grows linearly along the orbit: view 0 is the input image, which needs no guidance (scale 1), and each view
after it is guided more.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from hi3d_jax.diffusion.precondition import Denoise


def linear_guidance(num_views: int, minimum: float, maximum: float) -> Float[np.ndarray, " {num_views}"]:
    """Guidance scales from `minimum` at view 0 to `maximum` at the last view."""
    return np.linspace(minimum, maximum, num_views, dtype=np.float32)


def guide(
    cond: Float[Array, "b t h w c"], uncond: Float[Array, "b t h w c"], guidance_scale: Float[Array | np.ndarray, " t"]
) -> Float[Array, "b t h w c"]:
    """uncond + guidance_scale (cond - uncond): 1 gives `cond`, more exaggerates what the conditions changed."""
    return uncond + guidance_scale.reshape(1, -1, 1, 1, 1) * (cond - uncond)


def guided(denoise: Denoise, guidance_scale: Float[Array | np.ndarray, " t"]) -> Denoise:
    """A guided denoise function from one that takes twice the videos: first all without conditions, then all with."""

    def denoise_guided(noisy: Float[Array, "b t h w c"], sigma: Float[Array, " b"]) -> Float[Array, "b t h w c"]:
        both = denoise(jnp.concatenate([noisy, noisy]), jnp.concatenate([sigma, sigma]))
        uncond, cond = jnp.split(both, 2)
        return guide(cond, uncond, guidance_scale)

    return denoise_guided
