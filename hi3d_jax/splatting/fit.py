"""Fits Gaussians to views with known cameras and masks (Kerbl et al. 2023; Kheradmand et al. 2024; Hi3D section 4.4).

One view a step, in an order shuffled anew for every round over the views; first at reduced resolution. The number of
Gaussians stays that of the points given until the end, when those are dropped that draw nothing or float outside the
masks.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from hi3d_jax.cameras import Cameras
from hi3d_jax.splatting import adam, density
from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.initialise import from_points
from hi3d_jax.splatting.losses import photometric
from hi3d_jax.splatting.projection import project
from hi3d_jax.splatting.rasterize import capacity_for_all, rasterize
from hi3d_jax.splatting.spherical_harmonics import num_coefficients
from hi3d_jax.splatting.tiles import Capacity, bin_footprints


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How Gaussians are fitted. Learning rates are per Adam step; lengths are in units of the scene's extent.

    A few hundred steps want rates several times those of 3DGS, which takes thirty thousand.
    """

    steps: int = 1000
    sh_degree: int = 1
    seed: int = 0
    # (share of the steps, longest image side in pixels) one after another; views are shrunk to it, never enlarged.
    # Two sizes below 256 cost more to compile than they save.
    resolutions: tuple[tuple[float, int], ...] = ((0.5, 256), (0.5, 1024))
    means_rate: float = 1e-3
    quats_rate: float = 6e-2
    log_scales_rate: float = 1.5e-1
    opacity_logits_rate: float = 3e-1
    sh_rate: float = 2e-2
    # All rates fall exponentially to this share of themselves.
    final_share: float = 0.1
    # 3DGS: the view-dependent coefficients learn 20 times slower.
    sh_rest_ratio: float = 0.05
    dssim_weight: float = 0.2
    alpha_weight: float = 0.5
    # 3DGS-MCMC: pull towards few and small Gaussians.
    opacity_weight: float = 1e-3
    scale_weight: float = 1e-2
    noise_rate: float = 1e3
    relocate_every: int = 100
    # No relocation in this last share of the steps, so that every Gaussian settles.
    settle_share: float = 0.2


def fit(
    views: Float[np.ndarray, "t h w 3"],
    alphas: Float[np.ndarray, "t h w"],
    cameras: Cameras,
    config: FitConfig,
    points: Float[np.ndarray, "n 3"],
    colours: Float[np.ndarray, "n 3"],
    progress: bool = True,
) -> Gaussians:
    """Gaussians that look like `views` (sRGB in [0, 1] over white) from `cameras`, started at coloured `points`.

    Deterministic for one seed and machine. Raises `ValueError` where views, alphas and cameras do not match.
    """
    _check(views, alphas, cameras)
    gaussians = from_points(points, colours, config.sh_degree)
    moments = adam.start(gaussians)
    key = jax.random.key(config.seed)
    order = _view_order(len(views), config)
    extent = _extent(cameras)
    stages = _stages(config, cameras)
    with tqdm(total=config.steps, desc="splats", disable=not progress) as bar:
        for step in range(config.steps):
            if step in stages:
                level = _Level.of(views, alphas, cameras.resized(*stages[step]), gaussians)
            key, step_key, relocation_key = jax.random.split(key, 3)
            rates = _rates(config, step, extent)
            gaussians, moments, loss = level.step(gaussians, moments, order[step], step_key, rates, config)
            if _relocates(config, step):
                gaussians, changed = _relocate(relocation_key, gaussians)
                moments = adam.forget(moments, changed)
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
    return density.without_floaters(gaussians, alphas, cameras)


class _Level:
    """The views at one resolution, and the capacity that drawing them has needed so far."""

    def __init__(self, targets, cameras: Cameras, gaussians: Gaussians):
        self.targets = [jnp.asarray(target) for target in targets]
        self.w2c, self.K = jnp.asarray(cameras.w2c), jnp.asarray(cameras.K)
        self.size = cameras.width, cameras.height
        needed = capacity_for_all(gaussians, self.w2c, self.K, *self.size)
        # Room beyond what the start needs: growing later costs another compilation, idle room the time to sort it.
        self.capacity = Capacity.holding(3 * needed.pairs // 2, 3 * needed.steps // 2)

    @staticmethod
    def of(views, alphas, cameras: Cameras, gaussians: Gaussians) -> _Level:
        """The views at the cameras' image size, as colour premultiplied with alpha, and alpha."""
        premultiplied = np.concatenate([views - (1 - alphas[..., None]), alphas[..., None]], axis=-1)
        shape = (len(views), cameras.height, cameras.width, 4)
        if shape != premultiplied.shape:
            premultiplied = jax.image.resize(premultiplied, shape, "linear", antialias=True)
        return _Level(premultiplied, cameras, gaussians)

    def step(self, gaussians, moments, view, key, rates, config):
        """One update from one view; drawn again with more capacity where the lists did not fit."""
        weights = config.dssim_weight, config.alpha_weight, config.opacity_weight, config.scale_weight
        while True:
            gaussians, moments, loss, needed = _compiled_step()(
                gaussians,
                moments,
                self.targets[view],
                (self.w2c[view], self.K[view]),
                key,
                rates,
                weights,
                config.noise_rate,
                size=self.size,
                capacity=self.capacity,
            )
            grown = self.capacity.grown_to(*(int(n) for n in needed))
            if grown == self.capacity:
                return gaussians, moments, loss
            self.capacity = grown


def _step(gaussians, moments, target, camera, key, rates, weights, noise_rate, *, size, capacity):
    """One optimiser step, or nothing but the capacity that it needs where the given one is too small."""

    def loss_of(gaussians):
        footprints = project(gaussians, *camera, *size)
        lists = bin_footprints(jax.lax.stop_gradient(footprints), *size, capacity)
        drawn = rasterize(footprints, lists, *size)
        return _loss(gaussians, drawn, target, weights), lists

    (loss, lists), gradient = jax.value_and_grad(loss_of, has_aux=True)(gaussians)
    moved, new_moments = adam.update(gaussians, gradient, moments, rates)
    noise = noise_rate * rates["means"] * density.position_noise(key, moved)
    moved = dataclasses.replace(moved, means=moved.means + noise)
    kept = jax.tree.map(
        lambda new, old: jnp.where(lists.overflow, old, new), (moved, new_moments), (gaussians, moments)
    )
    return *kept, loss, lists.needed


@functools.cache
def _compiled_step():
    # XLA's CPU compiler avoids the widest vectors by default; compositing is 1.6 times faster with them.
    options = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
    return jax.jit(_step, static_argnames=("size", "capacity"), compiler_options=options)


def _loss(gaussians, drawn, target, weights):
    dssim_weight, alpha_weight, opacity_weight, scale_weight = weights
    over_white = target[..., :3] + (1 - target[..., 3:])
    loss = photometric(drawn.colour, drawn.alpha, over_white, target[..., 3], dssim_weight, alpha_weight)
    return loss + opacity_weight * gaussians.opacities.mean() + scale_weight * gaussians.scales.mean()


_relocate = jax.jit(density.relocate)


def _rates(config: FitConfig, step: int, extent: float):
    """Learning rates of this step for each field of `Gaussians`."""
    fallen = config.final_share ** (step / max(config.steps - 1, 1))
    sh = np.full((1, num_coefficients(config.sh_degree), 1), config.sh_rate * config.sh_rest_ratio, np.float32)
    sh[:, 0] = config.sh_rate
    rates = {
        "means": extent * config.means_rate,
        "quats": config.quats_rate,
        "log_scales": config.log_scales_rate,
        "opacity_logits": config.opacity_logits_rate,
        "sh": sh,
    }
    return {name: np.asarray(fallen * rate, np.float32) for name, rate in rates.items()}


def _relocates(config: FitConfig, step: int) -> bool:
    return step > 0 and step % config.relocate_every == 0 and step < (1 - config.settle_share) * config.steps


def _stages(config: FitConfig, cameras: Cameras) -> dict[int, tuple[int, int]]:
    """Image size (width, height) from each step at which it changes."""
    stages, size, share = {}, None, 0.0
    for step_share, longest in config.resolutions:
        scale = min(1.0, longest / max(cameras.width, cameras.height))
        new_size = max(1, round(cameras.width * scale)), max(1, round(cameras.height * scale))
        if new_size != size:
            stages[round(share * config.steps)] = size = new_size
        share += step_share
    return stages


def _view_order(num_views: int, config: FitConfig) -> np.ndarray:
    rng = np.random.default_rng(config.seed)
    rounds = -(-config.steps // num_views)
    return np.concatenate([rng.permutation(num_views) for _ in range(rounds)])


def _extent(cameras: Cameras) -> float:
    """Half the width, in world units, of what the cameras see at the centre of their orbit."""
    distances = np.linalg.norm(cameras.centres - cameras.centres.mean(axis=0), axis=1)
    return max(float(np.median(distances)) * cameras.width / 2 / float(np.median(cameras.K[:, 0, 0])), 1e-6)


def _check(views, alphas, cameras: Cameras) -> None:
    expected = (len(cameras), cameras.height, cameras.width)
    if len(cameras) == 0 or views.shape != (*expected, 3) or alphas.shape != expected:
        raise ValueError(
            f"views {views.shape} and alphas {alphas.shape} do not fit {len(cameras)} cameras of "
            f"{cameras.width} x {cameras.height} pixels; give [t h w 3] and [t h w] of the same views"
        )
