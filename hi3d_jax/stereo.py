"""Depths of views by plane sweep (Collins 1996) and semi-global matching (Hirschmueller 2008): how far behind the
visual hull two neighbours see the same thing.

The planes follow the hull: each pixel's depth is the hull's plus an offset that all share, so that windows lie about as
the surface does. A search, unlike a fit's gradient, crosses the gap between a flat or hollow side and the hull, which
bulges over it where no mask can tell. What a plain pixel cannot tell its neighbours in the picture do: offsets that
change from pixel to pixel have their price.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from hi3d_jax.cameras import Cameras, at_pixels, project

# Degrees between the directions of two views: nearer ones tell depths badly, farther ones look different.
ANGLE_RANGE, BEST_ANGLE = (8.0, 50.0), 20.0
NUM_NEIGHBOURS = 2
# Variance of windows, sRGB: keeps the correlation of plain ones from being noise over noise.
NOISE = 1e-5


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Lengths in world units. `window`: pixels along its side. `bend`, `jump`: prices, in units of correlation, of an
    offset that differs from the one of the pixel beside by one step, and by more."""

    reach: float = 0.06
    step: float = 0.002
    window: int = 5
    bend: float = 0.03
    jump: float = 0.2
    agreement: float = 0.8  # the least correlation that tells something by itself, of at most 1
    contrast: float = 0.02  # the least standard deviation of a window that does, sRGB: plain ones agree everywhere


def sweep(
    views: Float[np.ndarray, "t h w 3"],
    alphas: Float[np.ndarray, "t h w"],
    cameras: Cameras,
    fronts: Float[np.ndarray, "t h w"],
    config: SweepConfig = SweepConfig(),
) -> tuple[Float[np.ndarray, "t h w"], Bool[np.ndarray, "t h w"]]:
    """Depths (z along the optical axis) at which each of the `views` (sRGB in [0, 1]) agrees best with a neighbour, and
    where the window around the pixel tells so by itself.

    `fronts`: depths in front of which there is nothing, as of the hull; infinite beside it. Depths are NaN there,
    beside the object, and in a view that has no neighbour.
    """
    offsets = np.arange(0.0, config.reach, config.step, dtype=np.float32)
    pictures = jnp.asarray(np.concatenate([views, alphas[..., None]], axis=-1).transpose(0, 3, 1, 2), jnp.float32)
    K = jnp.asarray(cameras.K, jnp.float32)
    depths, told = np.full(fronts.shape, np.nan, np.float32), np.zeros(fronts.shape, bool)
    for view, others in enumerate(neighbours(cameras)):
        seen = np.isfinite(fronts[view]) & (alphas[view] > 0.5)
        if len(others) == 0 or not seen.any():
            continue
        front = np.where(seen, fronts[view], np.median(fronts[view][seen])).astype(np.float32)
        relative = (cameras.w2c[others] @ cameras.c2w[view]).astype(np.float32)
        offset, correlation, contrast = _sweep_view(
            pictures[view], pictures[others], seen, front, K[view], K[others], relative, offsets, config
        )
        depths[view] = np.where(seen, front + np.asarray(offset), np.nan)
        told[view] = seen & (np.asarray(correlation) >= config.agreement) & (np.asarray(contrast) >= config.contrast)
    return depths, told


def confirmed(
    depths: Float[np.ndarray, "t h w"], cameras: Cameras, tolerance: float = 0.01
) -> Bool[np.ndarray, "t h w"]:
    """Where both neighbours' depths put the surface at the same place, to within `tolerance` (world units).

    One alone would not do: of two views each tells what it has in common with the other, even where a third differs.
    """
    agree = np.zeros(depths.shape, bool)
    for view, others in enumerate(neighbours(cameras)):
        told = np.isfinite(depths[view])
        if len(others) == 0 or not told.any():
            continue
        places, distances = project(points(depths[[view]], cameras[[view]]), cameras[others])
        both = np.ones(told.sum(), bool)
        for other, place, distance in zip(others, places, distances, strict=True):
            both &= np.abs(at_pixels(depths[other], place) - distance) <= tolerance
        agree[view, told] = both
    return agree


def points(depths: Float[np.ndarray, "t h w"], cameras: Cameras) -> Float[np.ndarray, "n 3"]:
    """The world points at `depths` (z along the optical axis, NaN where there is none), view by view, row by row."""
    view, row, column = np.nonzero(np.isfinite(depths))
    pixels = np.stack([column + 0.5, row + 0.5, np.ones(len(row))], axis=1)
    rays = np.einsum("nij,nj->ni", cameras.pixels_to_world[view], pixels)
    return (cameras.centres[view] + rays * depths[view, row, column][:, None]).astype(np.float32)


def neighbours(cameras: Cameras) -> list[Int[np.ndarray, " k"]]:
    """For each view, the `NUM_NEIGHBOURS` others (or the one twice, or none) whose angle to it suits best."""
    forward = cameras.c2w[:, :3, 2]
    angles = np.degrees(np.arccos(np.clip(forward @ forward.T, -1, 1)))
    chosen = []
    for row in angles:
        usable = np.flatnonzero((row >= ANGLE_RANGE[0]) & (row <= ANGLE_RANGE[1]))
        best = usable[np.argsort(np.abs(row[usable] - BEST_ANGLE), kind="stable")[:NUM_NEIGHBOURS]]
        # One number of neighbours, one compilation.
        chosen.append(np.resize(best, NUM_NEIGHBOURS if len(best) else 0))
    return chosen


@functools.partial(jax.jit, static_argnums=8)
def _sweep_view(picture, others, seen, front, K, other_K, relative, offsets, config: SweepConfig):
    """For each pixel the chosen offset, the correlation there, and the contrast of the window."""
    height, width = front.shape
    column, row = jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
    rays = jnp.stack(
        [
            jnp.broadcast_to((column - K[0, 2]) / K[0, 0], front.shape),
            jnp.broadcast_to(((row - K[1, 2]) / K[1, 1])[:, None], front.shape),
            jnp.ones_like(front),
        ]
    )

    def agree(offset):
        def with_other(other, K, relative):
            warped, inside = _warp(other, K, relative, rays * (front + offset)[None])
            correlation, contrast = _correlate(picture, warped, config.window)
            return jnp.where(inside, correlation, -1.0), contrast

        correlations, contrasts = jax.vmap(with_other)(others, other_K, relative)
        # What one neighbour does not see, hidden from it, the other one often does.
        return correlations.max(axis=0), contrasts.max(axis=0)

    correlations, contrasts = jax.lax.map(agree, offsets)
    prices = semi_global(1 - correlations, seen, config.bend, config.jump)
    place = prices.argmin(axis=0)
    correlation = jnp.take_along_axis(correlations, place[None], axis=0)[0]
    return _between_steps(prices, place) * config.step, correlation, contrasts[0]


def semi_global(
    costs: Float[Array, "d h w"], seen: Bool[Array, "h w"], bend: float, jump: float
) -> Float[Array, "d h w"]:
    """Sums over eight directions of what a pixel's label costs together with the cheapest path to it through the pixels
    `seen` in that direction, on which a change of the label by one costs `bend` and any other `jump` (Hirschmueller
    2008, equation 13)."""
    costs = jnp.where(seen[None], costs, 0.0).transpose(1, 2, 0)

    def along_rows(costs, seen, shift):
        def next_row(before, row):
            own, here = row
            # The row before, moved so that the pixel a path comes from stands where the path goes; at the border the
            # path begins anew.
            before = jnp.roll(before, shift, axis=0)
            before = before.at[0 if shift > 0 else -1].set(0.0) if shift else before
            least = before.min(axis=1, keepdims=True)
            padded = jnp.pad(before, ((0, 0), (1, 1)), constant_values=jnp.inf)
            bent = jnp.minimum(padded[:, :-2], padded[:, 2:]) + bend
            path = own + jnp.minimum(jnp.minimum(before, bent), least + jump) - least
            path = jnp.where(here[:, None], path, 0.0)
            return path, path

        return jax.lax.scan(next_row, jnp.zeros(costs.shape[1:]), (costs, seen))[1]

    total = jnp.zeros_like(costs)
    for turned, shifts in ((False, (-1, 0, 1)), (True, (0,))):
        for step in (1, -1):
            part = (costs.swapaxes(0, 1), seen.T) if turned else (costs, seen)
            for shift in shifts:
                paths = along_rows(part[0][::step], part[1][::step], shift)[::step]
                total += paths.swapaxes(0, 1) if turned else paths
    return total.transpose(2, 0, 1)


def _between_steps(prices: Float[Array, "d h w"], place: Int[Array, "h w"]) -> Float[Array, "h w"]:
    """The lowest point of the parabola through the least price and those beside it, in steps."""
    inner = jnp.clip(place, 1, prices.shape[0] - 2)
    before, here, after = (jnp.take_along_axis(prices, (inner + i)[None], axis=0)[0] for i in (-1, 0, 1))
    curvature = before - 2 * here + after
    shift = 0.5 * (before - after) / jnp.maximum(curvature, 1e-9)
    return place + jnp.where((inner == place) & (curvature > 1e-9), jnp.clip(shift, -0.5, 0.5), 0.0)


def _warp(picture, K, relative, points):
    """`picture` [4 h w] at where `points` [3 h w] of the first camera fall in it, and whether there is its object."""
    height, width = picture.shape[1:]
    # At a TPU's usual precision the points would fall pixels beside.
    turned = jnp.einsum("ij,jhw->ihw", relative[:3, :3], points, precision=jax.lax.Precision.HIGHEST)
    x, y, z = turned + relative[:3, 3, None, None]
    x = jnp.clip(K[0, 0] * x / z + K[0, 2] - 0.5, 0, width - 1.001)
    y = jnp.clip(K[1, 1] * y / z + K[1, 2] - 0.5, 0, height - 1.001)
    left, top = x.astype(jnp.int32), y.astype(jnp.int32)
    across, down = (x - left)[None], (y - top)[None]
    flat = picture.reshape(4, -1)

    def at(row, column):
        return flat[:, row * width + column]

    upper = at(top, left) * (1 - across) + at(top, left + 1) * across
    lower = at(top + 1, left) * (1 - across) + at(top + 1, left + 1) * across
    warped = upper * (1 - down) + lower * down
    return warped, (warped[3] > 0.5) & (z > 0)


def _correlate(picture, warped, window: int):
    """Normalised correlation of the colours of two pictures [4 h w] in windows, and the first one's contrast there.

    Pixels count by how far both show the object: what stands behind an outline is no part of it.
    """
    weight = picture[3:] * warped[3:]
    one, other = picture[:3], warped[:3]
    products = [(weight * a * b).sum(axis=0, keepdims=True) for a, b in ((one, one), (other, other), (one, other))]
    sums = _window_sums(jnp.concatenate([weight, weight * one, weight * other, *products]), window)
    count = jnp.maximum(sums[0], 1e-3)
    mean, other_mean = sums[1:4] / count[None], sums[4:7] / count[None]
    variance = jnp.maximum(sums[7] / count - (mean**2).sum(axis=0), 0)
    other_variance = jnp.maximum(sums[8] / count - (other_mean**2).sum(axis=0), 0)
    covariance = sums[9] / count - (mean * other_mean).sum(axis=0)
    correlation = covariance / jnp.sqrt((variance + NOISE) * (other_variance + NOISE))
    return jnp.where(count >= window * window / 4, correlation, -1.0), jnp.sqrt(variance)


def _window_sums(images, window: int):
    """Sums over the square around each pixel, zero outside the image."""
    for axis in (1, 2):
        margin = [(window // 2, window // 2) if a == axis else (0, 0) for a in range(3)]
        padded, size = jnp.pad(images, margin), images.shape[axis]
        images = sum(jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(window))
    return images
