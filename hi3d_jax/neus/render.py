"""Volume rendering of a signed distance: NeuS's unbiased, occlusion-aware weights (Wang et al. 2021, section 3.1).

Rays are sampled where a coarse cache of the field says that a surface may be, so that few samples suffice.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hi3d_jax.neus import fields as neus_fields
from hi3d_jax.neus import hash_grid
from hi3d_jax.neus.fields import FieldConfig, Fields

# Rays that absorb this share count as opaque: the rest is what the quadrature leaves.
OPAQUE = 0.98


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How many places a ray looks at."""

    coarse: int = 192  # look-ups in the cache along the whole ray: cheap; fewer, and surfaces swell by .001
    fine: int = 14  # evaluations of the fields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RayRendering:
    """`colour` [3 n] premultiplied (no background added), `opacity` [n] and every sample's share `weights` [s n]."""

    colour: Array
    opacity: Array
    weights: Array


def alpha_from_sdf(
    sdf: Float[Array, "..."],
    cosine: Float[Array, "..."],
    step: Float[Array, "..."],
    inv_s: float | Float[Array, ""],
    anneal: float | Float[Array, ""],
) -> Float[Array, "..."]:
    """Opacity of a section of length `step` around each sample (NeuS, equation 13).

    `cosine` is the dot product of the gradient with the ray's direction; `anneal` in [0, 1] turns from a rule that lets
    gradients through whatever the surface's orientation (0) to the exact one (1), as in NeuS's code.
    """
    slope = -(jax.nn.relu(0.5 - 0.5 * cosine) * (1 - anneal) + jax.nn.relu(-cosine) * anneal)
    entering = jax.nn.sigmoid((sdf - 0.5 * slope * step) * inv_s)
    leaving = jax.nn.sigmoid((sdf + 0.5 * slope * step) * inv_s)
    return jnp.clip((entering - leaving + 1e-5) / (entering + 1e-5), 0, 1)


def transmittance(alpha: Float[Array, "s n"]) -> Float[Array, "s n"]:
    """Share of light that reaches each sample: the product of (1 - alpha) of the samples before it."""
    samples = alpha.shape[0]
    # A product with a triangle of ones: XLA's cumulative product is many times slower on CPU.
    before = jnp.tril(jnp.ones((samples, samples), alpha.dtype), k=-1)
    return jnp.exp(before @ jnp.log1p(-jnp.minimum(alpha, 1 - 1e-6)))


def cube_span(
    origins: Float[Array, "3 n"], directions: Float[Array, "3 n"], half_side: float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Distances at which rays enter and leave the cube; for rays that miss it, a span of no length."""
    safe = jnp.where(jnp.abs(directions) < 1e-9, 1e-9, directions)
    a, b = (-half_side - origins) / safe, (half_side - origins) / safe
    near = jnp.maximum(jnp.minimum(a, b).max(axis=0), 0)
    return near, jnp.maximum(jnp.maximum(a, b).min(axis=0), near)


def sample_distances(
    cache: Float[Array, "r r r"],
    config: SamplingConfig,
    half_side: float,
    inv_s: float | Float[Array, ""],
    origins: Float[Array, "3 n"],
    directions: Float[Array, "3 n"],
    key: Array,
) -> Float[Array, "edges n"]:
    """Sorted distances along each ray that bound its sections, dense where the cached signed distances say that light
    stops.

    The cache is read at `coarse` places; the opacity a surface would have there is the density samples are drawn from
    (inverse transform, stratified), with a small floor so that no place is ever impossible.
    """
    near, far = cube_span(origins, directions, half_side)
    first, second = jax.random.split(key)
    shift = jax.random.uniform(first, near.shape) - 0.5
    step = (far - near) / config.coarse
    edges = near[None] + (jnp.arange(config.coarse + 1, dtype=step.dtype)[:, None] + shift[None]) * step[None]
    points = (origins[:, None] + edges[None] * directions[:, None]).reshape(3, -1)
    sdf, _ = hash_grid.interpolate(cache, points * (0.5 / half_side) + 0.5, jnp.zeros_like(points))
    # As if the surface were half as sharp: the fit would swell a surface behind which no sample lies.
    passing = jax.nn.sigmoid(0.5 * inv_s * sdf.reshape(edges.shape))
    alpha = jnp.clip((passing[:-1] - passing[1:] + 1e-5) / (passing[:-1] + 1e-5), 0, 1)
    density = alpha * transmittance(alpha) + 1e-3 / config.coarse
    cumulative = jnp.concatenate([jnp.zeros_like(density[:1]), jnp.tril(jnp.ones((config.coarse,) * 2)) @ density])
    jitter = jax.random.uniform(second, (config.fine, *near.shape))
    places = jnp.arange(config.fine, dtype=jitter.dtype)[:, None]
    wanted = (places + jitter) / config.fine * cumulative[-1:]
    distances = jax.vmap(jnp.interp, in_axes=1, out_axes=1)(wanted, cumulative, edges)
    return jnp.concatenate([distances, distances[-1:] + 2 * step[None]])


def render_rays(
    fields: Fields,
    config: FieldConfig,
    level_weights: Float[Array, " levels"],
    origins: Float[Array, "3 n"],
    directions: Float[Array, "3 n"],
    distances: Float[Array, "edges n"],
    inv_s: float | Float[Array, ""],
    anneal: float | Float[Array, ""],
) -> RayRendering:
    """Renders unit-`directions` rays, evaluating the fields in the middle of the sections between `distances`."""
    middle = 0.5 * (distances[1:] + distances[:-1])
    points = origins[:, None] + middle[None] * directions[:, None]
    along = jnp.broadcast_to(directions[:, None], points.shape).reshape(3, -1)
    sdf, cosine, features = neus_fields.evaluate(fields, config, points.reshape(3, -1), along, level_weights)
    colour = neus_fields.colour(fields, features).reshape(points.shape)
    sdf, cosine = sdf.reshape(middle.shape), cosine.reshape(middle.shape)
    alpha = alpha_from_sdf(sdf, cosine, jnp.diff(distances, axis=0), inv_s, anneal)
    weights = alpha * transmittance(alpha)
    # What passes even the last sample of an opaque ray is the quadrature's error, not a reason to move the surface.
    opacity = weights.sum(axis=0)
    weights = weights * (jnp.minimum(opacity / OPAQUE, 1) / jnp.maximum(opacity, 1e-6))[None]
    return RayRendering((weights[None] * colour).sum(axis=1), weights.sum(axis=0), weights)
