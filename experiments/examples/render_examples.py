"""Renders the pictures beside this file from their objects: python experiments/examples/render_examples.py OBJECTS

OBJECTS is the folder with the GLB files that README.md here names. None of them was trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from PIL import Image

from hi3d_jax.data import load_object, render_orbit
from hi3d_jax.images import straight_alpha

OBJECTS = {
    "taxi": "kay_city_car_taxi",
    "knight": "kay_character_knight",
    "firetruck": "mkt_firetruck",
    "triceratops": "gso_dino_5",
}
# glTF's front, +z, is at azimuth 270: a little to the right of it.
SIZE, ELEVATION_DEG, AZIMUTH_DEG = 512, 20.0, 305.0
# Colours in steps of 5 of 255: half the bytes, and nothing that an eye would see.
COLOUR_STEP = 5


def render_example(path: Path) -> Image.Image:
    """The object as RGBA, seen from its front right."""
    renders, _ = render_orbit(
        load_object(path), azimuths_deg=[AZIMUTH_DEG], elevation_deg=ELEVATION_DEG, width=SIZE, light="soft"
    )
    pixels = np.round(255 * straight_alpha(renders.views[0], renders.alphas[0]))
    colours = np.minimum(COLOUR_STEP * np.round(pixels[..., :3] / COLOUR_STEP), 255)
    visible = pixels[..., 3:] > 0
    return Image.fromarray(np.concatenate([np.where(visible, colours, 255), pixels[..., 3:]], axis=-1).astype(np.uint8))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest)
    parser.add_argument("objects", type=Path, metavar="OBJECTS", help="folder with the objects' GLB files")
    options = parser.parse_args(arguments)
    for name, file in OBJECTS.items():
        path = Path(__file__).with_name(f"{name}.png")
        render_example(options.objects / f"{file}.glb").save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
