"""Networks as training holds them: values by network's name and dotted path, put into modules inside the step."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hi3d_jax.pretrained import (
    PretrainedError,
    abstract_network,
    from_pretrained,
    parameters,
    read_networks,
    with_parameters,
)

# {network: {dotted path: array}}
Values = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """A network that a task needs: its class and config and, for one that is not trained, the folder it comes from."""

    network: type[nnx.Module]
    config: Any
    source: str = ""

    def abstract(self, dtype: Any, param_dtype: Any = jnp.float32) -> nnx.Module:
        """The module without values."""
        return abstract_network(self.network, self.config, dtype=dtype, param_dtype=param_dtype)


Specs = Mapping[str, NetworkSpec]


def found_in(sources: Sequence[str], name: str) -> NetworkSpec:
    """The network called `name` of the first of some model folders that has it, to be used as it is.

    Raises `PretrainedError` if none has it.
    """
    for source in sources:
        if name in (networks := read_networks(source)):
            return NetworkSpec(*networks[name], source=str(source))
    raise PretrainedError(f"none of the model folders ({', '.join(map(str, sources)) or 'none given'}) has {name!r}")


def sizes(config: Any) -> Any:
    """A network's config without how its backward pass saves memory, which weights do not depend on."""
    return dataclasses.replace(config, remat="none") if hasattr(config, "remat") else config


def abstract_modules(specs: Specs, dtype: Any) -> dict[str, nnx.Module]:
    """The modules without values, which compute in `dtype`."""
    return {name: spec.abstract(dtype) for name, spec in specs.items()}


def abstract_values(modules: Mapping[str, nnx.Module]) -> Values:
    """Shapes and dtypes of all parameters."""
    return {
        name: {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in parameters(module).items()}
        for name, module in modules.items()
    }


def filled(modules: Mapping[str, nnx.Module], values: Values) -> dict[str, nnx.Module]:
    """The modules with these values."""
    return {name: with_parameters(module, lambda path, _, n=name: values[n][path]) for name, module in modules.items()}


def initial_values(specs: Specs, key: jax.Array) -> Values:
    """Random first weights; a network's do not depend on which others there are."""
    values = {}
    for name, spec in specs.items():
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        values[name] = dict(parameters(spec.network(spec.config, rngs=nnx.Rngs(own))))
    return values


def pretrained_values(
    spec: NetworkSpec, name: str, source: str, sharding: Callable[[str, jax.ShapeDtypeStruct], Any]
) -> dict[str, jax.Array]:
    """A model folder's weights of one network, float32, on their devices. Raises `PretrainedError` for other sizes."""
    if not source:
        raise PretrainedError(f"no folder is given for the network {name!r}: set task.networks to one that has it")
    found = found_in([source], name)
    if (found.network, sizes(found.config)) != (spec.network, sizes(spec.config)):
        raise PretrainedError(
            f"{name} of {source} is {found.network.__name__} with {found.config}, the run wants "
            f"{spec.network.__name__} with {spec.config}: give the run the folder's sizes"
        )
    return dict(parameters(from_pretrained(source, name, param_dtype=jnp.float32, sharding=sharding)))
