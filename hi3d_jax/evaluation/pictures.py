"""What a reader of scores has to see: views above the true ones with their errors, a mesh beside the true one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from hi3d_jax.cameras import Cameras, orbit
from hi3d_jax.images import contact_sheet, resize
from hi3d_jax.mesh import Mesh, render

COLUMNS = 8
TILE = 144
MESH_TILE = 192
# Absolute error, mean over the channels, that is shown in full red.
FULL_RED = 0.25
SIDES = ((0.0, 10.0), (90.0, 10.0), (180.0, 10.0), (270.0, 10.0), (30.0, 70.0), (30.0, -60.0))


def compare_views(
    views: Float[np.ndarray, "t h w 3"], truth: Float[np.ndarray, "t h w 3"]
) -> Float[np.ndarray, "h2 w2 3"]:
    """Three rows: views, true views (view 0 is the input) and error maps; at most `COLUMNS` views, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(views), min(COLUMNS, len(views)), endpoint=False).astype(int))
    rows = (views[chosen], truth[chosen], error_maps(views[chosen], truth[chosen]))
    scale = TILE / max(views.shape[1:3])
    height, width = (max(round(side * scale), 8) for side in views.shape[1:3])
    labels = [f"{word} {view}" for word in ("view", "truth", "error") for view in chosen]
    labels[len(chosen)] = "input" if chosen[0] == 0 else labels[len(chosen)]
    return contact_sheet([resize(tile, width, height) for row in rows for tile in row], len(chosen), labels)


def error_maps(
    views: Float[np.ndarray, "t h w 3"], truth: Float[np.ndarray, "t h w 3"]
) -> Float[np.ndarray, "t h w 3"]:
    """White where views agree, red where they differ by `FULL_RED` or more."""
    error = np.clip(np.abs(views - truth).mean(axis=-1) / FULL_RED, 0, 1)
    return np.stack([np.ones_like(error), 1 - error, 1 - error], axis=-1).astype(np.float32)


def compare_meshes(meshes: Mapping[str, Mesh]) -> Float[np.ndarray, "h w 3"]:
    """Rows of six sides: each mesh with its colours, if it has any, then each as a bare shape; keys are its labels."""
    cameras = Cameras.concatenate([orbit([azimuth], up, width=MESH_TILE) for azimuth, up in SIDES])
    rows = [(name, mesh) for name, mesh in meshes.items() if has_colours(mesh)]
    rows += [(f"{name}, shape", dataclasses.replace(m, texture=None, colours=None)) for name, m in meshes.items()]
    tiles = [view for _, each in rows for view in render(each, cameras, light="soft").views]
    labels = [f"{name} {azimuth:.0f}°" for name, _ in rows for azimuth, _ in SIDES]
    return contact_sheet(tiles, len(SIDES), labels)


def has_colours(mesh: Mesh) -> bool:
    """Whether a picture of the mesh shows more than its shape."""
    return mesh.texture is not None or mesh.colours is not None
