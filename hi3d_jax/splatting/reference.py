"""The brute-force twin of the rasteriser: every Gaussian at every pixel, in one sort, with plain covariance matrices.

Slow and short on purpose; tests compare value and gradient of `rasterize.render` with it. It shares the thresholds and
constants with the fast path, and none of its formulas.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hi3d_jax.splatting import spherical_harmonics
from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.projection import FRUSTUM_MARGIN, LOW_PASS, MIN_ALPHA, NEAR
from hi3d_jax.splatting.rasterize import MAX_ALPHA, MIN_TRANSMITTANCE, Rendering


def render(
    gaussians: Gaussians,
    w2c: Float[Array, "4 4"],
    K: Float[Array, "3 3"],
    width: int,
    height: int,
    background: float | Float[Array, " 3"] = 1.0,
) -> Rendering:
    """What `rasterize.render` must return, in memory and time proportional to Gaussians times pixels."""
    local = gaussians.means @ w2c[:3, :3].T + w2c[None, :3, 3]
    visible = local[:, 2] > NEAR
    local = jnp.where(visible[:, None], local, jnp.array([[0.0, 0.0, 1.0]]))
    covariances = jax.vmap(lambda *args: _covariance2d(*args, w2c, K, width, height))(
        gaussians.quats, gaussians.log_scales, local
    )
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5), axis=-1)
    projected = local @ K.T
    offsets = pixels[None] - (projected[:, :2] / projected[:, 2:])[:, None, None]
    squared = jnp.einsum("nhwi,nij,nhwj->nhw", offsets, jnp.linalg.inv(covariances), offsets)
    opacities = jnp.where(visible, jax.nn.sigmoid(gaussians.opacity_logits), 0.0)
    alphas = jnp.minimum(opacities[:, None, None] * jnp.exp(-squared / 2), MAX_ALPHA)
    alphas = jnp.where(alphas >= MIN_ALPHA, alphas, 0.0)[jnp.argsort(local[:, 2])]
    transmittance = jnp.cumprod(jnp.concatenate([jnp.ones((1, height, width)), 1 - alphas]), axis=0)[:-1]
    weights = jnp.where(transmittance >= MIN_TRANSMITTANCE, transmittance, 0.0) * alphas
    return _mix(weights, _colours(gaussians, w2c), local[:, 2], background)


def _mix(weights, colours, depths, background) -> Rendering:
    order = jnp.argsort(depths)
    alpha = weights.sum(axis=0)
    colour = jnp.einsum("nhw,nc->hwc", weights, colours[order])
    depth = jnp.einsum("nhw,n->hw", weights, depths[order]) / jnp.where(alpha > 0, alpha, 1.0)
    background = jnp.broadcast_to(jnp.asarray(background, jnp.float32), 3)[None, None]
    return Rendering(colour + (1 - alpha)[..., None] * background, alpha, depth)


def _colours(gaussians, w2c):
    centre = -jnp.linalg.inv(w2c[:3, :3]) @ w2c[:3, 3]
    offsets = gaussians.means - centre[None]
    return spherical_harmonics.colours(gaussians.sh, offsets / jnp.linalg.norm(offsets, axis=1, keepdims=True))


def _covariance2d(quat, log_scales, local, w2c, K, width, height) -> Float[Array, "2 2"]:
    """J W Σ Wᵀ Jᵀ + 0.3 I (Zwicker et al. 2001, eq. 31) of one Gaussian, Σ = R S Sᵀ Rᵀ."""
    w, x, y, z = quat / jnp.linalg.norm(quat)
    axis = jnp.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = jnp.eye(3) + 2 * w * axis + 2 * axis @ axis
    covariance = rotation @ jnp.diag(jnp.exp(2 * log_scales)) @ rotation.T
    limits = jnp.array([[-K[0, 2], width - K[0, 2]], [-K[1, 2], height - K[1, 2]]])
    limits = (limits + FRUSTUM_MARGIN / 2 * jnp.array([[-width, width], [-height, height]])) / jnp.diag(K)[:2, None]
    slope = jnp.clip(local[:2] / local[2], limits[:, 0], limits[:, 1])
    jacobian = K[:2, :2] @ jnp.concatenate([jnp.eye(2), -slope[:, None]], axis=1) / local[2]
    return jacobian @ w2c[:3, :3] @ covariance @ w2c[:3, :3].T @ jacobian.T + LOW_PASS * jnp.eye(2)
