"""Encodes stage 2's training examples beforehand, so that no step has to degrade and encode coarse views.

    python experiments/encode_examples.py --config=stage2_tiny --output=train256_examples --draws=8 \\
        --task.networks STAGE1_FOLDER DEPTH_FOLDER --data.folder=train256
    python experiments/train.py --config=stage2_tiny --task.networks STAGE1_FOLDER DEPTH_FOLDER \\
        --data.folder=train256_examples --data.validation-folder=val256

Of every orbit DRAWS examples are drawn as the training would draw them (first view, degradation or output of stage 1,
noise on the conditions), and what its frozen networks make of them is kept, in float16. A training on them draws only
noise levels, noise and what is dropped anew. With a cache of the true views' latents (cache_latents.py, then
`--data.cache-folder` and `--data.arrays latents`) half the time is spared. Fields of the config may follow as in
train.py. Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import zlib
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules; the configs are loaded by a module of the root.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import numpy as np
from tqdm import tqdm

from experiments import train
from hi3d_jax.cli.output import script_errors
from hi3d_jax.data.derived import derive
from hi3d_jax.data.loader import ExampleReader, check_companions
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.data.records import OrbitRecord
from hi3d_jax.training.batches import ENCODED_SIZE
from hi3d_jax.training.config import MeshConfig, TrainConfig
from hi3d_jax.training.program import TrainProgram
from hi3d_jax.training.sharding import make_mesh


def encode(config: TrainConfig, output: str | Path, draws: int) -> None:
    """Encodes `draws` examples of every record of the config's data that are not encoded yet.

    Raises `ValueError` for a task whose examples have to be seen, `RecordError`, `PretrainedError`.
    """
    data, names = config.data, config.task.encoded_arrays()
    source, stage1, cache = (
        RecordFolder(folder) if folder else None for folder in (data.folder, data.stage1_folder, data.cache_folder)
    )
    check_companions(source, data, cache, stage1)
    reader = ExampleReader(source, data, data.roll, cache, stage1)
    single = dataclasses.replace(config, data=dataclasses.replace(data, batch_size=1))
    # Several machines encode several data sets.
    program = TrainProgram(single, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    frozen = program.frozen_values()

    @jax.jit
    def encoded(frozen, batch, key):
        return config.task.encoded(program.networks({}, frozen), batch, key)

    def made(record: OrbitRecord) -> list[OrbitRecord]:
        rng = np.random.default_rng([config.seed, zlib.crc32(record.key.encode())])
        seeds = rng.integers(1 << 62, size=(draws, 2))
        return [example(record, draw, *pair) for draw, pair in enumerate(seeds)]

    def example(record: OrbitRecord, draw: int, seed: int, noise_seed: int) -> OrbitRecord:
        batch = reader.batch(np.array([source.index_of_key[record.key]]), np.array([seed]))
        arrays = encoded(frozen, program.place_batch(batch), jax.random.key(noise_seed))
        arrays = {name: np.asarray(arrays[name][0], np.float16) for name in names}
        bar.update()
        return dataclasses.replace(record, key=f"{record.key}@{draw}", arrays=arrays)

    settings = {
        ENCODED_SIZE: data.image_size,
        "draws": draws,
        "seed": config.seed,
        "networks": list(config.task.networks),
        "stage1_folder": data.stage1_folder,
    }
    with tqdm(total=len(source) * draws, unit="example", desc=str(output)) as bar:
        for done in derive(source, output, settings, made, views=False, depths=False, arrays=()):
            # Orbits that an earlier run encoded.
            bar.update(done * draws - bar.n)


def main(arguments: list[str] | None = None) -> None:
    """Parses and runs; errors a user can mend are one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="name or path of a config of stage 2")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of the examples: new, empty, or one to go on with"
    )
    parser.add_argument("--draws", type=int, default=8, help="examples of each orbit (default: 8)")
    known, overrides = parser.parse_known_args(arguments)
    with script_errors():
        config, _ = train.parse([f"--config={known.config}", *overrides])
        encode(config, known.output, known.draws)


if __name__ == "__main__":
    main()
