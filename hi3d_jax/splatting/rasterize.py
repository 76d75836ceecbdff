"""Draws Gaussians tile by tile, with a hand-written backward pass (Kerbl et al. 2023, section 6).

Front to back, a pixel takes from each Gaussian the weight alpha · transmittance, with
alpha = min(opacity · exp(-m²/2), MAX_ALPHA), none where alpha < MIN_ALPHA, and none once the transmittance in front has
fallen below MIN_TRANSMITTANCE; `reference.py` has the same three thresholds. The backward pass walks front to back
again, recomputing transmittances instead of storing them. Per pixel, with q the gradient's product with what a
Gaussian contributes, dL/dalpha_i = transmittance_i q_i - (sum over j > i of weight_j q_j) / (1 - alpha_i), and the sum
behind i is the total, known from the drawn image, minus the sum in front. Over the pixels of a tile only ten moments
per Gaussian are needed, small matrix products with the pixel coordinates; one scatter adds them up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.projection import MIN_ALPHA, Footprints, project
from hi3d_jax.splatting.tiles import (
    GROUP,
    STEP,
    TILE,
    Capacity,
    TileLists,
    bin_footprints,
    needed_capacity,
    tile_grid,
)

MAX_ALPHA = 0.99
MIN_TRANSMITTANCE = 1e-4

NUM_PIXELS = TILE * TILE
NUM_CHANNELS = 5  # red, green, blue, alpha, depth
NUM_FEATURES = 10  # x, y, p, q, r, opacity, red, green, blue, depth


class Rendering(NamedTuple):
    """`colour`: sRGB over the background, not cut at 1. `alpha`: in [0, 1]. `depth`: mean of the Gaussians' z along the
    optical axis weighted by what each contributes to the pixel, divided by alpha; 0 where alpha is 0.
    """

    colour: Float[Array, "h w 3"]
    alpha: Float[Array, "h w"]
    depth: Float[Array, "h w"]


def render(
    gaussians: Gaussians,
    w2c: Float[Array | np.ndarray, "4 4"],
    K: Float[Array | np.ndarray, "3 3"],
    width: int,
    height: int,
    background: float | Float[Array | np.ndarray, " 3"] = 1.0,
    capacity: Capacity | None = None,
) -> Rendering:
    """Draws the Gaussians as seen by one camera; differentiable in `gaussians`.

    Without `capacity` the needed one is counted first, which takes a look at concrete values: under `jax.jit` or
    `jax.grad`, pass one from `capacity_for`. With one that is too small, all of the result is NaN.
    """
    if capacity is None:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((gaussians, w2c, K))):
            raise ValueError("render inside jit, grad or vmap needs capacity=capacity_for(gaussians, w2c, K, ...)")
        capacity = capacity_for(gaussians, w2c, K, width, height)
    return _render(gaussians, jnp.asarray(w2c), jnp.asarray(K), width, height, jnp.asarray(background), capacity)


class LightStops(NamedTuple):
    """Where the light of a pixel stops, as z along the optical axis: `mean` and standard deviation `spread`, both 0
    where nothing is drawn.
    """

    mean: Float[Array, "h w"]
    spread: Float[Array, "h w"]


def light_stops(gaussians: Gaussians, w2c, K, width: int, height: int, capacity: Capacity | None = None) -> LightStops:
    """Depths with their doubt: where the Gaussians are half transparent, `mean` lies behind the surface by about a
    `spread`, as it does exactly for a uniform haze behind a surface, so that `mean - spread` is in front of it.
    `capacity`: as for `render`; all of the result is NaN where it is too small."""
    if capacity is None:
        capacity = capacity_for(gaussians, w2c, K, width, height)
    return _light_stops(gaussians, jnp.asarray(w2c), jnp.asarray(K), width, height, capacity)


def capacity_for(gaussians: Gaussians, w2c, K, width: int, height: int) -> Capacity:
    """The capacity with which this camera's view of the Gaussians can be drawn, rounded up to powers of two."""
    return Capacity.holding(*np.asarray(_needed(gaussians, jnp.asarray(w2c), jnp.asarray(K), width, height)).tolist())


def capacity_for_all(gaussians: Gaussians, w2c, K, width: int, height: int) -> Capacity:
    """One capacity for all cameras `w2c` [t 4 4], `K` [t 3 3]: drawing them compiles once instead of several times."""
    sizes = [capacity_for(gaussians, one, other, width, height) for one, other in zip(w2c, K, strict=True)]
    return Capacity(max(size.pairs for size in sizes), max(size.steps for size in sizes))


@jax.jit(static_argnums=(3, 4))
def _needed(gaussians, w2c, K, width, height):
    return needed_capacity(project(gaussians, w2c, K, width, height), width, height)


@jax.jit(static_argnums=(3, 4, 6))
def _render(gaussians, w2c, K, width, height, background, capacity) -> Rendering:
    footprints = project(gaussians, w2c, K, width, height)
    lists = bin_footprints(jax.lax.stop_gradient(footprints), width, height, capacity)
    return rasterize(footprints, lists, width, height, background)


@jax.jit(static_argnums=(3, 4, 5))
def _light_stops(gaussians, w2c, K, width, height, capacity) -> LightStops:
    footprints = project(gaussians, w2c, K, width, height)
    lists = bin_footprints(footprints, width, height, capacity)
    # Around a depth amid the scene, squares lose no digits.
    middle = jnp.median(footprints.depths)
    z = footprints.depths - middle
    drawn = rasterize(footprints._replace(colours=jnp.stack([z, z * z, z], axis=1)), lists, width, height, 0.0)
    first, second, _ = jnp.moveaxis(drawn.colour / jnp.maximum(drawn.alpha, MIN_ALPHA)[..., None], -1, 0)
    # Where the lists overflowed, alpha is NaN and so is everything.
    shown = ~(drawn.alpha == 0)
    spread = jnp.sqrt(jnp.maximum(second - first * first, 0.0))
    return LightStops(jnp.where(shown, first + middle, 0.0), jnp.where(shown, spread, 0.0))


def rasterize(footprints: Footprints, lists: TileLists, width: int, height: int, background=1.0) -> Rendering:
    """Composites footprints along their tile lists over `background`; NaN throughout where the lists overflowed."""
    table = jnp.concatenate(
        [
            footprints.means2d,
            footprints.whitening,
            footprints.opacities[:, None],
            footprints.colours,
            footprints.depths[:, None],
        ],
        axis=1,
    )
    channels = _composite(table, lists, tile_grid(width, height))
    channels = jnp.where(lists.overflow, jnp.nan, channels)[:, :height, :width]
    colour, alpha, depth = jnp.moveaxis(channels[:3], 0, -1), channels[3], channels[4]
    colour = colour + (1 - alpha)[..., None] * jnp.broadcast_to(jnp.asarray(background, jnp.float32), 3)[None, None]
    # Alpha is either zero or at least MIN_ALPHA.
    return Rendering(colour, alpha, depth / jnp.maximum(alpha, MIN_ALPHA))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _composite(table: Float[Array, "n 10"], lists: TileLists, grid: tuple[int, int]) -> Float[Array, "5 h w"]:
    """Colour, alpha and alpha-weighted depth on whole tiles, from one row of features per Gaussian."""
    return _composite_forward(table, lists, grid)[0]


def _composite_forward(table, lists, grid):
    features = _features_by_step(table, lists, grid)
    channels = _image_from_tiles(_draw(features, lists.first_steps), lists.tiles, grid)
    return channels, (table, lists, channels)


def _composite_backward(grid, saved, gradient):
    table, lists, channels = saved
    features = _features_by_step(table, lists, grid)
    total = (gradient * channels).sum(axis=0, keepdims=True)
    pixels = _tiles_from_image(jnp.concatenate([gradient, total]), lists.tiles)
    gradients = _feature_gradients(features, _moments(features, lists.first_steps, pixels))
    # Empty places of the lists point one row past the table, and add zeros there.
    summed = jnp.zeros((table.shape[0] + 1, NUM_FEATURES)).at[lists.members.reshape(-1)].add(gradients)
    return summed[:-1], None


_composite.defvjp(_composite_forward, _composite_backward)


def _features_by_step(table, lists: TileLists, grid) -> Float[Array, "s k 10 t"]:
    """Features of every step's Gaussians, with centres relative to the centres of their tiles."""
    nobody = jnp.zeros((1, NUM_FEATURES))
    features = jnp.moveaxis(jnp.concatenate([table, nobody])[lists.members], -1, 2)
    step = jnp.arange(lists.members.shape[0], dtype=jnp.int32)
    group = jnp.searchsorted(lists.first_steps, step, side="right") - 1
    tiles = lists.tiles[jnp.minimum(group, lists.tiles.shape[0] - 1)]
    corners = jnp.stack([tiles % grid[0], tiles // grid[0]], axis=1) * TILE
    return features.at[:, :, :2].add(-(corners + TILE / 2)[:, None])


def _draw(features, first_steps) -> Float[Array, "g 5 t p"]:
    def draw_group(group):
        def unfinished(carry):
            step, transmittance, _ = carry
            return (step < first_steps[group + 1]) & (transmittance.max() >= MIN_TRANSMITTANCE)

        def draw_step(carry):
            step, transmittance, channels = carry
            return step + 1, *_draw_step(_at(features, step), transmittance, channels)

        nothing = jnp.zeros((GROUP, NUM_PIXELS))
        start = first_steps[group], nothing + 1, (nothing,) * NUM_CHANNELS
        return jnp.stack(jax.lax.while_loop(unfinished, draw_step, start)[2])

    return jax.lax.map(draw_group, jnp.arange(first_steps.shape[0] - 1))


def _draw_step(features, transmittance, channels):
    """STEP Gaussians written out one after another: XLA fuses them into one pass over the pixels."""
    for gaussian in features:
        alpha = _alpha(gaussian)
        weight = jnp.where(transmittance >= MIN_TRANSMITTANCE, alpha * transmittance, 0.0)
        values = (*gaussian[6:9, :, None], 1.0, gaussian[9, :, None])
        channels = tuple(channel + weight * value for channel, value in zip(channels, values, strict=True))
        transmittance = transmittance * (1 - alpha)
    return transmittance, channels


def _at(features, step):
    return jax.lax.dynamic_index_in_dim(features, step, axis=0, keepdims=False)


def _alpha(gaussian: Float[Array, "10 t"]) -> Float[Array, "t p"]:
    x, y, p, q, r, opacity = gaussian[:6, :, None]
    pixel_x, pixel_y = _pixel_offsets()[:, None, :]
    dx, dy = pixel_x - x, pixel_y - y
    along, across = p * dx + q * dy, r * dy
    alpha = jnp.minimum(opacity * jnp.exp(-0.5 * (along * along + across * across)), MAX_ALPHA)
    return jnp.where(alpha >= MIN_ALPHA, alpha, 0.0)


def _moments(features, first_steps, pixels) -> Float[Array, "s k 10 t"]:
    """Sums over a tile's pixels for each Gaussian: dL/dalpha · alpha times (1, x, y, x², xy, y²), with x and y from the
    tile's centre; then weight times the gradients of red, green, blue and depth."""

    def add_group(group, moments):
        red, green, blue, alpha, depth, total = pixels[group]

        def unfinished(carry):
            step, transmittance, _, _ = carry
            return (step < first_steps[group + 1]) & (transmittance.max() >= MIN_TRANSMITTANCE)

        def add_step(carry):
            step, transmittance, behind, moments = carry
            transmittance, behind, values = _moments_of_step(
                _at(features, step), transmittance, behind, jnp.stack([red, green, blue, depth]), alpha
            )
            return step + 1, transmittance, behind, jax.lax.dynamic_update_index_in_dim(moments, values, step, axis=0)

        start = first_steps[group], jnp.ones((GROUP, NUM_PIXELS)), total, moments
        return jax.lax.while_loop(unfinished, add_step, start)[3]

    start = jnp.zeros((features.shape[0], STEP, NUM_FEATURES, GROUP))
    return jax.lax.fori_loop(0, first_steps.shape[0] - 1, add_group, start)


def _moments_of_step(features, transmittance, behind, gradients, alpha_gradient):
    """`behind`: sum of weight · q over everything not yet walked past."""
    polynomials = _polynomials()
    values = []
    for gaussian in features:
        alpha = _alpha(gaussian)
        live = transmittance >= MIN_TRANSMITTANCE
        weight = jnp.where(live, alpha * transmittance, 0.0)
        red, green, blue, depth = gaussian[6:, :, None]
        q = red * gradients[0] + green * gradients[1] + blue * gradients[2] + depth * gradients[3] + alpha_gradient
        behind = behind - weight * q
        # Cut at MAX_ALPHA, alpha does not depend on the Gaussian; where it is zero, it is a factor.
        slope = jnp.where(live & (alpha < MAX_ALPHA), (transmittance * q - behind / (1 - alpha)) * alpha, 0.0)
        transmittance = transmittance * (1 - alpha)
        values.append(jnp.concatenate([polynomials @ slope.T, jnp.einsum("tp,ctp->ct", weight, gradients)]))
    return transmittance, behind, jnp.stack(values)


def _feature_gradients(features, moments) -> Float[Array, "m 10"]:
    """Gradients in the features of every place of the lists, from the moments around tile centres."""
    x, y, p, q, r, opacity = jnp.moveaxis(features[:, :, :6], 2, 0)
    m, mx, my, mxx, mxy, myy, red, green, blue, depth = jnp.moveaxis(moments, 2, 0)
    dx, dy = mx - x * m, my - y * m
    dxx, dxy, dyy = mxx - 2 * x * mx + x * x * m, mxy - x * my - y * mx + x * y * m, myy - 2 * y * my + y * y * m
    along, across = p * dx + q * dy, r * dy
    gradients = [
        p * along,
        q * along + r * across,
        -(p * dxx + q * dxy),
        -(p * dxy + q * dyy),
        -r * dyy,
        m / jnp.maximum(opacity, MIN_ALPHA),
        red,
        green,
        blue,
        depth,
    ]
    return jnp.stack(gradients, axis=-1).reshape(-1, NUM_FEATURES)


# Constants of the program, as arrays: computed inside it, XLA would work them out again for every pixel and Gaussian.
def _pixel_offsets() -> Float[np.ndarray, "2 p"]:
    """x and y of a tile's pixel centres from the tile's centre."""
    along = np.arange(TILE, dtype=np.float32) + (0.5 - TILE / 2)
    return np.stack([np.tile(along, TILE), np.repeat(along, TILE)])


def _polynomials() -> Float[np.ndarray, "6 p"]:
    x, y = _pixel_offsets()
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y])


def _image_from_tiles(groups: Float[Array, "g c t p"], tiles, grid) -> Float[Array, "c h w"]:
    columns, rows = grid
    channels = groups.shape[1]
    by_tile = groups.swapaxes(1, 2).reshape(-1, channels, TILE, TILE)
    in_order = by_tile[jnp.argsort(tiles.reshape(-1))[: rows * columns]].reshape(rows, columns, channels, TILE, TILE)
    return in_order.transpose(2, 0, 3, 1, 4).reshape(channels, rows * TILE, columns * TILE)


def _tiles_from_image(image: Float[Array, "c h w"], tiles: Int[Array, "g t"]) -> Float[Array, "g c t p"]:
    channels, height, width = image.shape
    blocks = image.reshape(channels, height // TILE, TILE, width // TILE, TILE)
    by_tile = blocks.transpose(1, 3, 0, 2, 4).reshape(-1, channels, NUM_PIXELS)
    return by_tile[jnp.minimum(tiles, by_tile.shape[0] - 1)].swapaxes(1, 2)
