"""One training step as a pure function: gradients of the task's loss, the guard, the optimiser, the average.

    (state, frozen, batch) -> (state, metrics)

`frozen` are the values of networks that are used but not trained. Noise is drawn from the state's key and step, so a
step taken again gives the same numbers, on whatever mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hi3d_jax.training.config import GuardConfig, OptimizerConfig
from hi3d_jax.training.networks import Values
from hi3d_jax.training.state import GuardState, TrainState

Batch = Mapping[str, Array]
# (trained values, frozen values, batch, key) -> (mean loss of the batch, metrics)
Loss = Callable[[Values, Values, Batch, Array], tuple[Array, dict[str, Array]]]

# Weight of the newest gradient in the running average of lengths.
NORM_AVERAGE = 0.02


def train_step(
    state: TrainState,
    frozen: Values,
    batch: Batch,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    guard: GuardConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """The next state, and scalars: the loss, the gradient's length, whether the step was skipped, the task's own.

    A step whose gradient is not finite or a spike leaves parameters, optimiser and average as they were.
    """
    key = jax.random.fold_in(state.key, state.step)
    (value, metrics), grads = accumulated_gradients(loss, state.params, frozen, batch, key, config.accumulate)
    norm = optax.tree.norm(grads)
    good, guard_state = _judge(guard, state.guard, value, norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = _averaged(state.ema, params, state.step, config.ema_decay) if state.ema else {}
    params, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (params, opt_state, ema), (state.params, state.opt_state, state.ema)
    )
    metrics = {"loss": value, "gradient_norm": norm, "skipped": guard_state.skipped, **metrics}
    return TrainState(state.step + 1, params, opt_state, ema, state.key, guard_state), metrics


def accumulated_gradients(
    loss: Loss, params: Values, frozen: Values, batch: Batch, key: Array, parts: int
) -> tuple[tuple[Array, dict[str, Array]], Values]:
    """((loss, metrics), gradients), averaged over `parts` equal parts of the batch that come one after the other."""
    gradients = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return gradients(params, frozen, batch, key)

    def split(x: Array) -> Array:
        # Row i goes to part i % parts: every device keeps the rows it has.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def body(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(params, frozen, part[0], part[1])), None

    inputs = jax.tree.map(split, dict(batch)), jax.random.split(key, parts)
    shapes = jax.eval_shape(gradients, params, frozen, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, inputs)
    return jax.tree.map(lambda x: x / parts, total)


def _judge(config: GuardConfig, state: GuardState, loss: Array, norm: Array) -> tuple[Array, GuardState]:
    """Whether the step counts, and what is known after it."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike_factor:
        good &= (state.counted < config.warmup_steps) | (norm <= config.spike_factor * state.mean_norm)
    # The first gradients weigh more, so that the average does not start from nothing.
    weight = jnp.maximum(NORM_AVERAGE, 1 / (state.counted + 1))
    mean = jnp.where(good, (1 - weight) * state.mean_norm + weight * norm, state.mean_norm)
    return good, GuardState(mean, state.counted + good, jnp.where(good, 0, state.skipped + 1))


def _averaged(ema: Values, params: Values, step: Array, decay: float) -> Values:
    # Young averages forget faster, or they would be the random first weights for long.
    decay = jnp.minimum(decay, (step + 1) / (step + 10))
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, params)
