"""Moves Gaussians to where they are needed, at a fixed count (3DGS-MCMC: Kheradmand et al. 2024, sections 3.2 and 3.3).

A dead Gaussian (nearly transparent) becomes a copy of a live one, drawn with probability proportional to opacity; the
copies' opacities and scales are corrected so that together they look like the one did. Position noise lets
transparent Gaussians wander, so that they find places that nobody has covered yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray
from scipy import ndimage

from hi3d_jax import cameras
from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.projection import MIN_ALPHA, rotations

# Opacity under which a Gaussian is dead, and around which the noise fades in (the paper's 0.005).
DEAD_OPACITY = 0.005
NOISE_SHARPNESS = 100.0
# A centre is a floater when it lies outside the mask, widened by this share of the image, in this share of the views.
MASK_MARGIN = 0.02
FLOATER_SHARE = 0.25
# Nodes of the integral in `split`: t from 0 to 6 standard deviations.
QUADRATURE_NODES = 64
QUADRATURE_END = 6.0


def relocate(key: PRNGKeyArray, gaussians: Gaussians) -> tuple[Gaussians, Bool[Array, " n"]]:
    """Dead Gaussians moved onto live ones, and which ones changed: the moved and those they were copied from."""
    opacities = gaussians.opacities
    dead = opacities <= DEAD_OPACITY
    count = len(gaussians)
    log_odds = jnp.where(dead, -jnp.inf, jnp.log(opacities))
    # With nobody alive there is nobody to copy.
    possible = dead & ~dead.all()
    sampled = jax.random.categorical(key, jnp.where(dead.all(), 0.0, log_odds), shape=(count,))
    source = jnp.where(possible, sampled, jnp.arange(count))
    copies = jnp.zeros(count).at[source].add(1.0)
    # A dead one that was moved is nobody's source any more, so that a source counts itself and its copies.
    opacities, shrink = split(opacities[source], copies[source])
    changed = possible | (copies > 1)
    moved = gaussians[source]
    corrected = Gaussians(
        means=moved.means,
        quats=moved.quats,
        log_scales=moved.log_scales + jnp.log(shrink)[:, None],
        opacity_logits=jax.scipy.special.logit(jnp.clip(opacities, DEAD_OPACITY, 1 - 1e-4)),
        sh=moved.sh,
    )
    return jax.tree.map(lambda new, old: _select(changed, new, old), corrected, gaussians), changed


def split(opacity: Float[Array, " n"], copies: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Opacity of each of `copies` equal Gaussians that replace one of `opacity`, and the factor on their scales.

    Equal opacity at the centre: (1 - new)^copies = 1 - opacity (eq. 8). Equal integral along a line (eq. 9): the paper
    sums binomials of alternating sign; the same number is the integral of 1 - (1 - new · exp(-t²/2))^copies over t,
    divided by sqrt(2 pi), which has no cancellation and no largest count.
    """
    new = -jnp.expm1(jnp.log1p(-jnp.minimum(opacity, 1 - 1e-6)) / copies)
    t = (np.arange(QUADRATURE_NODES) + 0.5) * (QUADRATURE_END / QUADRATURE_NODES)
    transparent = jnp.log1p(-new[:, None] * jnp.asarray(np.exp(-t * t / 2), jnp.float32)[None])
    integral = -jnp.expm1(copies[:, None] * transparent).mean(axis=1) * (2 * QUADRATURE_END)
    return new, opacity * np.float32(np.sqrt(2 * np.pi)) / jnp.maximum(integral, 1e-12)


def position_noise(key: PRNGKeyArray, gaussians: Gaussians) -> Float[Array, "n 3"]:
    """Normal offsets shaped by each Gaussian's covariance, nearly zero for all but the transparent (eq. 10)."""
    axes = rotations(gaussians.quats) * gaussians.scales[:, None, :]
    gate = jax.nn.sigmoid(NOISE_SHARPNESS * (DEAD_OPACITY - gaussians.opacities))
    normal = jax.random.normal(key, gaussians.means.shape)
    return gate[:, None] * jnp.einsum("nij,nkj,nk->ni", axes, axes, normal)


def without_floaters(gaussians: Gaussians, alphas: Float[np.ndarray, "t h w"], seen: cameras.Cameras) -> Gaussians:
    """The Gaussians that draw something, and whose centres lie within the masks of most views.

    Not of all views: those of a generated orbit do not quite agree. Outside an image there is no mask to violate.
    """
    pixels, depths = cameras.project(np.asarray(gaussians.means), seen)
    margin = 1 + 2 * round(MASK_MARGIN * max(seen.width, seen.height))
    outside = np.zeros(len(gaussians))
    for alpha, points, depth in zip(alphas, pixels, depths, strict=True):
        x, y = np.floor(np.clip(points, -1, [seen.width, seen.height])).astype(int).T
        within = (depth > 0) & (x >= 0) & (y >= 0) & (x < seen.width) & (y < seen.height)
        widened = ndimage.maximum_filter(alpha, size=margin)
        outside[within] += widened[y[within], x[within]] < 0.5
    kept = (outside <= FLOATER_SHARE * len(alphas)) & (np.asarray(gaussians.opacities) >= MIN_ALPHA)
    # Masks that contradict the Gaussians altogether are no evidence against single ones.
    return gaussians[np.flatnonzero(kept)] if kept.any() else gaussians


def _select(mask, new, old):
    return jnp.where(mask.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
