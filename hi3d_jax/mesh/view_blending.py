"""The colour that an orbit's views give to points of a surface.

A view counts for a point it sees, the more the more squarely it looks and the farther the point is, in the picture,
from an edge of the silhouette or a jump in depth: views from a generator and the fitted surface disagree most there.
Broad shades are blended over many views, so that differences in exposure leave no seam; fine detail comes almost only
from the best view, so that it stays sharp (two-band blending after Burt and Adelson 1983).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.ndimage import distance_transform_edt, gaussian_filter

from hi3d_jax.cameras import Cameras, project
from hi3d_jax.mesh.rays import RayCaster
from hi3d_jax.mesh.render import depth_maps
from hi3d_jax.mesh.triangles import Mesh

# All lengths in pictures are fractions of the picture's width.
EDGE_WIDTH = 0.012
BROAD_SIGMA = 0.012
# A jump in depth between neighbouring pixels, in world units per pixel width at the object's distance.
DEPTH_JUMP = 4.0
# How sharply the best view wins, as powers of the score relative to the best one.
BROAD_POWER, DETAIL_POWER = 2.0, 6.0
GRAZING = 0.08
# The share of a view at an edge: it decides only where there is no other.
UNTRUSTED = 1e-4
# Pixels below this alpha may hold some of the background: matting leaves halos.
OPAQUE = 0.9
# Start of the rays that look for an obstacle, off the surface, in world units.
RAY_OFFSET = 2e-3


class Blend(NamedTuple):
    """`colour` sRGB in [0, 1] (0 where nothing is seen) and `score` in [0, 1], how well the best view sees it."""

    colour: Float[np.ndarray, "n 3"]
    score: Float[np.ndarray, " n"]


class ViewBlender:
    """An orbit of views over white, made ready to colour points on `mesh`."""

    def __init__(
        self,
        mesh: Mesh,
        views: Float[np.ndarray, "t h w 3"],
        alphas: Float[np.ndarray, "t h w"],
        cameras: Cameras,
    ):
        self._caster, self._cameras = RayCaster(mesh), cameras
        trust = _edge_trust(depth_maps(mesh, cameras), alphas, cameras)
        # Channels: broad premultiplied colour and its alpha, detail premultiplied colour, alpha, trust.
        self._pictures = np.stack([_picture(v, a, t) for v, a, t in zip(views, alphas, trust, strict=True)])

    def blend(self, points: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"]) -> Blend:
        """Colours of surface points with outward unit normals."""
        num_views, num = len(self._cameras), len(points)
        scores = np.zeros((num_views, num), np.float32)
        broad, detail = np.zeros((num_views, num, 3), np.float32), np.zeros((num_views, num, 3), np.float32)
        for view in range(num_views):
            seen, cosine = self._seen(view, points, normals)
            pixels, _ = project(points[seen], self._cameras[view : view + 1])
            samples = _bilinear(self._pictures[view], pixels[0])
            alpha = samples[:, 7]
            scores[view, seen] = cosine[seen] * samples[:, 8] * alpha**4
            broad[view, seen] = samples[:, 0:3] / np.maximum(samples[:, 3:4], 1e-3)
            detail[view, seen] = samples[:, 4:7] / np.maximum(alpha, 1e-3)[:, None] - broad[view, seen]
        best = scores.max(axis=0)
        relative = scores / np.maximum(best, 1e-12)
        colour = _mean(broad, relative**BROAD_POWER) + _mean(detail, relative**DETAIL_POWER)
        return Blend(np.clip(colour, 0, 1), best)

    def _seen(self, view: int, points, normals):
        """Which points the view sees unhindered, and the cosine between their normals and the direction to it."""
        toward = self._cameras.centres[view] - points
        distance = np.linalg.norm(toward, axis=1)
        toward = toward / distance[:, None]
        cosine = np.einsum("ni,ni->n", toward, normals)
        pixels, depth = project(points, self._cameras[view : view + 1])
        size = (self._cameras.width, self._cameras.height)
        seen = (cosine > GRAZING) & (depth[0] > 0) & (pixels[0] >= 0).all(axis=1) & (pixels[0] < size).all(axis=1)
        candidates = np.flatnonzero(seen)
        origins = points[candidates] + RAY_OFFSET * (normals[candidates] + toward[candidates])
        hidden = self._caster.occluded(origins, toward[candidates], distance[candidates])
        seen[candidates[hidden]] = False
        return seen, cosine


def _mean(values: Float[np.ndarray, "t n 3"], weights: Float[np.ndarray, "t n"]) -> Float[np.ndarray, "n 3"]:
    return np.einsum("tnc,tn->nc", values, weights) / np.maximum(weights.sum(axis=0), 1e-12)[:, None]


def _picture(view, alpha, trust) -> Float[np.ndarray, "h w 9"]:
    premultiplied = view - (1 - alpha[..., None])
    both = np.concatenate([premultiplied, alpha[..., None]], axis=-1)
    sigma = BROAD_SIGMA * view.shape[1]
    broad = gaussian_filter(both, (sigma, sigma, 0))
    return np.concatenate([broad, both, trust[..., None]], axis=-1).astype(np.float32)


def _edge_trust(depths, alphas, cameras: Cameras) -> Float[np.ndarray, "t h w"]:
    """1 well inside a smooth part of the surface, falling to 0 at silhouettes and depth jumps of picture or mesh."""
    trust = np.empty(alphas.shape, np.float32)
    for view, (depth, alpha) in enumerate(zip(depths, alphas, strict=True)):
        inside = np.isfinite(depth) & (alpha > OPAQUE)
        step = np.median(depth[np.isfinite(depth)]) / cameras.K[view, 0, 0] if np.isfinite(depth).any() else 1.0
        filled = np.where(np.isfinite(depth), depth, 1e3)
        for axis in (0, 1):
            curvature = np.abs(np.diff(filled, 2, axis=axis)) > DEPTH_JUMP * step
            middle = [slice(None), slice(None)]
            middle[axis] = slice(1, -1)
            inside[tuple(middle)] &= ~curvature
        distance = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
        # The outermost pixel is mixed with what lies behind it.
        part = np.clip((distance - 1) / (EDGE_WIDTH * alpha.shape[1]), 0, 1)
        trust[view] = np.maximum(part * part * (3 - 2 * part), UNTRUSTED)
    return trust


def _bilinear(picture: Float[np.ndarray, "h w c"], pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n c"]:
    height, width = picture.shape[:2]
    x = np.clip(pixels[:, 0] - 0.5, 0, width - 1)
    y = np.clip(pixels[:, 1] - 0.5, 0, height - 1)
    left, top = np.minimum(x.astype(np.int64), width - 2), np.minimum(y.astype(np.int64), height - 2)
    right_part, low_part = (x - left).astype(np.float32)[:, None], (y - top).astype(np.float32)[:, None]
    flat, corner = picture.reshape(height * width, -1), top * width + left
    upper = flat[corner] * (1 - right_part) + flat[corner + 1] * right_part
    lower = flat[corner + width] * (1 - right_part) + flat[corner + width + 1] * right_part
    return upper * (1 - low_part) + lower * low_part
