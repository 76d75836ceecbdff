"""Samplers of the probability flow (Karras et al. 2022, algorithm 1 without added noise), and stage 2's noise blending.

A sampler is a step repeated over the noise levels: `euler` and `heun` scan over all of them inside one compiled
program, `euler_step` and `heun_step` are for loops that want to look in between (progress, previews).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hi3d_jax.diffusion.precondition import Denoise

Scalar = Float[Array, ""] | np.float32 | float
# Changes the noisy latents before step number `index`: (noisy, index) -> noisy.
BeforeStep = Callable[[Float[Array, "b t h w c"], Int[Array, ""]], Float[Array, "b t h w c"]]


class Stepped(NamedTuple):
    """The latents after a step, and the clean latents that it was headed for."""

    noisy: Float[Array, "b t h w c"]
    denoised: Float[Array, "b t h w c"]


def initial_noisy(
    noise: Float[Array, "b t h w c"], sigmas: Float[Array | np.ndarray, " n"]
) -> Float[Array, "b t h w c"]:
    """Standard normal `noise` as latents of the first noise level: data and noise have variance 1 + sigma^2."""
    return noise * jnp.sqrt(1 + sigmas[0] ** 2)


def euler_step(denoise: Denoise, noisy: Float[Array, "b t h w c"], sigma: Scalar, sigma_next: Scalar) -> Stepped:
    """One step straight towards the denoised latents, from noise level `sigma` to `sigma_next`."""
    denoised = denoise(noisy, jnp.full(len(noisy), sigma))
    return Stepped(noisy + (noisy - denoised) / sigma * (sigma_next - sigma), denoised)


def heun_step(denoise: Denoise, noisy: Float[Array, "b t h w c"], sigma: Scalar, sigma_next: Scalar) -> Stepped:
    """An Euler step corrected by the slope at its end, hence of second order and twice the work.

    The step to noise level 0 stays Euler's: there the slope is not defined.
    """
    there = euler_step(denoise, noisy, sigma, sigma_next)
    slope = (noisy - there.denoised) / sigma

    def corrected(end: Array) -> Array:
        denoised = denoise(end, jnp.full(len(end), sigma_next))
        return noisy + (slope + (end - denoised) / sigma_next) / 2 * (sigma_next - sigma)

    return Stepped(jax.lax.cond(sigma_next > 0, corrected, lambda end: end, there.noisy), there.denoised)


def euler(
    denoise: Denoise,
    noisy: Float[Array, "b t h w c"],
    sigmas: Float[Array | np.ndarray, " n"],
    before_step: BeforeStep | None = None,
) -> Float[Array, "b t h w c"]:
    """Euler steps from the first noise level to the last: `noisy` comes from `initial_noisy`, `sigmas` end in 0."""
    return _scan(euler_step, denoise, noisy, sigmas, before_step)


def heun(
    denoise: Denoise,
    noisy: Float[Array, "b t h w c"],
    sigmas: Float[Array | np.ndarray, " n"],
    before_step: BeforeStep | None = None,
) -> Float[Array, "b t h w c"]:
    """Heun steps from the first noise level to the last; see `euler`."""
    return _scan(heun_step, denoise, noisy, sigmas, before_step)


def _scan(step: Callable, denoise: Denoise, noisy: Array, sigmas, before_step: BeforeStep | None) -> Array:

    def body(noisy, level):
        index, sigma, sigma_next = level
        if before_step is not None:
            noisy = before_step(noisy, index)
        return step(denoise, noisy, sigma, sigma_next).noisy, None

    levels = (jnp.arange(len(sigmas) - 1), jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:]))
    return jax.lax.scan(body, noisy, levels)[0]


def blend_weights(num_steps: int, exponent: float = 40.0) -> Float[np.ndarray, " {num_steps}"]:
    """How much of the coarse views each step starts from: ((1 + cos(i / num_steps)) / 2)^exponent, 1 at first.

    Without pi in the cosine, as in the released code; with its exponent 40 and 25 steps it is 0.2 at step 10 and
    7e-5 at the last (HI3D.md section 0). Not in the paper.
    """
    return (((1 + np.cos(np.arange(num_steps) / num_steps)) / 2) ** exponent).astype(np.float32)


def blend(
    noisy: Float[Array, "b t h w c"],
    latents: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    sigma: Scalar,
    weight: Scalar,
) -> Float[Array, "b t h w c"]:
    """`noisy` drawn by `weight` towards the coarse views' `latents` (scaled) under the noise sampling started from."""
    return noisy * (1 - weight) + (latents + noise * sigma) * weight
