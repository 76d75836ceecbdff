"""Turns training runs into model folders: python experiments/export.py RUN [RUN] -o MODEL_FOLDER [options]

The folder has the networks that the run trained (their average, where the run kept one) and those it used as they
are, with the stage's recipe, ready for `from_pretrained` and for `hi3d`. For an autoencoder, the latents' standard
deviation is measured on the run's data and becomes the scaling factor. Of two runs, one for each stage, the folder
has stage1/ and stage2/; networks that are equal in both are stored once. So hi3d-tiny was written:

    python experiments/export.py runs/stage1_tiny runs/stage2_tiny -o hi3d_jax/weights/tiny --dtype float16
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

from hi3d_jax.training.export import DTYPES, Export, export, export_stages


def parse(arguments: list[str] | None) -> argparse.Namespace:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run; of two, each trains a stage")
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
        how = Export(options.step, options.weights == "ema", options.dtype, options.batches)
        if len(options.runs) == 1:
            print(export(options.runs[0], options.output, how))
        else:
            print(export_stages(options.runs, options.output, how))
    except (ValueError, OSError) as error:
        print(f"error: {error}\nnothing was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
