"""Diffusion on any denoise function, as EDM sets it out (Karras et al. 2022): pure functions that know no network.

Latents are [b t h w c]: `b` videos of `t` views. `denoise` is a function (noisy, sigma) -> denoised with one noise
level per video, sigma [b].
"""

from hi3d_jax.diffusion.guidance import guide, guided, linear_guidance
from hi3d_jax.diffusion.loss import edm_loss, edm_loss_and_denoised, lognormal_sigmas
from hi3d_jax.diffusion.precondition import Scalings, precondition, scalings
from hi3d_jax.diffusion.sampler import (
    Stepped,
    blend,
    blend_weights,
    euler,
    euler_step,
    heun,
    heun_step,
    initial_noisy,
)
from hi3d_jax.diffusion.schedule import karras_sigmas

__all__ = [
    "Scalings",
    "Stepped",
    "blend",
    "blend_weights",
    "edm_loss",
    "edm_loss_and_denoised",
    "euler",
    "euler_step",
    "guide",
    "guided",
    "heun",
    "heun_step",
    "initial_noisy",
    "karras_sigmas",
    "linear_guidance",
    "lognormal_sigmas",
    "precondition",
    "scalings",
]
