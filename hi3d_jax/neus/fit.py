"""Fits a NeuS field to posed, masked views (paper section 4.4; Wang et al. 2021; schedule after instant-nsr-pl).

The surface starts at the visual hull of the masks where one is given, because two CPU cores cannot afford to find it
again, and else as a sphere. Coarse to fine: levels of the hash grid fade in, the surface sharpens, normals anneal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float
from scipy import ndimage
from tqdm import tqdm

from hi3d_jax.cameras import Cameras
from hi3d_jax.neus import fields as neus_fields
from hi3d_jax.neus import render
from hi3d_jax.neus.fields import FieldConfig, Fields
from hi3d_jax.neus.render import SamplingConfig

# Cells whose (blurred) gradient is far below this stay where they are instead of being moved by noise. With 1e-7 a can
# whose start was nearly right came out at a Chamfer distance of .0048 instead of .0039; four others about the same.
DENSE_EPS = 1e-6
# The gradient costs three evaluations: a few points per ray's worth of them would cost as much as the rays themselves.
RAYS_PER_POINT = 4
# 1 / world units: how near to the surface a point counts as being on it.
SPARSITY_SCALE = 50.0


class NeuSError(ValueError):
    """A fit that cannot start or did not converge; the text says what to change."""


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms (NeuS, section 3.3)."""

    rgb: float = 1.0
    mask: float = 0.05
    eikonal: float = 0.1
    sparsity: float = 5e-3  # against matter that no ray needs (SparseNeuS, equation 7)
    surface: float = 1.0  # distance at points that are known to lie on the surface (after Geo-Neus, Fu et al. 2022)


@dataclasses.dataclass(frozen=True)
class NeuSConfig:
    """One fit. The defaults are for views of 256 pixels on a CPU."""

    fields: FieldConfig = FieldConfig()
    sampling: SamplingConfig = SamplingConfig()
    loss: LossWeights = LossWeights()
    iterations: int = 300
    rays: int = 1024  # per iteration
    learning_rate: float = 1e-2  # hash tables and colour network
    sdf_learning_rate: float = 1e-3  # SDF network; a start that is nearly right wants far less
    dense_learning_rate: float = 1e-3  # dense grid: world units that a step moves the surface at most
    colour_first: float = 0.2  # share of the iterations before the surface moves: colours have to mean something first
    smoothing: tuple[float, float] = (3.0, 0.8)  # blur of the dense grid's gradient at the start and end, in cells
    inv_s: tuple[float, float] = (120.0, 1000.0)  # sharpness of the surface at the start and the end, 1 / world units
    cosine_anneal: float = 0.1  # share of the iterations until equation 13 is exact
    level_anneal: float = 0.5  # share of the iterations until all levels of the hash grid are in
    cache_resolution: int = 80  # of the signed-distance cache that guides sampling
    cache_interval: int = 50  # iterations between its renewals
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class FittedSurface:
    """A fitted field with all its levels in; `sdf` and `colour` take world points, in chunks of any size."""

    fields: Fields
    config: FieldConfig

    def sdf(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        """Signed distances, negative inside."""
        return self._evaluate(points)[0]

    def colour(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Colours, sRGB in [0, 1]."""
        return self._evaluate(points)[1]

    def _evaluate(self, points, chunk: int = 2**16):
        parts = []
        for start in range(0, len(points), chunk):
            part = np.asarray(points[start : start + chunk], np.float32)
            padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))  # one shape, one compilation
            values = _evaluate_points(self.fields, self.config, padded)
            parts.append([np.asarray(value)[: len(part)] for value in values])
        return [np.concatenate(values) for values in zip(*parts, strict=True)]


@functools.partial(jax.jit, static_argnums=1)
def _evaluate_points(fields: Fields, config: FieldConfig, points):
    levels = jnp.ones(config.grid.num_levels)
    sdf, _, features = neus_fields.evaluate(fields, config, points.T, jnp.zeros_like(points.T), levels)
    return sdf, neus_fields.colour(fields, features).T


@dataclasses.dataclass(frozen=True)
class RayPool:
    """The pixels a fit draws from: all that show the object or lie near it, and a share of plain background."""

    rgba: np.ndarray  # uint8 [t h w 4], colour over white
    pixels: np.ndarray  # int32 [n]: flat indices near the object
    background: np.ndarray  # int32 [n]: the other ones
    cameras: Cameras

    @classmethod
    def build(cls, views, alphas, cameras: Cameras, margin: int = 4) -> RayPool:
        """`margin`: how far, in pixels, "near the object" reaches beyond the mask."""
        near = np.stack([ndimage.binary_dilation(alpha > 0.02, iterations=margin) for alpha in alphas]).reshape(-1)
        rgba = np.concatenate([views, alphas[..., None]], axis=-1)
        rgba = np.round(np.clip(rgba, 0, 1) * 255).astype(np.uint8)
        return cls(rgba, np.flatnonzero(near).astype(np.int64), np.flatnonzero(~near).astype(np.int64), cameras)

    def draw(self, generator: np.random.Generator, count: int, background_share: float = 0.1) -> dict[str, np.ndarray]:
        """`count` random rays: origins, unit directions and premultiplied colours [3 n], alphas [n] in [0, 1]."""
        plain = int(count * background_share) if len(self.background) else 0
        chosen = [self.pixels[generator.integers(len(self.pixels), size=count - plain)]]
        if plain:
            chosen.append(self.background[generator.integers(len(self.background), size=plain)])
        view, row, column = np.unravel_index(np.concatenate(chosen), self.rgba.shape[:3])
        K = self.cameras.K[view]
        local = np.stack(
            [(column + 0.5 - K[:, 0, 2]) / K[:, 0, 0], (row + 0.5 - K[:, 1, 2]) / K[:, 1, 1], np.ones(count)], axis=1
        )
        directions = np.einsum("nij,nj->ni", self.cameras.c2w[view, :3, :3], local)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        rgba = self.rgba[view, row, column].astype(np.float32) / 255
        return {
            "origins": self.cameras.centres[view].T.astype(np.float32),
            "directions": directions.T.astype(np.float32),
            "colour": (rgba[:, :3] - (1 - rgba[:, 3:])).T,
            "alpha": rgba[:, 3],
        }


def schedule(config: NeuSConfig, progress: float | Array) -> dict[str, Array]:
    """What changes over a fit, at `progress` in [0, 1]: `inv_s`, `anneal` and the hash grid's `level_weights`."""
    first, last = config.inv_s
    levels = config.fields.grid.num_levels
    # Half the levels are in from the start; the others follow one after the other.
    reached = levels / 2 * (1 + progress / max(config.level_anneal, 1e-9))
    return {
        "inv_s": first * (last / first) ** jnp.asarray(progress, jnp.float32),
        "anneal": jnp.clip(progress / max(config.cosine_anneal, 1e-9), 0, 1),
        "level_weights": jnp.clip(reached - jnp.arange(levels), 0, 1).astype(jnp.float32),
    }


def loss_terms(
    fields: Fields, config: NeuSConfig, cache: Array, batch: dict[str, Array], progress: Array, key: Array
) -> dict[str, Array]:
    """The unweighted terms of the loss for a batch of rays (NeuS, section 3.3; sparsity after SparseNeuS), and of
    points on the surface where the batch has some."""
    now = schedule(config, progress)
    sampling_key, background_key, point_key = jax.random.split(key, 3)
    half_side = config.fields.half_side
    distances = render.sample_distances(
        cache, config.sampling, half_side, now["inv_s"], batch["origins"], batch["directions"], sampling_key
    )
    out = render.render_rays(
        fields, config.fields, now["level_weights"], batch["origins"], batch["directions"], distances, now["inv_s"],
        now["anneal"],
    )  # fmt: skip
    # A background that changes from ray to ray cannot be imitated by colour: opacity has to be right.
    background = jax.random.uniform(background_key, batch["colour"].shape)
    rendered = out.colour + (1 - out.opacity)[None] * background
    wanted = batch["colour"] + (1 - batch["alpha"])[None] * background
    opacity = jnp.clip(out.opacity, 0.01, 0.99)
    mask = -(batch["alpha"] * jnp.log(opacity) + (1 - batch["alpha"]) * jnp.log(1 - opacity))

    # Every few rays a point where its light comes from, and as many anywhere.
    some = slice(None, None, RAYS_PER_POINT)
    chosen = distances[jnp.argmax(out.weights[:, some], axis=0), jnp.arange(0, config.rays, RAYS_PER_POINT)]
    lit = batch["origins"][:, some] + chosen[None] * batch["directions"][:, some]
    anywhere = jax.random.uniform(point_key, lit.shape, minval=-half_side, maxval=half_side)
    points = jnp.concatenate([lit, anywhere], axis=1)
    sdf, gradient = neus_fields.value_and_gradient(fields, config.fields, points, now["level_weights"])
    # The small constant keeps the derivative of the root finite where the gradient vanishes.
    length = jnp.sqrt((gradient**2).sum(axis=0) + 1e-12)
    terms = {
        "rgb": jnp.abs(rendered - wanted).mean(),
        "mask": mask.mean(),
        "eikonal": ((length - 1) ** 2).mean(),
        "sparsity": jnp.exp(-SPARSITY_SCALE * jnp.abs(sdf[lit.shape[1] :])).mean(),
    }
    if "surface_points" in batch:
        known = batch["surface_points"]
        distance, _, _ = neus_fields.evaluate(fields, config.fields, known, jnp.zeros_like(known), now["level_weights"])
        terms["surface"] = jnp.abs(distance).mean()
    return terms


def build_optimizer(config: NeuSConfig) -> optax.GradientTransformation:
    """Adam with a rate of its own for each kind of parameter, decaying to a tenth; on the fields as a dictionary."""

    def adam(rate: float, start: float, eps: float = 1e-15) -> optax.GradientTransformation:
        begin = int(start * config.iterations)
        rates = optax.join_schedules(
            [optax.constant_schedule(0.0), optax.cosine_decay_schedule(rate, config.iterations - begin, 0.1)], [begin]
        )
        return optax.adam(rates, b1=0.9, b2=0.99, eps=eps)

    kinds = {"tables": "colour", "dense": "dense", "sdf_layers": "sdf", "colour_layers": "colour"}
    groups = {
        "colour": adam(config.learning_rate, 0.0),
        "sdf": adam(config.sdf_learning_rate, config.colour_first),
        "dense": adam(config.dense_learning_rate, config.colour_first, DENSE_EPS),
    }
    return optax.multi_transform(groups, kinds)


def blur(grid: Float[Array, "r r r"], sigma: float | Array) -> Float[Array, "r r r"]:
    """Gaussian blur of a few cells: the Sobolev gradient, which moves a surface as a whole instead of cell by cell
    (after Nicolet et al. 2021, Large Steps in Inverse Rendering of Geometry)."""
    radius = 4
    offsets = jnp.arange(-radius, radius + 1)
    kernel = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(3):
        padded = jnp.pad(grid, [(radius, radius) if a == axis else (0, 0) for a in range(3)])
        size = grid.shape[axis]
        grid = sum(kernel[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(2 * radius + 1))
    return grid


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(config: NeuSConfig, fields, optimizer_state, cache, batch, iteration, key):
    progress = iteration / config.iterations

    def total(fields):
        terms = loss_terms(fields, config, cache, batch, progress, jax.random.fold_in(key, iteration))
        weights = dataclasses.asdict(config.loss)
        return sum(weights[name] * value for name, value in terms.items()), terms

    (_, terms), gradient = jax.value_and_grad(total, has_aux=True)(fields)
    if fields.dense is not None:
        first, last = config.smoothing
        smooth = blur(gradient.dense, first * (last / first) ** progress)
        gradient = dataclasses.replace(gradient, dense=smooth)
    updates, optimizer_state = build_optimizer(config).update(vars(gradient), optimizer_state, vars(fields))
    return Fields(**optax.apply_updates(vars(fields), updates)), optimizer_state, terms


@functools.partial(jax.jit, static_argnums=0)
def _renew_cache(config: NeuSConfig, fields: Fields, progress):
    """Signed distances of the present field on the cache's grid."""
    half_side, resolution = config.fields.half_side, config.cache_resolution
    axis = jnp.linspace(-half_side, half_side, resolution)
    level_weights = schedule(config, progress)["level_weights"]

    def plane(x):
        y, z = jnp.meshgrid(axis, axis, indexing="ij")
        points = jnp.stack([jnp.full_like(y, x), y, z]).reshape(3, -1)
        sdf, _, _ = neus_fields.evaluate(fields, config.fields, points, jnp.zeros_like(points), level_weights)
        return sdf.reshape(resolution, resolution)

    return jax.lax.map(plane, axis)


def fit(
    views: Float[np.ndarray, "t h w 3"],
    alphas: Float[np.ndarray, "t h w"],
    cameras: Cameras,
    config: NeuSConfig = NeuSConfig(),
    initial_sdf: Float[np.ndarray, "r r r"] | None = None,
    surface_points: Float[np.ndarray, "p 3"] | None = None,
    progress: bool = True,
    on_iteration: Callable[[int, Fields], None] | None = None,
) -> FittedSurface:
    """Fits a surface to `views` (over white, [0, 1]) and their `alphas`.

    `initial_sdf`: signed distances on the grid over the field's cube, usually of the visual hull. `surface_points`:
    world points that are known to lie on the surface, as from stereo; every iteration draws as many of them as rays.
    The same seed gives the same surface on the same device. `on_iteration(iteration, fields)` is called after every
    iteration. Raises `NeuSError` if the loss becomes NaN.
    """
    pool = RayPool.build(views, alphas, cameras)
    dense = None if initial_sdf is None else jnp.asarray(initial_sdf)
    fields = neus_fields.init_fields(config.fields, jax.random.key(config.seed), dense)
    # The seed is no part of the programs: fits that differ in nothing else share them.
    compiled_for = dataclasses.replace(config, seed=0)
    optimizer_state = build_optimizer(config).init(vars(fields))
    generator, key = np.random.default_rng(config.seed), jax.random.key(config.seed + 1)
    bar = tqdm(range(config.iterations), desc="NeuS", unit="it", disable=not progress)
    for iteration in bar:
        if iteration % config.cache_interval == 0:
            cache = _renew_cache(compiled_for, fields, iteration / config.iterations)
        batch = pool.draw(generator, config.rays)
        if surface_points is not None and len(surface_points):
            drawn = generator.integers(len(surface_points), size=config.rays)
            batch["surface_points"] = np.asarray(surface_points[drawn].T, np.float32)
        fields, optimizer_state, terms = _step(
            compiled_for, fields, optimizer_state, cache, batch, jnp.asarray(iteration, jnp.int32), key
        )
        if iteration % 50 == 49 or iteration + 1 == config.iterations:
            values = {name: float(value) for name, value in terms.items()}
            if not all(np.isfinite(value) for value in values.values()):
                raise NeuSError(f"the fit diverged at iteration {iteration} ({values}); lower the learning rate")
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        if on_iteration is not None:
            on_iteration(iteration, fields)
    return FittedSurface(fields, config.fields)
