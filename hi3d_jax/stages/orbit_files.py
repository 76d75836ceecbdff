"""The files of a generated orbit: views, cameras, video, contact sheet, previews. Views are opaque, on white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from hi3d_jax.cameras import Cameras, azimuths_deg, orbit, read_transforms
from hi3d_jax.images import contact_sheet, over_white, read_image, resize, to_bytes, write_png
from hi3d_jax.stages.model import StageModel, Watch
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.video import Orbit, write_mp4, write_orbit

CAMERAS_FILE = "cameras.json"
# What the model was shown, at twice the size of its views.
INPUT_FILE = "input.png"
SHEET_FILE = "contact_sheet.png"
# What the model took the picture's elevation to be, where it was asked.
ELEVATION_FILE = "elevation.json"
# Where the state of a sampling that is not finished is kept.
SAMPLING_FILE = "sampling.npz"
TILE = 192
SHEET_COLUMNS = 8


def recipe_cameras(recipe: Recipe, elevation_deg: float | int) -> Cameras:
    """Those of the views that a model with this recipe makes."""
    azimuths = np.arange(recipe.num_views) * (360 / recipe.num_views)
    return orbit(azimuths, elevation_deg, recipe.radius, recipe.fov_deg, recipe.image_size)


def as_orbit(views: UInt8[np.ndarray, "t h w 3"], cameras: Cameras) -> Orbit:
    """Views in [0, 1]; where the object is in them nobody knows yet, so all of them is opaque."""
    return Orbit(views.astype(np.float32) / 255, np.ones(views.shape[:3], np.float32), cameras)


def write_views(cameras_file: Path, orbit: Orbit) -> None:
    """orbit.mp4, views/NNN.png and at last cameras.json, in the folder of `cameras_file`."""
    folder = cameras_file.parent
    folder.mkdir(parents=True, exist_ok=True)
    write_mp4(folder / "orbit.mp4", orbit.views)
    write_orbit(folder, orbit)
    (folder / SAMPLING_FILE).unlink(missing_ok=True)


def read_written_views(cameras_file: Path) -> Orbit:
    """What `write_views` wrote, to the last bit."""
    cameras, names = read_transforms(cameras_file)
    pictures = [to_bytes(over_white(read_image(cameras_file.parent / name))) for name in names]
    return as_orbit(np.stack(pictures), cameras)


def write_sheet(path: Path, orbits: Sequence[Orbit]) -> None:
    """All views of one orbit, or a row of views for each of several, small, with their azimuths."""
    pictures, labels = [], []
    for drawn in orbits:
        rows = len(drawn) if len(orbits) == 1 else min(len(drawn), SHEET_COLUMNS)
        shown = np.linspace(0, len(drawn), rows, endpoint=False).astype(int)
        pictures += [resize(drawn.views[view], TILE, TILE) for view in shown]
        labels += [f"{azimuth:g}°" for azimuth in np.round(azimuths_deg(drawn.cameras), 1)[shown] % 360]
    write_png(path, contact_sheet(pictures, min(SHEET_COLUMNS, len(pictures) // len(orbits)), labels))


def preview_writer(folder: Path, model: StageModel, every: int) -> Watch:
    """A watcher that writes a few views, small, every so many steps: stage_1_step_05.png in `folder`."""

    def watch(done: int, denoised) -> None:
        if done % every:
            return
        folder.mkdir(parents=True, exist_ok=True)
        views = model.preview(denoised).astype(np.float32) / 255
        name = f"{model.name.replace(' ', '_')}_step_{done:02d}.png"
        write_png(folder / name, contact_sheet(list(views), len(views)))

    return watch
