"""All that a run is at one moment; with the data's position it is what a checkpoint holds."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from hi3d_jax.training.networks import Values


class GuardState(NamedTuple):
    """What tells an ordinary gradient from a spike."""

    # Running average of gradients' lengths over the steps that counted, and how many did.
    mean_norm: Float[Array, ""]
    counted: Int[Array, ""]
    # Steps skipped in a row up to now.
    skipped: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree, of arrays or of what stands for them (shapes, shardings); `ema` is empty where no average is kept."""

    # int32: steps taken, skipped ones among them.
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    # Of the run, never changed: step number and purpose are folded in.
    key: Any
    guard: Any


def initial_state(params: Values, optimizer: optax.GradientTransformation, *, ema: bool, key: Array) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: donated buffers must not appear twice.
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        key=key,
        guard=GuardState(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
    )
