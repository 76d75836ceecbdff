"""Networks by the name that config.json gives them, and their parameters by dotted path.

The dotted path ("down_blocks.0.resnets.0.conv1.kernel") is the one name of a parameter: in model folders, in the
converters' tables and in sharding rules.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from hi3d_jax.pretrained.safetensors_files import PretrainedError

# Class name in config.json -> module that has it; the class's first argument is annotated with its config's class.
NETWORK_MODULES = {
    "UNet": "hi3d_jax.models.unet",
    "Autoencoder": "hi3d_jax.models.vae",
    "TemporalAutoencoder": "hi3d_jax.models.vae",
    "CLIPVision": "hi3d_jax.models.clip",
    "DPT": "hi3d_jax.models.depth",
    "AestheticPredictor": "hi3d_jax.models.aesthetic",
    "LPIPS": "hi3d_jax.models.lpips",
    "DISTS": "hi3d_jax.models.dists",
    "RRDBNet": "hi3d_jax.models.rrdb",
}


def network_class(name: str) -> type[nnx.Module]:
    """The class that config.json calls `name`."""
    if name not in NETWORK_MODULES:
        raise PretrainedError(f"network class {name!r} is unknown; there are {', '.join(sorted(NETWORK_MODULES))}")
    return getattr(importlib.import_module(NETWORK_MODULES[name]), name)


def config_class(network: type[nnx.Module]) -> type:
    """The dataclass that configures a network: the annotation of its argument `config`."""
    annotation = inspect.signature(network.__init__).parameters["config"].annotation
    return vars(inspect.getmodule(network))[annotation] if isinstance(annotation, str) else annotation


def abstract_network(network: type[nnx.Module], config: Any, **dtypes: Any) -> nnx.Module:
    """The network without its weights: every parameter is a ShapeDtypeStruct, and nothing is allocated."""
    return nnx.merge(*_traced(network, config, tuple(sorted(dtypes.items()))))


@functools.cache
def _traced(network: type[nnx.Module], config: Any, dtypes: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    """A network's structure and its parameters' shapes: tracing a U-Net takes a second, and programs ask repeatedly."""
    return nnx.split(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0), **dict(dtypes))))


def parameters(network: nnx.Module) -> dict[str, Any]:
    """The parameters (arrays, or ShapeDtypeStructs of an abstract network) by dotted path."""
    return {_dotted(path): param.get_value() for path, param in nnx.to_flat_state(nnx.state(network, nnx.Param))}


def with_parameters(network: nnx.Module, values: Callable[[str, jax.ShapeDtypeStruct], Any]) -> nnx.Module:
    """A copy of `network` whose parameters are `values(dotted path, shape and dtype)`."""
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    flat = [
        (path, param.replace(values(_dotted(path), jax.ShapeDtypeStruct(param.shape, param.dtype))))
        for path, param in nnx.to_flat_state(params)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat), rest)


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in path)
