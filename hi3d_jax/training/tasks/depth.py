"""The depth network's training on rendered truth: MiDaS's scale- and shift-invariant loss (Ranftl et al. 2020).

The network is shown what stage 2 shows it: pictures of stage 2's size under a little noise, made smaller. With
`data.coarse` they are degraded views, and the network learns to see the true shape in them.

Disparity is 1 / depth. Where nothing is, the truth is that of `far`, behind every object of the data set, so that
stretching a map to [0, 1] puts the background at 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.depth import DPT, depth_input
from hi3d_jax.models.depth_backbone import DPTConfig
from hi3d_jax.training.networks import NetworkSpec, Specs
from hi3d_jax.training.tasks.pictures import over_white

# Scales of the gradient-matching term, each half as fine as the one before.
GRADIENT_SCALES = 4


@dataclasses.dataclass(frozen=True)
class DepthTask:
    """Learn disparity of single views; the data need depths."""

    # Sizes of the depth network.
    depth: DPTConfig = DPTConfig()
    # Depth of the background, in longest sides of the object: beyond the farthest corner at distance 1.5.
    far: float = 2.4
    # Weight of matching the edges of the disparity (their equation 11).
    gradient_weight: float = 0.5
    # Weight of the plain error against disparity stretched to [0, 1]: it holds the map where its last ReLU is alive.
    anchor_weight: float = 0.1
    # Mean and standard deviation of the logarithm of the noise on the views: what stage 2 adds to its coarse views.
    log_noise: tuple[float, float] = (-3.0, 0.5)

    def trained(self) -> Specs:
        """The networks that learn."""
        return {"depth": NetworkSpec(DPT, self.depth)}

    def frozen(self) -> Specs:
        """None."""
        return {}

    def loss(
        self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The mean loss of `views` [b t h w 4], or `coarse` [b t h w 3], with `depths` [b t h w], and its parts."""
        images, truth = self._examples(batch)
        strength_key, noise_key = jax.random.split(key)
        mean, std = self.log_noise
        strength = jnp.exp(mean + std * jax.random.normal(strength_key, (len(images), 1, 1, 1)))
        made = networks["depth"](depth_input(images + strength * jax.random.normal(noise_key, images.shape)))
        error = aligned(made) - aligned(truth)
        absolute, edges = jnp.abs(error).mean(), gradient_matching(error)
        anchor = jnp.abs(made - stretched(truth)).mean()
        total = absolute + self.gradient_weight * edges + self.anchor_weight * anchor
        return total, {"aligned_error": absolute, "edges": edges, "anchor": anchor, "alive": (made > 0).mean()}

    def _examples(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        """Pictures in [-1, 1], and true disparity at the size in which the network sees them."""
        pictures = over_white(batch["coarse"] if "coarse" in batch else batch["views"])
        pictures, depths = (x.reshape(-1, *x.shape[2:]) for x in (pictures, batch["depths"]))
        rows, columns = jax.eval_shape(depth_input, pictures).shape[1:3]
        # Unmixed: between an edge and what is behind it nothing is.
        depths = jax.image.resize(depths, (len(depths), rows, columns), "nearest")
        return pictures, 1 / jnp.where(depths > 0, depths, self.far)

    def samples(
        self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array
    ) -> tuple[list[Array], dict[str, Array]]:
        """Rows of pictures, and scalars: what is shown, true and learnt disparity stretched to [0, 1]."""
        images, truth = self._examples(batch)
        images = depth_input(images)
        truth, made = stretched(truth), stretched(networks["depth"](images))
        pictures = [jnp.repeat(2 * x[..., None] - 1, 3, axis=-1) for x in (truth, made)]
        return [images, *pictures], {"stretched_error": jnp.abs(made - truth).mean()}


def aligned(disparity: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    """Each map less its median, over its mean distance from it (their equations 5 and 6)."""
    centred = disparity - jnp.median(disparity, axis=(1, 2), keepdims=True)
    return centred / jnp.maximum(jnp.abs(centred).mean((1, 2), keepdims=True), 1e-6)


def stretched(disparity: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    """Each map from its least to its largest value as 0 to 1, as the second stage takes it; a constant map is 0."""
    x = disparity - disparity.min((1, 2), keepdims=True)
    return x / jnp.maximum(x.max((1, 2), keepdims=True), 1e-6)


def gradient_matching(error: Float[Array, "b h w"]) -> Float[Array, ""]:
    """The error's mean absolute slope, summed over scales."""
    total = jnp.zeros(())
    for scale in range(GRADIENT_SCALES):
        coarse = error[:, :: 2**scale, :: 2**scale]
        total += jnp.abs(jnp.diff(coarse, axis=1)).mean() + jnp.abs(jnp.diff(coarse, axis=2)).mean()
    return total
