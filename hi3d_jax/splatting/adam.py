"""Adam (Kingma and Ba 2015) over Gaussians, with a learning rate for each kind of parameter and resettable moments."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hi3d_jax.splatting.gaussians import Gaussians

DECAY_FIRST, DECAY_SECOND = 0.9, 0.99
EPSILON = 1e-15


class Moments(NamedTuple):
    """Running means of the gradient and of its square, and how many gradients they have seen."""

    first: Gaussians
    second: Gaussians
    count: Int[Array, ""]


def start(gaussians: Gaussians) -> Moments:
    """Moments before the first gradient."""
    zeros = jax.tree.map(jnp.zeros_like, gaussians)
    return Moments(zeros, zeros, jnp.zeros((), jnp.int32))


def update(
    gaussians: Gaussians,
    gradient: Gaussians,
    moments: Moments,
    rates: dict[str, Float[Array, ""] | Float[Array, "k 1"]],
) -> tuple[Gaussians, Moments]:
    """One step; `rates` holds a learning rate for each field of `Gaussians`."""
    count = moments.count + 1
    first = jax.tree.map(lambda m, g: DECAY_FIRST * m + (1 - DECAY_FIRST) * g, moments.first, gradient)
    second = jax.tree.map(lambda m, g: DECAY_SECOND * m + (1 - DECAY_SECOND) * g * g, moments.second, gradient)
    first_bias, second_bias = 1 - DECAY_FIRST**count, 1 - DECAY_SECOND**count

    def moved(name):
        direction = getattr(first, name) / first_bias
        length = jnp.sqrt(getattr(second, name) / second_bias) + EPSILON
        return getattr(gaussians, name) - rates[name] * direction / length

    return Gaussians(**{name: moved(name) for name in rates}), Moments(first, second, count)


def forget(moments: Moments, which: Bool[Array, " n"]) -> Moments:
    """Zero moments for the chosen Gaussians."""

    def cleared(values):
        return jnp.where(which.reshape(-1, *(1,) * (values.ndim - 1)), 0.0, values)

    return Moments(jax.tree.map(cleared, moments.first), jax.tree.map(cleared, moments.second), moments.count)
