"""What came out, at a glance: the mesh beside the views it was made from, how near it comes, and a turntable."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from hi3d_jax.cameras import Cameras, orbit
from hi3d_jax.evaluation import view_scores
from hi3d_jax.images import contact_sheet, resize
from hi3d_jax.mesh import Mesh, render
from hi3d_jax.video import Orbit

# Name, azimuth and elevation in degrees of the shaded pictures.
SIDES = (
    ("front", 0.0, 0.0),
    ("right", 90.0, 0.0),
    ("back", 180.0, 0.0),
    ("left", 270.0, 0.0),
    ("top", 0.0, 89.0),
    ("below", 0.0, -89.0),
)
TILE = 256
TURNTABLE_SIZE = 384
TURNTABLE_FRAMES = 48
TURNTABLE_FPS = 16.0
TURNTABLE_ELEVATION_DEG = 15.0


@dataclasses.dataclass(frozen=True)
class Scores:
    """The mesh drawn with the input cameras against the input views, as means over them.

    `silhouette_iou` of masks alpha > 1/2, in [0, 1]; `psnr` in dB over white; `ssim` up to 1.
    """

    silhouette_iou: float
    psnr: float
    ssim: float


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A contact `sheet` and the frames of a `turntable`, sRGB in [0, 1]."""

    sheet: Float[np.ndarray, "h w 3"]
    turntable: Float[np.ndarray, "t h2 w2 3"]


def draw_pictures(mesh: Mesh, views: Orbit, redrawn: Float[np.ndarray, "t h w 3"]) -> Pictures:
    """What a person looks at first; `redrawn`: the textured mesh seen from the cameras of `views`."""
    return Pictures(draw_sheet(mesh, views, redrawn), draw_turntable(mesh))


def compare(mesh: Mesh, views: Orbit) -> tuple[Scores, Float[np.ndarray, "t h w 3"]]:
    """How near the textured mesh comes to the views, and the pictures of it that were compared."""
    renders = render(mesh, views.cameras)
    drawn, given = renders.alphas > 0.5, views.alphas > 0.5
    iou = (drawn & given).sum((1, 2)) / np.maximum((drawn | given).sum((1, 2)), 1)
    scores = view_scores(renders.views, views.views)
    return Scores(float(iou.mean()), scores.psnr, scores.ssim), renders.views


def draw_sheet(mesh: Mesh, views: Orbit, redrawn: Float[np.ndarray, "t h w 3"]) -> Float[np.ndarray, "h2 w2 3"]:
    """Three rows of six: views, the textured mesh seen likewise, and its bare shape from all sides."""
    chosen = np.linspace(0, len(views), len(SIDES), endpoint=False).astype(int)
    scale = min(1.0, TILE / max(views.cameras.width, views.cameras.height))
    width, height = (max(round(side * scale), 1) for side in (views.cameras.width, views.cameras.height))
    cameras = Cameras.concatenate([orbit([azimuth], up, width=width, height=height) for _, azimuth, up in SIDES])
    shape = render(Mesh(mesh.vertices, mesh.faces), cameras, light="soft").views
    pictures = [resize(row[view], width, height) for row in (views.views, redrawn) for view in chosen]
    labels = [f"{word} {view}" for word in ("view", "mesh") for view in chosen] + [name for name, _, _ in SIDES]
    return contact_sheet([*pictures, *shape], len(SIDES), labels)


def draw_turntable(mesh: Mesh) -> Float[np.ndarray, "t h w 3"]:
    """One turn around the lit, textured mesh."""
    azimuths = np.arange(TURNTABLE_FRAMES) * (360 / TURNTABLE_FRAMES)
    return render(mesh, orbit(azimuths, TURNTABLE_ELEVATION_DEG, width=TURNTABLE_SIZE), light="soft").views
