"""Model folders: a recipe and networks with their weights, written once, loaded anywhere.

    config.json                          recipe, and for each network its class and the fields of its config
    unet/model.safetensors               parameters under their dotted paths
    vae/model-00001-of-00002.safetensors, ..., vae/model.safetensors.index.json      where they exceed 5 GB

Model folders that lie in one folder, as stage1/ and stage2/ do, can share weights: a network whose entry in config.json
says `"weights": "../stage1/vae"` has none of its own (`bundles.save_bundle` writes such).

Loading maps the files and moves one tensor at a time to its devices, already in its dtype and sharding, so that the
weights are never held twice. Whatever does not fit (a config field that does not exist, a tensor missing, left over or
of another shape) is one `PretrainedError` that names everything.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    folder: str | Path,
    networks: Mapping[str, NetworkWeights],
    recipe: Mapping[str, Any] | None = None,
    shared: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder with one network per name; nothing is left behind if that fails.

    `recipe` is what the pipeline has to know beside its networks, as JSON. `shared`: where the weights of some networks
    are already, like "../stage1/vae". Raises `PretrainedError`, and `FileExistsError` where there is something at
    `folder`.
    """
    if not networks:
        raise PretrainedError(f"{folder}: a model folder needs at least one network")
    for weights in networks.values():
        network_class(weights.network.__name__)
    described = {
        name: {"class": weights.network.__name__, "config": config_to_dict(weights.config)}
        for name, weights in networks.items()
    }
    for name, reference in (shared or {}).items():
        described[name]["weights"] = reference
    with made_aside(folder) as aside:
        aside.mkdir()
        for name, weights in networks.items():
            if "weights" not in described[name]:
                (aside / name).mkdir()
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
    folder: str | Path,
    networks: Mapping[str, nnx.Module],
    recipe: Mapping[str, Any] | None = None,
    shared: Mapping[str, str] | None = None,
) -> None:
    """Writes networks (each with its config as attribute `config`) and their recipe as `write_model_folder` does."""
    weights = {}
    for name, network in networks.items():
        values = parameters(network)
        specs = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in values.items()}
        weights[name] = NetworkWeights(type(network), network.config, _Arrays(specs, values))
    write_model_folder(folder, weights, recipe, shared)


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
    dtypes = {"dtype": dtype, "param_dtype": dtype if param_dtype is None else param_dtype}
    abstract, arrays = _opened(source, network, dtypes)
    return with_parameters(abstract, lambda path, spec: _put(arrays[path], path, spec, sharding))


def check_weights(source: str | Path, networks: Iterable[str], dtype: Any = jnp.float32) -> None:
    """Raises `PretrainedError` where weights are missing, cut short or do not fit; of the files only reads headers.

    What a hub has of the model is downloaded first. `dtype` is what the networks will be loaded in.
    """
    for network in networks:
        _opened(source, network, {"dtype": dtype, "param_dtype": dtype})


def _opened(source: str | Path, network: str, dtypes: Mapping[str, Any]) -> tuple[nnx.Module, Mapping[str, np.ndarray]]:
    """The network without its weights, and the weights that fit it, as views of the mapped files."""
    described = read_networks(source)
    if network not in described:
        raise PretrainedError(f"{source} has no network {network!r}; it has {', '.join(described) or 'none'}")
    abstract = abstract_network(*described[network], **dtypes)
    arrays = open_shards(weights_folder(source, network))
    _check_parameters(f"{source}, {network}", parameters(abstract), arrays)
    return abstract, arrays


def weights_folder(source: str | Path, network: str) -> Path:
    """The local folder with the weights of one network, which may be another model's. Raises `PretrainedError`."""
    reference = read_config(source)["networks"][network].get("weights")
    if reference is None:
        return resolve(source, (network,)) / network
    if not re.fullmatch(r"\.\./\w[\w.-]*/\w[\w.-]*", str(reference)):
        raise PretrainedError(
            f"config.json of {source}: the weights of {network} are said to be in {reference!r}, which is no folder of "
            "a model beside it, like ../stage1/vae"
        )
    _, model, name = reference.split("/")
    if Path(source).is_dir():
        folder = Path(source).absolute().parent / model
        if not folder.is_dir():
            raise PretrainedError(f"{folder} is missing, which holds weights of {source}; download it beside that")
        return folder / name
    if str(source).count("/") < 2:
        raise PretrainedError(f"config.json of {source}: there is nothing beside a repository to share {network} with")
    beside = f"{str(source).rpartition('/')[0]}/{model}"
    return resolve(beside, (name,)) / name


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
    """The local folder of a model: itself, or these networks of it from the Hugging Face hub.

    There a model is a repository ("owner/name") or a folder of one ("owner/name/stage1").
    """
    if Path(source).is_dir():
        return Path(source)
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w-][\w.-]*))?", str(source))
    if not found:
        raise PretrainedError(f"{source} is neither a folder nor the id of a repository (owner/name)")
    repository, inner = found[1], f"{found[2]}/" if found[2] else ""
    return download(repository, [f"{inner}config.json", *(f"{inner}{network}/*" for network in networks)]) / inner


def download(repository: str, patterns: list[str]) -> Path:
    """The local copy of a repository of the Hugging Face hub, with the files of these patterns."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise PretrainedError(f'{repository} is not a folder; to download it, pip install "hi3d_jax[hub]"') from error
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise PretrainedError(
            f"{repository} is not a folder, and the Hugging Face hub does not give it ({type(error).__name__}: "
            f"{error}); check the name and the connection, or download the folder by other means and pass its path"
        ) from error
