"""Generates stage 1's orbits for the records of a data set: what stage 2 learns to refine (paper section 4.3).

    python experiments/generate_coarse.py train256 -o train256_coarse --model models/tiny/stage1 --starts 2
    python experiments/train.py --config=stage2_tiny --task.networks models/tiny/stage1 DEPTH_FOLDER \\
        --data.folder=train256 --data.stage1-folder=train256_coarse

From each orbit some views are drawn as input images; an output record holds the generated views under the key
KEY@START, where START is the number of the input view. Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from hi3d_jax.cli.output import script_errors
from hi3d_jax.data.derived import derive
from hi3d_jax.data.loader import over_white_bytes, resized_views
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.data.records import OrbitRecord
from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.multiview import multiview


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Everything on the command line."""

    dataset: Annotated[Path, tyro.conf.Positional]
    """A data set of render_dataset.py."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the generated data set: new, empty, or one that this command began."""
    model: str
    """Model folder of stage 1."""
    starts: int = 1
    """Input views of each orbit, drawn at random."""
    num_steps: int | None = None
    """Steps of the sampler; the recipe's if not given."""
    seed: int = 0
    """Of the input views and the noise."""


def generate(arguments: Arguments) -> None:
    """Generates what is not there yet."""
    source = RecordFolder(arguments.dataset)
    model = StageModel(arguments.model, 1, keep_loaded=True)

    def generated(record: OrbitRecord) -> list[OrbitRecord]:
        rng = np.random.default_rng([arguments.seed, zlib.crc32(record.key.encode())])
        inputs = over_white_bytes(resized_views(record.views, model.recipe.image_size))
        starts = sorted(rng.choice(len(inputs), min(arguments.starts, len(inputs)), replace=False).tolist())
        return [made(record, inputs[start], start, int(rng.integers(1 << 31))) for start in starts]

    def made(record: OrbitRecord, image: np.ndarray, start: int, seed: int) -> OrbitRecord:
        views = multiview(
            model,
            image,
            elevation_deg=record.elevation_deg,
            seed=seed,
            num_steps=arguments.num_steps,
            progress=False,
        )
        opaque = np.concatenate([views, np.full((*views.shape[:3], 1), 255, np.uint8)], axis=-1)
        return dataclasses.replace(record, key=f"{record.key}@{start}", views=opaque, depths=None, arrays={})

    settings = {name: getattr(arguments, name) for name in ("model", "starts", "num_steps", "seed")}
    with tqdm(total=len(source), unit="orbit", desc=str(arguments.output)) as bar:
        for done in derive(source, arguments.output, settings, generated, depths=False, arrays=()):
            bar.update(done - bar.n)


def main() -> None:
    """Parses and runs; errors a user can mend are one line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with script_errors():
        generate(arguments)


if __name__ == "__main__":
    main()
