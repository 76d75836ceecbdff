"""Several model folders in one: the stages of a model, as stage1/ and stage2/, and the models that come with hi3d_jax.

What two stages have in common, like their autoencoder, is stored once. A bundle's name is the folder it lies in, the id
of a Hugging Face repository, or, for what the package holds in weights/, a single word: "tiny".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from hi3d_jax.atomic import made_aside
from hi3d_jax.pretrained.folders import download, save_pretrained
from hi3d_jax.pretrained.networks import parameters
from hi3d_jax.pretrained.safetensors_files import PretrainedError

STAGE_FOLDERS = ("stage1", "stage2")
PACKAGED = ("tiny",)
PACKAGED_FOLDER = Path(__file__).resolve().parents[1] / "weights"

# The networks of a model folder by name, and its recipe.
Contents = tuple[Mapping[str, nnx.Module], Mapping[str, Any]]


def save_bundle(folder: str | Path, models: Mapping[str, Contents]) -> dict[str, dict[str, str]]:
    """Writes model folders, by name, into the new `folder`; a network that an earlier one has too is only referred to.

    Returns, for each model, which networks are another's, like {"stage2": {"vae": "../stage1/vae"}}.
    """
    references: dict[str, dict[str, str]] = {}
    with made_aside(folder) as aside:
        aside.mkdir()
        stored: dict[str, nnx.Module] = {}
        for model, (networks, recipe) in models.items():
            references[model] = {}
            for name, network in networks.items():
                same = next((where for where, other in stored.items() if _equal(network, other)), None)
                if same is None:
                    stored[f"../{model}/{name}"] = network
                else:
                    references[model][name] = same
            save_pretrained(aside / model, networks, recipe, references[model])
    return references


def _equal(network: nnx.Module, other: nnx.Module) -> bool:
    """Whether two networks are of one class, configured alike, and hold the same numbers."""
    if type(network) is not type(other) or network.config != other.config:
        return False
    here, there = parameters(network), parameters(other)
    return all(here[path].dtype == there[path].dtype and np.array_equal(here[path], there[path]) for path in here)


def stage_folders(source: str | Path) -> list[str | Path]:
    """The model folders that a source stands for: itself, or its stage1/ and stage2/. Raises `PretrainedError`."""
    if isinstance(source, str) and source in PACKAGED:
        source = packaged(source)
    if not Path(source).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        folder = download(str(source), ["config.json", *(f"{name}/config.json" for name in STAGE_FOLDERS)])
    else:
        folder = Path(source)
    inner = [name for name in STAGE_FOLDERS if (folder / name / "config.json").exists()]
    if not inner or (folder / "config.json").exists():
        return [source]
    return [Path(source) / name if Path(source).is_dir() else f"{source}/{name}" for name in inner]


def packaged(name: str) -> Path:
    """The folder of a model that comes with the package. Raises `PretrainedError` where it is not there."""
    folder = PACKAGED_FOLDER / name
    if not any((folder / stage / "config.json").exists() for stage in STAGE_FOLDERS):
        raise PretrainedError(
            f"the model {name!r} belongs into {folder}, and is not there; install hi3d_jax again from its repository, "
            "or name another model with --model FOLDER"
        )
    return folder
