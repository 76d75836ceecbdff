"""From checkpoint files and folders to the networks of a model folder, all checked before anything is written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoints import Part, Source, Weights, identify
from converters.rules import ConversionError, Plan, plan
from converters.torch_file import CheckpointError, open_checkpoint
from hi3d_jax.pretrained import NetworkWeights, abstract_network, open_shards, parameters

# A diffusers pipeline's folders that hold networks of ours.
_PIPELINE_FOLDERS = ("unet", "vae", "image_encoder")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")

# Changes a U-Net's weights and config into those of another: one of converters/initialise.py.
Initialise = Callable[[Plan, Any], tuple[Plan, Any]]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint's tensors, the config.json beside it, and lines about what was unwrapped or left out."""

    path: Path
    weights: Weights
    config: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Converted:
    """Networks by name, ready to be written, the recipe of their model, and lines for the report."""

    networks: Mapping[str, NetworkWeights]
    recipe: Mapping[str, Any]
    report: tuple[str, ...]


def open_source(path: str | Path, inert: Collection[str] = ()) -> list[Opened]:
    """The checkpoint of a file or of a folder with weights and config.json, or those of a diffusers pipeline's folder.

    `inert` is that of `open_checkpoint`. Raises `CheckpointError`.
    """
    path = Path(path)
    if not path.is_dir():
        checkpoint = open_checkpoint(path, inert)
        return [Opened(path, checkpoint, _config(path.parent), checkpoint.notes)]
    folders = [path, *(path / name for name in _PIPELINE_FOLDERS)]
    opened = [found for folder in folders if (found := _open_folder(folder, inert))]
    if not opened:
        raise CheckpointError(
            f"{path} has no weights (model.safetensors or the like), nor have unet/, vae/, image_encoder/"
        )
    return opened


def _open_folder(folder: Path, inert: Collection[str]) -> Opened | None:
    for stem in _STEMS:
        if (folder / f"{stem}.safetensors.index.json").exists():
            return Opened(folder, open_shards(folder, stem), _config(folder))
    for ending in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
        for stem in _STEMS:
            if (folder / f"{stem}{ending}").exists():
                checkpoint = open_checkpoint(folder / f"{stem}{ending}", inert)
                return Opened(folder, checkpoint, _config(folder), checkpoint.notes)
    return None


def _config(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return config


def prepare(
    opened: Sequence[Opened], ignore: Sequence[str] = (), dtype: Any = None, initialise: Initialise | None = None
) -> Converted:
    """The networks of all checkpoints, checked but not yet converted.

    `ignore` are regular expressions of source keys to leave out, matched in full; `dtype` is that of `plan`;
    `initialise` is applied to the network "unet". Raises one `ConversionError` with the problems of all checkpoints.
    """
    networks: dict[str, NetworkWeights] = {}
    recipe: dict[str, Any] = {}
    report, problems = [], []
    for each in opened:
        weights = {key: each.weights[key] for key in each.weights if not any(re.fullmatch(p, key) for p in ignore)}
        try:
            source = identify(weights, each.config)
            report += [f"{each.path}: {source.kind}", *(f"  {note}" for note in each.notes)]
            problems += [f"{each.path}: {problem}" for problem in _unclaimed(weights, source)]
            report += _ignored(weights, source, len(each.weights) - len(weights))
            recipe |= source.recipe
        except ConversionError as error:
            problems += [f"{each.path}: {problem}" for problem in error.problems]
            continue
        for part in source.parts:
            if part.name in networks:
                problems.append(f"{each.path}: the network {part.name} came from an earlier source already")
            elif _is_copy(part, source, weights):
                report.append(f"  {part.prefix}* equals {part.copy_of}, which is stored once")
            else:
                try:
                    networks[part.name] = _network(part, weights, dtype, initialise)
                except ConversionError as error:
                    problems += [f"{each.path}, {part.name}: {problem}" for problem in error.problems]
    if initialise is not None and "unet" not in networks and not problems:
        problems.append("there is no U-Net to start a stage from")
    if problems:
        raise ConversionError(problems)
    return Converted(networks, recipe, tuple(report))


def _network(part: Part, weights: Weights, dtype: Any, initialise: Initialise | None) -> NetworkWeights:
    expected = parameters(abstract_network(part.network, part.config))
    planned, config = plan(_under(weights, part.prefix), expected, part.rules, part.ignore, dtype), part.config
    if part.name == "unet" and initialise is not None:
        planned, config = initialise(planned, config)
    return NetworkWeights(part.network, config, planned)


def _under(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}


def _is_copy(part: Part, source: Source, weights: Weights) -> bool:
    """Whether a part's tensors are, bit for bit, those of the part that it may be a copy of."""
    if part.copy_of is None:
        return False
    original = next(other for other in source.parts if other.name == part.copy_of)
    ours, theirs = _under(weights, part.prefix), _under(weights, original.prefix)
    return ours.keys() == theirs.keys() and all(
        array.shape == theirs[key].shape and array.dtype == theirs[key].dtype and np.array_equal(array, theirs[key])
        for key, array in ours.items()
    )


def _unclaimed(weights: Weights, source: Source) -> list[str]:
    prefixes = tuple(part.prefix for part in source.parts)
    ignored = [re.compile(pattern) for pattern, _ in source.ignore]
    return [
        f"{key}: no network claims it"
        for key in weights
        if not key.startswith(prefixes) and not any(pattern.fullmatch(key) for pattern in ignored)
    ]


def _ignored(weights: Weights, source: Source, asked: int) -> list[str]:
    """A line for each reason why keys are left out."""
    counts: dict[str, int] = {"you asked for it": asked}
    for prefix, ignore in (("", source.ignore), *((part.prefix, part.ignore) for part in source.parts)):
        for pattern, reason in ignore:
            found = sum(re.fullmatch(pattern, key) is not None for key in _under(weights, prefix))
            counts[reason] = counts.get(reason, 0) + found
    return [f"  left out {count} keys: {reason}" for reason, count in counts.items() if count]
