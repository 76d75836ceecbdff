"""The fields of NeuS (Wang et al. 2021): a signed distance and a colour for every point of a cube.

The signed distance is a dense grid (the visual hull, where one is given) plus a small network on a multiresolution hash
grid, as in Instant NGP and instant-nsr-pl; negative inside. Colour depends on position alone: on the few views of an
orbit a view-dependent colour explains away exactly the disagreement that should move the surface. Normals are analytic.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hi3d_jax.neus import hash_grid
from hi3d_jax.neus.hash_grid import HashGridConfig

# Softplus of this sharpness is the ReLU-like activation of NeuS's and instant-nsr-pl's SDF network.
SOFTPLUS_BETA = 100.0

# Each layer has sizes of its own, so its shapes carry no names.
Layers = tuple[tuple[Float[Array, "_ _"], Float[Array, " _"]], ...]


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """Sizes of the fields; defaults after instant-nsr-pl's neus-blender.yaml, narrowed to what a CPU can fit."""

    grid: HashGridConfig = HashGridConfig()
    half_side: float = 0.55  # the cube is [-half_side, half_side]^3, world units
    sdf_width: int = 32
    geometry_features: int = 12
    colour_width: int = 32
    colour_layers: int = 2
    sphere_radius: float = 0.4  # of the first surface where no hull is given, world units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fields:
    """Trainable parameters. `dense` is the coarse signed-distance grid [r r r] or None (then the network starts as a
    sphere); all else as named."""

    tables: Float[Array, "levels features rows"]
    dense: Float[Array, "r r r"] | None
    sdf_layers: Layers
    colour_layers: Layers


@functools.partial(jax.jit, static_argnums=0)  # Each of its thirty operations alone would be compiled too.
def init_fields(config: FieldConfig, key: Array, dense: Float[Array, "r r r"] | None = None) -> Fields:
    """Fields whose surface is that of `dense`, or a sphere."""
    keys = jax.random.split(key, 3)
    widths = [config.grid.width + 3 + config.geometry_features]
    widths += [config.colour_width] * config.colour_layers + [3]
    outputs = 1 + config.geometry_features
    sdf_layers = init_sphere_layers(keys[1], config.grid.width, config.sdf_width, outputs, config.sphere_radius)
    if dense is not None:
        # The grid holds the distance: the network's share of it starts at zero.
        hidden, (kernel, bias) = sdf_layers
        sdf_layers = (hidden, (kernel.at[0].set(0), bias.at[0].set(0)))
    return Fields(
        hash_grid.init_tables(config.grid, keys[0]),
        None if dense is None else jnp.asarray(dense, jnp.float32),
        sdf_layers,
        _init_relu_layers(keys[2], widths),
    )


def init_sphere_layers(key: Array, encoding: int, width: int, outputs: int, radius: float) -> Layers:
    """Two layers on (position, encoding) whose first output is about |position| - radius.

    Geometric initialisation (Atzmon & Lipman 2020, theorem 1); the encoding's weights start at zero as in IDR.
    """
    first, second = jax.random.split(key)
    from_position = jax.random.normal(first, (width, 3)) * math.sqrt(2 / width)
    kernel = jnp.concatenate([from_position, jnp.zeros((width, encoding))], axis=1)
    last = math.sqrt(math.pi / width) + 1e-4 * jax.random.normal(second, (outputs, width))
    # A type given in words: of a Python number alone it would be a weak one, and programs be compiled for both.
    return ((kernel, jnp.zeros(width)), (last, jnp.full(outputs, -radius, last.dtype)))


def _init_relu_layers(key: Array, widths: list[int]) -> Layers:
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        key, own = jax.random.split(key)
        layers.append((jax.random.normal(own, (outputs, inputs)) * math.sqrt(2 / inputs), jnp.zeros(outputs)))
    return tuple(layers)


def evaluate(
    fields: Fields,
    config: FieldConfig,
    points: Float[Array, "3 n"],
    directions: Float[Array, "3 n"],
    level_weights: Float[Array, " levels"],
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, "features n"]]:
    """Signed distance, its derivative along `directions`, and the inputs of `colour`, at world `points`.

    `level_weights` in [0, 1] fades the levels of the hash grid in, coarse to fine. Points outside the cube are clamped.
    The derivative along a ray is all that rendering needs, and costs a third of the whole gradient.
    """
    to_unit = 0.5 / config.half_side
    positions, unit_directions = points * to_unit + 0.5, directions * to_unit
    encoding, slopes = hash_grid.encode(fields.tables, config.grid, positions, unit_directions)
    encoding = (encoding * level_weights[:, None, None]).reshape(config.grid.width, -1)
    slopes = (slopes * level_weights[:, None, None]).reshape(config.grid.width, -1)

    (kernel, bias), (last, last_bias) = fields.sdf_layers
    inputs = jnp.concatenate([points, encoding])
    before = SOFTPLUS_BETA * (kernel @ inputs + bias[:, None])
    outputs = last @ (jax.nn.softplus(before) / SOFTPLUS_BETA) + last_bias[:, None]
    # The chain rule written out: one more small product instead of differentiating twice.
    slope = last[0] @ (jax.nn.sigmoid(before) * (kernel @ jnp.concatenate([directions, slopes])))
    sdf = outputs[0]
    if fields.dense is not None:
        value, dense_slope = hash_grid.interpolate(fields.dense, positions, unit_directions)
        sdf, slope = sdf + value, slope + dense_slope
    return sdf, slope, jnp.concatenate([inputs, outputs[1:]])


def value_and_gradient(
    fields: Fields, config: FieldConfig, points: Float[Array, "3 n"], level_weights: Float[Array, " levels"]
) -> tuple[Float[Array, " n"], Float[Array, "3 n"]]:
    """The signed distance and its analytic gradient by world position: the outward normal after normalising."""

    def along(axis):
        directions = jnp.broadcast_to(axis[:, None], points.shape)
        return evaluate(fields, config, points, directions, level_weights)[:2]

    values, slopes = jax.lax.map(along, jnp.eye(3, dtype=points.dtype))
    return values[0], slopes


def colour(fields: Fields, features: Float[Array, "features n"]) -> Float[Array, "3 n"]:
    """Colours in [0, 1], sRGB, from the features that `evaluate` returns."""
    hidden = features
    for kernel, bias in fields.colour_layers[:-1]:
        hidden = jax.nn.relu(kernel @ hidden + bias[:, None])
    kernel, bias = fields.colour_layers[-1]
    return jax.nn.sigmoid(kernel @ hidden + bias[:, None])
