"""Writes a model folder for PyTorch tools: python converters/export.py MODEL_FOLDER -o FILE --layout sgm|diffusers

The layout sgm is one .safetensors file with the keys of the Hi3D and SVD checkpoints; diffusers is a folder with unet/,
vae/ and image_encoder/, each with the config.json that diffusers or transformers reads. Tensors are bit-equal to those
that the folder was converted from, where their dtype was kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from converters import autoencoder, image_encoder, svd_unet
from converters.checkpoints import SGM
from converters.diffusers_configs import TO_DIFFUSERS
from converters.rules import Plan, Rule, plan_export
from hi3d_jax.atomic import made_aside
from hi3d_jax.models.vae import TemporalDecoderConfig
from hi3d_jax.pretrained import (
    PretrainedError,
    open_shards,
    read_networks,
    resolve,
    write_safetensors,
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A network of a model folder: its config and its mapped weights."""

    config: Any
    weights: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Joined:
    """The tensors of several plans in one file, each plan's under its prefix."""

    plans: Mapping[str, Plan]

    @property
    def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {f"{prefix}{key}": spec for prefix, plan in self.plans.items() for key, spec in plan.specs.items()}

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for prefix, plan in self.plans.items():
            for key, array in plan.arrays():
                yield f"{prefix}{key}", array


def read_folder(folder: str | Path) -> dict[str, Stored]:
    """The networks of a model folder. Raises `PretrainedError`."""
    return {
        name: Stored(config, open_shards(resolve(folder, (name,)) / name))
        for name, (_, config) in read_networks(folder).items()
    }


def write_sgm(path: str | Path, networks: Mapping[str, Stored]) -> None:
    """One file in sgm's layout.

    A folder without a conditioning_vae had two equal image autoencoders in its source; the file has both again.
    """
    vae = networks.get("vae")
    if vae and "conditioning_vae" not in networks and not isinstance(vae.config, TemporalDecoderConfig):
        networks = {**networks, "conditioning_vae": vae}
    plans = {}
    for name, network in networks.items():
        prefix, rules = SGM[name]
        plans[prefix] = plan_export(network.weights, rules(network.config))
    write_safetensors(path, Joined(plans))


def _diffusers_rules(name: str, config: Any) -> Sequence[Rule]:
    if name == "unet":
        return svd_unet.diffusers_rules(config)
    if name == "image_encoder":
        return image_encoder.RULES
    temporal = isinstance(config, TemporalDecoderConfig)
    return autoencoder.temporal_diffusers_rules(config) if temporal else autoencoder.diffusers_rules(config)


# Network -> name of its weights file in a diffusers pipeline's folder.
DIFFUSERS_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "image_encoder": "model.safetensors",
}


def write_diffusers(folder: str | Path, networks: Mapping[str, Stored]) -> None:
    """A folder in diffusers' layout."""
    with made_aside(folder) as aside:
        for name, network in networks.items():
            config = TO_DIFFUSERS[type(network.config)](network.config)
            plan = plan_export(network.weights, _diffusers_rules(name, network.config))
            write_safetensors(aside / name / DIFFUSERS_FILES[name], plan)
            (aside / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 if all went well."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest)
    parser.add_argument("folder", metavar="MODEL_FOLDER")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="file (sgm) or folder (diffusers) to write"
    )
    parser.add_argument("--layout", required=True, choices=("sgm", "diffusers"))
    options = parser.parse_args(arguments)
    try:
        stored = read_folder(options.folder)
        placed = SGM if options.layout == "sgm" else DIFFUSERS_FILES
        networks = {name: network for name, network in stored.items() if name in placed}
        if not networks:
            raise PretrainedError(
                f"{options.folder} has no network that {options.layout} knows, only {', '.join(stored)}"
            )
        for name in itertools.filterfalse(placed.__contains__, stored):
            print(f"left out {name}: it has no place in the layout {options.layout}")
        (write_sgm if options.layout == "sgm" else write_diffusers)(options.output, networks)
    except (ValueError, OSError) as error:
        print(f"error: {error}\nnothing was written", file=sys.stderr)
        return 1
    print(f"wrote {options.output}: {', '.join(networks)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
