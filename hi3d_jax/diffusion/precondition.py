"""EDM preconditioning (Karras et al. 2022, eq. 7) with the scalings of v-prediction (HI3D.md section 4).

D(noisy; sigma) = c_skip noisy + c_out F(c_in noisy; c_noise): data are taken to have variance 1, and the network F
predicts v = (noise - sigma data) / sqrt(sigma^2 + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# (scaled noisy, c_noise) -> F, and (noisy, sigma) -> denoised; the second argument has one number per video.
Network = Callable[[Float[Array, "b t h w c"], Float[Array, " b"]], Float[Array, "b t h w c"]]
Denoise = Callable[[Float[Array, "b t h w c"], Float[Array, " b"]], Float[Array, "b t h w c"]]


class Scalings(NamedTuple):
    """The four coefficients of preconditioning, one number for each noise level."""

    c_skip: Float[Array, "*n"]
    c_out: Float[Array, "*n"]
    c_in: Float[Array, "*n"]
    c_noise: Float[Array, "*n"]


def scalings(sigma: Float[Array, "*n"]) -> Scalings:
    """The coefficients at noise levels `sigma` > 0 (standard deviation of the noise)."""
    variance = sigma**2 + 1
    return Scalings(1 / variance, -sigma / jnp.sqrt(variance), 1 / jnp.sqrt(variance), jnp.log(sigma) / 4)


def precondition(network: Network) -> Denoise:
    """The denoise function of a network that predicts v."""

    def denoise(noisy: Float[Array, "b t h w c"], sigma: Float[Array, " b"]) -> Float[Array, "b t h w c"]:
        s = scalings(sigma)
        f = network(per_video(s.c_in, noisy) * noisy, s.c_noise)
        return per_video(s.c_skip, noisy) * noisy + per_video(s.c_out, noisy) * f

    return denoise


def per_video(values: Float[Array, " b"], like: Float[Array, " b *n"]) -> Float[Array, " b *ones"]:
    """One number per video, shaped to act on all of the video's numbers."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
