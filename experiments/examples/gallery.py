"""Shows runs of `hi3d generate` below each other: python experiments/examples/gallery.py RUN [RUN ...] -o JPG

A row for each run: the input as the model saw it, four of the views that were drawn of it, and the mesh from the same
cameras.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from hi3d_jax.atomic import written_aside
from hi3d_jax.cameras import read_transforms
from hi3d_jax.cli.output import script_errors
from hi3d_jax.images import contact_sheet, over_white, read_image, resize, to_bytes
from hi3d_jax.mesh import read_mesh, render

# A little to the side, the side, the back, the other side; no view that is the input itself.
VIEWS, TILE = [2, 5, 8, 12], 160


def row_of(run: Path) -> list[np.ndarray]:
    """The pictures of one run, each `TILE` pixels across."""
    cameras, names = read_transforms(run / "cameras.json")
    views = [over_white(read_image(run / names[view])) for view in VIEWS]
    meshes = render(read_mesh(run / "mesh.glb"), cameras[VIEWS].resized(2 * TILE, 2 * TILE)).views
    picture = over_white(read_image(run / "generated" / "input.png"))
    return [resize(image, TILE, TILE) for image in (picture, *views, *meshes)]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folder of hi3d generate")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="JPG", help="picture to write")
    options = parser.parse_args(arguments)
    labels = ["input", *(f"{kind} {view}" for kind in ("view", "mesh") for view in VIEWS)]
    with script_errors():
        rows = [row_of(run) for run in tqdm(options.runs, unit="run")]
        sheet = contact_sheet([image for row in rows for image in row], len(labels), labels * len(rows))
        with written_aside(options.output) as aside:
            Image.fromarray(to_bytes(sheet)).save(aside, "JPEG", quality=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
