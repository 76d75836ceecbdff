"""Low-rank adaptation (Hu et al. 2021): kernel + alpha / rank * down @ up, where only `down` and `up` are trained.

`down` starts random and `up` at zero, so that the first step is the network's own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hi3d_jax.training.config import LoRAConfig

DOWN, UP = ".lora_down", ".lora_up"


def adapted_paths(config: LoRAConfig, network: Mapping[str, Any]) -> list[str]:
    """The matrices of a network that get an update."""
    return [path for path, p in network.items() if p.ndim == 2 and re.fullmatch(config.paths, path)]


def initial_updates(config: LoRAConfig, network: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
    """First `down` [in rank] and `up` [rank out] of every adapted matrix. Raises `ValueError` if there is none."""
    if not (paths := adapted_paths(config, network)):
        raise ValueError(f"lora.paths={config.paths!r} matches no matrix; to train whole networks use lora.rank=0")
    updates = {}
    for path in paths:
        width_in, width_out = network[path].shape
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        updates[path + DOWN] = jax.random.normal(own, (width_in, config.rank)) * width_in**-0.5
        updates[path + UP] = jnp.zeros((config.rank, width_out))
    return updates


def merged(config: LoRAConfig, network: Mapping[str, Any], updates: Mapping[str, Any]) -> dict[str, Any]:
    """The network's values with their updates added."""
    scale = (config.alpha or config.rank) / config.rank
    return {
        path: p + scale * updates[path + DOWN] @ updates[path + UP] if path + DOWN in updates else p
        for path, p in network.items()
    }
