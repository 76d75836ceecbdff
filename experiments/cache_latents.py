"""Caches what frozen networks make of a data set's views, so that a U-Net's training need not run them every step.

    python experiments/cache_latents.py train256 -o train256_latents --networks autoencoder_tiny --size 128
    python experiments/train.py --config=stage1_tiny --task.networks autoencoder_tiny --data.folder=train256 \\
        --data.cache-folder=train256_latents --data.arrays latents

For every view over white: `latents`, the mean of the autoencoder's posterior, unscaled, and `image_tokens`, the image
encoder's embedding, both float16; `data.arrays` names those that a training takes. Run the same command again to go on
after an interruption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Float, UInt8
from tqdm import tqdm

from hi3d_jax.cli.output import script_errors
from hi3d_jax.data.derived import derive
from hi3d_jax.data.loader import over_white_bytes, resized_views
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.data.records import OrbitRecord
from hi3d_jax.pretrained import from_pretrained, read_networks
from hi3d_jax.stages.conditioning import image_token

NAMES = ("latents", "image_tokens")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Everything on the command line."""

    dataset: Annotated[Path, tyro.conf.Positional]
    """A data set of render_dataset.py."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The cache's folder: new, empty, or one that this command began."""
    networks: str
    """Model folder with the networks vae and image_encoder; one of them alone is used alone."""
    size: int = 512
    """Side of the views in pixels that the networks see: the image_size of the training."""
    batch: int = 4
    """Views that pass the networks at a time."""


Encode = Callable[[UInt8[np.ndarray, "t s s 3"]], dict[str, np.ndarray]]


def encoder(arguments: Arguments) -> Encode:
    """A function from views over white to the arrays to be cached."""
    held = read_networks(arguments.networks)
    networks = {name: from_pretrained(arguments.networks, name) for name in ("vae", "image_encoder") if name in held}
    if not networks:
        raise ValueError(f"{arguments.networks} has neither vae nor image_encoder; give the folder of one")
    graph, state = nnx.split(networks)

    @jax.jit
    def encode(state: nnx.State, images: Float[jax.Array, "n s s 3"]) -> dict[str, jax.Array]:
        networks = nnx.merge(graph, state)
        made = {}
        if "vae" in networks:
            made[NAMES[0]] = networks["vae"].encode(images).mean
        if "image_encoder" in networks:
            made[NAMES[1]] = image_token(networks["image_encoder"], images)
        return made

    def encode_views(views: UInt8[np.ndarray, "t s s 3"]) -> dict[str, np.ndarray]:
        images = views.astype(np.float32) / 127.5 - 1
        # The last part is filled up, so that there is one shape to compile.
        missing = -len(images) % arguments.batch
        images = np.concatenate([images, images[:1].repeat(missing, axis=0)])
        starts = range(0, len(images), arguments.batch)
        parts = [encode(state, jnp.asarray(images[start : start + arguments.batch])) for start in starts]
        joined = {name: np.concatenate([np.asarray(part[name]) for part in parts])[: len(views)] for name in parts[0]}
        return {name: array.astype(np.float16) for name, array in joined.items()}

    return encode_views


def cache(arguments: Arguments) -> None:
    """Encodes every record of the data set that is not cached yet."""
    source, encode = RecordFolder(arguments.dataset), encoder(arguments)

    def cached(record: OrbitRecord) -> list[OrbitRecord]:
        arrays = encode(over_white_bytes(resized_views(record.views, arguments.size)))
        return [dataclasses.replace(record, views=None, depths=None, arrays=arrays)]

    settings = {"networks": arguments.networks, "size": arguments.size}
    with tqdm(total=len(source), unit="orbit", desc=str(arguments.output)) as bar:
        for done in derive(source, arguments.output, settings, cached, depths=False, arrays=()):
            bar.update(done - bar.n)


def main() -> None:
    """Parses and runs; errors a user can mend are one line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with script_errors():
        cache(arguments)


if __name__ == "__main__":
    main()
