"""Sinusoidal embeddings of the scalars that condition the U-Net (HI3D.md section 2, "Sinusoid everywhere").

Convention of every released checkpoint: cosines first, then sines, frequencies 10000^(-k / half) for k < half, and an
odd dimension ends in one zero. Values go in raw: elevation in signed whole degrees, cond_aug as the noise's standard
deviation, c_noise = ln(sigma) / 4, the frame index counted from 0.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

MAX_PERIOD = 10_000.0
VECTOR_DIM = 256
# The predictor's scores lie near 5: a hundredfold they spread over the sinusoid's periods.
AESTHETIC_SCALE = 100.0


def sinusoidal_embedding(values: Shaped[Array, "*n"], dim: int) -> Float[Array, "*n {dim}"]:
    """[cos(v f_0) ... cos(v f_half-1), sin(v f_0) ...] in float32 for every value, zero-padded where `dim` is odd."""
    half = dim // 2
    frequencies = np.exp(-math.log(MAX_PERIOD) / half * np.arange(half)).astype(np.float32)
    angles = jnp.expand_dims(values.astype(jnp.float32), -1) * jnp.broadcast_to(frequencies, (*values.shape, half))
    odd = jnp.zeros((*values.shape, dim % 2), jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), odd], axis=-1)


def scalar_vector(values: Shaped[Array, "b n"]) -> Float[Array, "b 256*n"]:
    """The part of the U-Net's added vector that stands for `n` scalars a row: 256 numbers for each, side by side."""
    return sinusoidal_embedding(values, VECTOR_DIM).reshape(len(values), -1)


def aesthetic_vector(score: Float[Array, " b"]) -> Float[Array, "b 256"]:
    """Stage 1's aesthetic slot: the raw score, then the sinusoid of a hundred times the score in 255 numbers."""
    score = score.astype(jnp.float32)
    wave = sinusoidal_embedding(AESTHETIC_SCALE * score, VECTOR_DIM - 1)
    return jnp.concatenate([score[:, None], wave], axis=-1)
