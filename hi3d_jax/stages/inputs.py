"""What is handed to stages 1 and 2: a picture, an orbit, some numbers; read, cut out, checked before anything runs."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from hi3d_jax.cameras import Cameras, azimuths_deg, elevations_deg
from hi3d_jax.images import Matting, matte, over_white, read_image, to_array
from hi3d_jax.stages.orbit_files import INPUT_FILE
from hi3d_jax.stages.recipe import Recipe, RecipeError
from hi3d_jax.stages.run_record import FILE_NAME as RUN_FILE

# A file, a Pillow image, or RGB or RGBA as float in [0, 1] or as uint8.
Picture = str | Path | Image.Image | Float[np.ndarray, "h w c"] | UInt8[np.ndarray, "h w c"]

# Degrees by which the cameras of an orbit may stand beside their places.
CAMERA_TOLERANCE_DEG = 1.0


def read_picture(picture: Picture) -> Float[np.ndarray, "h w 4"]:
    """RGBA in [0, 1]. Raises `ImageError`."""
    if isinstance(picture, Image.Image):
        return to_array(picture, "the image")
    if not isinstance(picture, np.ndarray):
        return read_image(picture)
    if picture.dtype == np.uint8:
        picture = picture.astype(np.float32) / 255
    return picture if picture.shape[2] == 4 else np.concatenate([picture, np.ones_like(picture[..., :1])], axis=-1)


def on_white(view: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w 3"]:
    """The picture without its alpha, if it has one."""
    return over_white(view) if view.shape[2] == 4 else view


def cut_out(picture: Picture, matting: Matting = "auto") -> Float[np.ndarray, "h w 4"]:
    """The object of a picture alone. Warns where it touches the border: what is cut off cannot be turned around."""
    cut = matte(read_picture(picture), matting)
    solid = cut[..., 3] > 0.5
    sides = {"top": solid[0], "bottom": solid[-1], "left": solid[:, 0], "right": solid[:, -1]}
    if touched := [name for name, line in sides.items() if line.any()]:
        warnings.warn(
            f"the object touches the image's border ({', '.join(touched)}) and may be cut off there; use an image "
            "with a margin around all of it",
            stacklevel=3,
        )
    return cut


def input_of(orbit: Path) -> Path | None:
    """The picture that a run was given, as it wrote it beside its orbit or its orbits' folders; None: no such run."""
    found = [folder / INPUT_FILE for folder in (orbit, orbit.parent) if (folder / RUN_FILE).exists()]
    return next((path for path in found if path.exists()), None)


def check_numbers(recipe: Recipe, elevation_deg: float, seed: int, num_steps: int | None) -> None:
    """Raises `RecipeError` for numbers that mean nothing; warns of elevations that training did not show."""
    if not -90 < elevation_deg < 90:
        raise RecipeError(f"elevation {elevation_deg} is outside -90 to 90 degrees")
    if not 0 <= seed < 2**63:
        raise RecipeError(f"seed {seed}: give a number from 0 to 2^63 - 1")
    if num_steps is not None and num_steps < 1:
        raise RecipeError(f"{num_steps} sampling steps: at least 1 is needed, {recipe.num_steps} are usual")
    low, high = recipe.elevation_range_deg
    if not low <= elevation_deg <= high:
        trained = ", ".join(f"{value:g}" for value in recipe.elevations_deg or ())
        warnings.warn(
            f"elevation {elevation_deg:g} is outside what this model was trained on, {low:g} to {high:g} degrees"
            f"{f' ({trained})' if trained else ''}; expect distorted views",
            stacklevel=3,
        )


def orbit_elevation(cameras: Cameras) -> float:
    """The elevation of an orbit's cameras, in degrees. Raises `RecipeError` where they are not what stage 1 makes."""
    elevations = elevations_deg(cameras)
    if np.ptp(elevations) > CAMERA_TOLERANCE_DEG:
        raise RecipeError(
            f"the cameras' elevations go from {elevations.min():.0f} to {elevations.max():.0f} degrees; stage 2 "
            "refines views that were all taken from one elevation"
        )
    azimuths = azimuths_deg(cameras)
    expected = azimuths[0] + np.arange(len(cameras)) * (360 / len(cameras))
    if np.abs((azimuths - expected + 180) % 360 - 180).max() > CAMERA_TOLERANCE_DEG:
        raise RecipeError(
            f"the cameras stand at azimuths {', '.join(f'{azimuth:.0f}' for azimuth in azimuths)}; stage 2 refines "
            f"views {360 / len(cameras):g} degrees apart, counter-clockwise seen from above, in that order"
        )
    return round(float(elevations.mean()), 3)
