"""Views as this and other systems write them, brought to one form: view 0 is the input, then once around.

    hi3d           a folder of pictures (or with cameras.json), a video, an animated picture: runs of this program
    hi3d-official  outputs/NAME of the authors' scripts: second_step_video/second.mp4, else first_step/first.mp4
    syncdreamer    NAME/0.png, 1.png, ...: the 16 views of a sample side by side, or in a 4 x 4 grid; one per seed
    sv3d           NAME/000000.mp4, ...: 21 frames of which the last is the input at azimuth 0; one per seed

Azimuths of `hi3d`, `hi3d-official` and `syncdreamer` grow as in this program (checked on real files of each). The way
in which SV3D goes round could not be checked on its outputs here: `reverse` turns an orbit around.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from hi3d_jax import video
from hi3d_jax.cameras import Cameras
from hi3d_jax.evaluation.views import EvaluationError
from hi3d_jax.images import over_white, read_image

OFFICIAL_FILES = ("second_step_video/second.mp4", "first_step/first.mp4")
OFFICIAL_VIEWS = 16
SYNCDREAMER_VIEWS = 16
SV3D_VIEWS = 21


@dataclasses.dataclass(frozen=True)
class Views:
    """`views` over white in [0, 1], their azimuths if they are an orbit, and cameras where a file tells them."""

    views: Float[np.ndarray, "t h w 3"]
    azimuths_deg: Float[np.ndarray, " t"]
    cameras: Cameras | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a system leaves its views: what a result is, where it is, and how it is read."""

    about: str
    locate: Callable[[Path], Path | None]
    read: Callable[[Path], Views]


def read_views(path: Path, layout: str = "hi3d", reverse: bool = False) -> Views:
    """The views of one result, as `layout` says. `reverse` keeps view 0 and takes the others from the last back.

    Raises `EvaluationError` for an orbit of another length than the system makes, and what reading files raises.
    """
    found = LAYOUTS[layout].read(path)
    if not reverse:
        return found
    if found.cameras is not None:
        raise EvaluationError(f"{path} has cameras, which tell its direction; leave --reverse out")
    order = np.r_[0, np.arange(len(found.views) - 1, 0, -1)]
    return dataclasses.replace(found, views=found.views[order])


def _orbit(frames: Float[np.ndarray, "t h w 4"], cameras: Cameras | None = None) -> Views:
    views = np.stack([over_white(frame) for frame in frames])
    return Views(views, np.arange(len(views)) * (360 / len(views)), cameras)


def _locate_hi3d(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix.lower() in (*video.VIDEO_SUFFIXES, ".gif", ".webp") else None
    if any((path / name).is_file() for name in video.CAMERA_FILES):
        return path
    for folder in (path, path / "views"):
        if folder.is_dir() and sum(p.suffix.lower() in video.PICTURE_SUFFIXES for p in folder.iterdir()) > 1:
            return folder
    return None


def _read_hi3d(path: Path) -> Views:
    files = [path / name for name in video.CAMERA_FILES if (path / name).is_file()] if path.is_dir() else []
    return _orbit(*video.read_posed_frames(files[0])) if files else _orbit(video.read_frames(path))


def _locate_official(path: Path) -> Path | None:
    return next((path / name for name in OFFICIAL_FILES if (path / name).is_file()), None)


def _read_official(path: Path) -> Views:
    frames = video.read_frames(path)
    if len(frames) < OFFICIAL_VIEWS:
        raise EvaluationError(f"{path} has {len(frames)} frames; the official scripts write {OFFICIAL_VIEWS} or more")
    # The official second stage also takes the last 16 of the first one's frames.
    return _orbit(frames[-OFFICIAL_VIEWS:])


def _locate_picture(path: Path) -> Path | None:
    return path if path.is_file() and path.suffix.lower() == ".png" else None


def _read_syncdreamer(path: Path) -> Views:
    return _orbit(cut_grid(read_image(path), path))


def cut_grid(picture: Float[np.ndarray, "h w 4"], path: Path) -> Float[np.ndarray, "16 s s 4"]:
    """The 16 square views of a picture that holds them in one row or in a 4 x 4 grid, row by row."""
    height, width = picture.shape[:2]
    for rows, columns in ((1, 16), (4, 4)):
        side = width // columns
        if side * columns == width and side * rows == height:
            tiles = picture.reshape(rows, side, columns, side, 4).transpose(0, 2, 1, 3, 4)
            return np.ascontiguousarray(tiles.reshape(SYNCDREAMER_VIEWS, side, side, 4))
    raise EvaluationError(
        f"{path} is {width} x {height} pixels, neither a row of 16 square views nor a 4 x 4 grid of them; choose "
        "another layout, or cut it into one picture per view"
    )


def _locate_video(path: Path) -> Path | None:
    return path if path.is_file() and path.suffix.lower() in video.VIDEO_SUFFIXES else None


def _read_sv3d(path: Path) -> Views:
    frames = video.read_frames(path)
    if len(frames) != SV3D_VIEWS:
        raise EvaluationError(f"{path} has {len(frames)} frames, SV3D makes {SV3D_VIEWS}; choose another layout")
    return _orbit(np.roll(frames, 1, axis=0))


LAYOUTS: dict[str, Layout] = {
    "hi3d": Layout("a folder of pictures, a folder with cameras.json, or a video", _locate_hi3d, _read_hi3d),
    "hi3d-official": Layout(f"a folder with {' or '.join(OFFICIAL_FILES)}", _locate_official, _read_official),
    "syncdreamer": Layout(
        "a PNG with 16 views in a row or a 4 x 4 grid, or a folder of them", _locate_picture, _read_syncdreamer
    ),
    "sv3d": Layout("an mp4 of 21 frames, or a folder of them", _locate_video, _read_sv3d),
}
