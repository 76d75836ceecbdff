"""Turns a training run into a model folder: python experiments/export.py RUN -o MODEL_FOLDER [options]

The folder has the networks that the run trained (their average, where the run kept one) and those it used as they
are, with the stage's recipe, ready for `from_pretrained` and for `hi3d`. For an autoencoder, the latents' standard
deviation is measured on the run's data and becomes the scaling factor.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hi3d_jax.training.export import DTYPES, export


def parse(arguments: list[str] | None) -> argparse.Namespace:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest)
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("-o", "--output", required=True, metavar="MODEL_FOLDER", help="folder to write; must not exist")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the newest readable one if not given")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="the average of the weights, or the last ones"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights")
    parser.add_argument(
        "--batches", type=int, default=16, help="batches that the scaling factor of an autoencoder is measured on"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 if the folder was written."""
    options = parse(arguments)
    try:
        line = export(
            options.run,
            options.output,
            step=options.step,
            ema=options.weights == "ema",
            dtype=options.dtype,
            num_batches=options.batches,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}\nnothing was written", file=sys.stderr)
        return 1
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
