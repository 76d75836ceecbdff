"""Model folders: a recipe and networks with their weights, written once, loaded anywhere.

    config.json                          recipe, and for each network its class and the fields of its config
    unet/model.safetensors               parameters under their dotted paths
    vae/model-00001-of-00002.safetensors, ..., vae/model.safetensors.index.json      where they exceed 5 GB

Loading maps the files and moves one tensor at a time to its devices, already in its dtype and sharding, so that the
weights are never held twice. Whatever does not fit (a config field that does not exist, a tensor missing, left over or
of another shape) is one `PretrainedError` that names everything.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hi3d_jax.atomic import made_aside
from hi3d_jax.pretrained.configs import config_from_dict, config_to_dict
from hi3d_jax.pretrained.networks import abstract_network, config_class, network_class, parameters, with_parameters
from hi3d_jax.pretrained.safetensors_files import PretrainedError, Tensors, open_shards, write_shards

Sharding = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class NetworkWeights:
    """A network as a model folder has it: class, config and weights."""

    network: type[nnx.Module]
    config: Any
    tensors: Tensors


def write_model_folder(
    folder: str | Path, networks: Mapping[str, NetworkWeights], recipe: Mapping[str, Any] | None = None
) -> None:
    """Writes a model folder with one network per name; nothing is left behind if that fails.

    `recipe` is what the pipeline has to know beside its networks, as JSON. Raises `PretrainedError`, and
    `FileExistsError` where there is something at `folder`.
    """
    if not networks:
        raise PretrainedError(f"{folder}: a model folder needs at least one network")
    for weights in networks.values():
        network_class(weights.network.__name__)
    described = {
        name: {"class": weights.network.__name__, "config": config_to_dict(weights.config)}
        for name, weights in networks.items()
    }
    with made_aside(folder) as aside:
        for name, weights in networks.items():
            (aside / name).mkdir(parents=True)
            write_shards(aside / name, weights.tensors)
        config = {"recipe": dict(recipe or {}), "networks": described}
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Parameters on devices as `Tensors`: fetched one at a time."""

    specs: Mapping[str, jax.ShapeDtypeStruct]
    values: Mapping[str, jax.Array]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((path, np.asarray(value)) for path, value in self.values.items())


def save_pretrained(
    folder: str | Path, networks: Mapping[str, nnx.Module], recipe: Mapping[str, Any] | None = None
) -> None:
    """Writes networks (each with its config as attribute `config`) and their recipe as a model folder."""
    weights = {}
    for name, network in networks.items():
        values = parameters(network)
        specs = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in values.items()}
        weights[name] = NetworkWeights(type(network), network.config, _Arrays(specs, values))
    write_model_folder(folder, weights, recipe)


def read_config(source: str | Path) -> dict[str, Any]:
    """The contents of a model folder's config.json: `recipe`, and `networks` by name. Raises `PretrainedError`."""
    path = resolve(source, ()) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} cannot be read ({error}); is {source} a model folder?") from error
    if not (isinstance(config, dict) and isinstance(config.get("networks"), dict)):
        raise PretrainedError(f"{path} has no networks; a model folder's config.json lists them")
    return config


def read_networks(source: str | Path) -> dict[str, tuple[type[nnx.Module], Any]]:
    """The class and the config of each network of a model folder. Raises `PretrainedError`."""
    networks = {}
    for name, described in read_config(source)["networks"].items():
        try:
            cls, fields = network_class(described["class"]), described["config"]
        except (KeyError, TypeError) as error:
            raise PretrainedError(f"config.json of {source}: network {name!r} needs a class and a config") from error
        networks[name] = cls, config_from_dict(config_class(cls), fields, f"{name}.config")
    return networks


def from_pretrained(
    source: str | Path,
    network: str,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: Sharding | None = None,
) -> nnx.Module:
    """One network of a model folder, by its name there ("unet"), with its weights.

    `source` is a folder or the id of a Hugging Face repository ("owner/name"). `dtype` is what the network computes in,
    `param_dtype` what its parameters are stored in (None: the same). `sharding` is one for all parameters or a function
    of (dotted path, shape and dtype); None puts them on the default device. Raises `PretrainedError`.
    """
    described = read_networks(source)
    if network not in described:
        raise PretrainedError(f"{source} has no network {network!r}; it has {', '.join(described) or 'none'}")
    cls, config = described[network]
    abstract = abstract_network(cls, config, dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype)
    arrays = open_shards(resolve(source, (network,)) / network)
    _check_parameters(f"{source}, {network}", parameters(abstract), arrays)
    return with_parameters(abstract, lambda path, spec: _put(arrays[path], path, spec, sharding))


def _put(array: np.ndarray, path: str, spec: jax.ShapeDtypeStruct, sharding: Sharding | None) -> jax.Array:
    """The mapped array on its devices: each device's part is read and cast on its own.

    `np.array` copies, so that nothing on a CPU "device" depends on the file any more.
    """
    chosen = sharding(path, spec) if callable(sharding) else sharding
    if chosen is None:
        return jnp.asarray(np.array(array, spec.dtype))
    return jax.make_array_from_callback(spec.shape, chosen, lambda index: np.array(array[index], spec.dtype))


def _check_parameters(
    where: str, expected: Mapping[str, jax.ShapeDtypeStruct], arrays: Mapping[str, np.ndarray]
) -> None:
    problems = [f"{path} is missing" for path in expected if path not in arrays]
    problems += [f"{path} belongs to no parameter" for path in arrays if path not in expected]
    for path, array in arrays.items():
        spec = expected.get(path)
        if spec is not None and array.shape != spec.shape:
            problems.append(f"{path} has shape {array.shape}, the network needs {spec.shape}")
        if spec is not None and not jnp.issubdtype(array.dtype, jnp.inexact):
            problems.append(f"{path} has dtype {array.dtype}, which is not floating-point")
    if problems:
        raise PretrainedError(f"{where}: {len(problems)} problem(s) with the weights:\n  " + "\n  ".join(problems))


def resolve(source: str | Path, networks: tuple[str, ...]) -> Path:
    """The local folder of a model: itself, or these networks of it from the Hugging Face hub."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise PretrainedError(f"{source} is neither a folder nor the id of a repository (owner/name)")
    try:
        import huggingface_hub
    except ImportError as error:
        raise PretrainedError(f"{source} is not a folder; to download it, pip install huggingface_hub") from error
    try:
        patterns = ["config.json", *(f"{network}/*" for network in networks)]
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise PretrainedError(
            f"{source} is not a folder, and the Hugging Face hub does not give it ({type(error).__name__}: {error}); "
            "check the name and the connection, or download the folder by other means and pass its path"
        ) from error
