"""The training loss of both stages (Hi3D eq. 4 and 5, with EDM's noise levels; HI3D.md section 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hi3d_jax.diffusion.precondition import Network, per_video, scalings


def lognormal_sigmas(key: Array, shape: tuple[int, ...], mean: float = 1.0, std: float = 1.6) -> Float[Array, "*shape"]:
    """Noise levels whose logarithm is normal; the defaults are those of both released stages."""
    return jnp.exp(mean + std * jax.random.normal(key, shape))


def edm_loss(
    network: Network,
    latents: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    sigma: Float[Array, " b"],
) -> Float[Array, " b"]:
    """The mean over each video of (sigma^2 + 1) / sigma^2 |D(latents + sigma noise; sigma) - latents|^2.

    Takes what `edm_loss_and_denoised` takes.
    """
    return edm_loss_and_denoised(network, latents, noise, sigma)[0]


def edm_loss_and_denoised(
    network: Network,
    latents: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    sigma: Float[Array, " b"],
) -> tuple[Float[Array, " b"], Float[Array, "b t h w c"]]:
    """`edm_loss`, and the D that it is of.

    `network` is F, as for `precondition`; `latents` are scaled, `noise` is standard normal. The loss's weight is 1 /
    c_out^2, so it is computed as what it equals, |F - v|^2 with v = (noise - sigma latents) / sqrt(sigma^2 + 1): at
    sigma = 0.002 the difference D - latents has lost most of float32's digits.
    """
    sigma = sigma.astype(jnp.float32)
    s = scalings(sigma)
    noisy = latents + per_video(sigma, latents) * noise
    predicted = network(per_video(s.c_in, noisy) * noisy, s.c_noise).astype(jnp.float32)
    v = per_video(s.c_in, noisy) * noise + per_video(s.c_out, noisy) * latents
    losses = jnp.mean((predicted - v) ** 2, axis=(1, 2, 3, 4))
    return losses, per_video(s.c_skip, noisy) * noisy + per_video(s.c_out, noisy) * predicted
