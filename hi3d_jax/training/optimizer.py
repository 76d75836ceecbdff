"""AdamW and Muon by optax, with a schedule, clipping and parameter groups, as the config says."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from hi3d_jax.training.config import OptimizerConfig, ParameterGroup
from hi3d_jax.training.networks import Values

# Root mean square of AdamW's steps in units of the learning rate, which Muon's are given (Liu et al. 2025).
ADAM_RMS = 0.2


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimiser of `{network: {path: parameter}}`. Frozen groups have no moments."""
    groups = (*config.groups, ParameterGroup(".*"))
    transforms = {str(index): _group_optimizer(config, group) for index, group in enumerate(groups)}

    def labels(params: Values) -> dict[str, dict[str, str]]:
        return {
            name: {path: _group_of(groups, f"{name}.{path}") for path in network} for name, network in params.items()
        }

    by_group = optax.multi_transform(transforms, labels)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), by_group) if config.clip_norm else by_group


def _group_of(groups: tuple[ParameterGroup, ...], path: str) -> str:
    return next(str(index) for index, group in enumerate(groups) if re.fullmatch(group.paths, path))


def _group_optimizer(config: OptimizerConfig, group: ParameterGroup) -> optax.GradientTransformation:
    if not group.learning_rate_factor:
        return optax.set_to_zero()

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda p: config.decay_vectors or p.ndim > 1, params)

    return optax.chain(
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(lambda step: group.learning_rate_factor * learning_rate(config, step)),
    )


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    if config.method == "adamw":
        return adam
    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=_as_matrices),
        # A rotation's numbers have a root mean square of one over the root of its longer side.
        optax.stateless_with_tree_map(lambda u, _: ADAM_RMS * max(u.size // u.shape[-1], u.shape[-1]) ** 0.5 * u),
    )
    return optax.partition(
        {"matrix": muon, "vector": adam},
        lambda params: jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params),
    )


def _as_matrices(params: Any) -> Any:
    """How Muon sees arrays: all axes before the last are inputs."""
    return jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1), params)


def learning_rate(config: OptimizerConfig, step: jax.Array | int) -> jax.Array:
    """The learning rate of the step with this number, counted from 0."""
    step = jnp.asarray(step, jnp.float32)
    rate = config.learning_rate * jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return rate
    progress = jnp.clip((step - config.decay_start) / config.decay_steps, 0.0, 1.0)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return rate * (config.final_fraction + (1 - config.final_fraction) * left)
