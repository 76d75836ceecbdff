"""Training of stages 1 and 2 (paper sections 4.2 and 4.3, eq. 4 and 5): denoise orbits under the recipe's conditions.

Noise levels, condition noise and condition dropping are the recipe's (HI3D.md section 4). Latents of the views and what
conditions are made of come from networks that stay as they are, except the image encoder where it learns too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from hi3d_jax import diffusion
from hi3d_jax.models.aesthetic import AestheticConfig, AestheticPredictor
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.models.depth import DPT
from hi3d_jax.models.depth_backbone import DPTConfig
from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig
from hi3d_jax.pretrained import read_networks
from hi3d_jax.stages import conditioning
from hi3d_jax.stages.conditioning import ConditionParts, Conditions, Encoders
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training.networks import NetworkSpec, Specs, found_in
from hi3d_jax.training.tasks.decoded_loss import DecodedLossConfig
from hi3d_jax.training.tasks.pictures import over_white, psnr

# Arrays that a cache of the data set may hold for every view; with them the networks that make them are not asked.
LATENTS, IMAGE_TOKENS = "latents", "image_tokens"
# Arrays of examples of stage 2 that were encoded beforehand, one draw of everything but the noise on the latents.
COARSE_LATENTS, DEPTH, COND_AUG = "coarse_latents", "depth", "cond_aug"

# Networks of the released checkpoints, where no folder says otherwise.
RELEASED = {
    "vae": NetworkSpec(Autoencoder, AutoencoderConfig.stable_diffusion()),
    "image_encoder": NetworkSpec(CLIPVision, CLIPVisionConfig.vit_h_14()),
    "depth": NetworkSpec(DPT, DPTConfig.dpt_hybrid()),
    "aesthetic_encoder": NetworkSpec(CLIPVision, CLIPVisionConfig.vit_l_14()),
    "aesthetic_predictor": NetworkSpec(AestheticPredictor, AestheticConfig.laion()),
}


@dataclasses.dataclass(frozen=True)
class StageTask:
    """Learn one stage's U-Net."""

    # What the stage is told, and how noise is drawn; exported with the weights.
    recipe: Recipe
    # Sizes of the U-Net.
    unet: UNetConfig
    # Model folders with the networks that are used as they are: vae, image_encoder and, where the recipe has those
    # conditions, depth, aesthetic_encoder and aesthetic_predictor; the first folder that has one gives it.
    networks: tuple[str, ...] = ()
    # Sizes of an image encoder that learns together with the U-Net; none takes the folder's.
    image_encoder: CLIPVisionConfig | None = None
    # Views of each video that pass the frozen networks at a time, over all devices that have some of them; 0 for all,
    # which needs the most memory.
    views_at_a_time: int = 0
    # What views look like, beside their latents; the paper has no such loss.
    decoded: DecodedLossConfig = DecodedLossConfig()

    def trained(self) -> Specs:
        """The networks that learn. Raises `ValueError` where sizes do not fit each other."""
        specs = {"unet": NetworkSpec(UNet, self.unet)}
        if self.image_encoder is not None:
            specs["image_encoder"] = NetworkSpec(CLIPVision, self.image_encoder)
        self._check({**self.frozen(), **specs})
        return specs

    def frozen(self) -> Specs:
        """The networks that are used as they are. Raises `PretrainedError`."""
        names = ["vae"]
        names += ["image_encoder"] if self.image_encoder is None else []
        names += ["depth"] if "depth" in self.recipe.concat else []
        names += ["aesthetic_encoder", "aesthetic_predictor"] if "aesthetic" in self.recipe.vector else []
        if not self.networks:
            return {name: RELEASED[name] for name in names} | self.decoded.frozen()
        has_own = any("conditioning_vae" in read_networks(folder) for folder in self.networks)
        names += ["conditioning_vae"] if has_own else []
        return {name: found_in(self.networks, name) for name in names} | self.decoded.frozen()

    def _check(self, specs: Specs) -> None:
        recipe, latents = self.recipe, specs["vae"].config.latent_channels
        channels = latents + sum(recipe.depth_unfold**2 if name == "depth" else latents for name in recipe.concat)
        wanted = {
            "in_channels": channels,
            "out_channels": latents,
            "vector_dim": 256 * len(recipe.vector),
            "context_dim": specs["image_encoder"].config.projection_dim,
        }
        wrong = {name: value for name, value in wanted.items() if getattr(self.unet, name) != value}
        if wrong:
            raise ValueError(
                "task.unet does not fit the recipe and the other networks: "
                + ", ".join(f"{name} is {getattr(self.unet, name)}, not {value}" for name, value in wrong.items())
            )

    def loss(
        self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The mean over the videos of equation 4 (5), and its parts.

        `batch` has `views` uint8 [b t h w 4], `elevation_deg` [b], for stage 2 `coarse` uint8 [b t h w 3], and may have
        cached `latents` (unscaled, [b t h w c]) and `image_tokens` ([b t e]); or it has the `encoded_arrays` instead
        of pictures.
        """
        recipe = self.recipe
        latents_key, sigma_key, noise_key, condition_key, drop_key = jax.random.split(key, 5)
        latents = self._latents(networks["vae"], batch, latents_key)
        parts = conditioning.drop(recipe, self._condition_parts(networks, batch, condition_key), drop_key)
        sigma = diffusion.lognormal_sigmas(sigma_key, (len(latents),), *recipe.log_sigma)
        noise = jax.random.normal(noise_key, latents.shape)
        network = denoiser(networks["unet"], conditioning.assemble(recipe, parts))
        losses, denoised = diffusion.edm_loss_and_denoised(network, latents, noise, sigma)
        total, metrics = losses.mean(), {"latent_std": latents.std()}
        if self.decoded.views:
            decoded, decoded_metrics = self.decoded.loss(networks, denoised, latents, jax.random.fold_in(key, 1))
            total, metrics = total + decoded, {**metrics, "latent_error": total, **decoded_metrics}
        return total, metrics

    def encoded_arrays(self) -> tuple[str, ...]:
        """The arrays that stand for the pictures of an encoded example.

        Raises `ValueError` where a network that learns has to see the pictures.
        """
        if self.recipe.stage != 2 or self.image_encoder is not None or "aesthetic" in self.recipe.vector:
            raise ValueError(
                "only stage 2's examples are encoded beforehand, for an image encoder that does not learn and without "
                "aesthetic scores; set data.folder to the rendered data set"
            )
        arrays = (LATENTS, IMAGE_TOKENS, COARSE_LATENTS, COND_AUG)
        return (*arrays, DEPTH) if "depth" in self.recipe.concat else arrays

    def encoded(self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array) -> dict[str, Array]:
        """The `encoded_arrays` [b t ...] of a batch with pictures, under training's noise on the conditions."""
        parts = self._condition_parts(networks, batch, key)
        latents = batch.get(LATENTS)
        if latents is None:
            views = over_white(batch["views"])
            encode = self._by_views(lambda x: networks["vae"].encode(x).mean, len(views))
            latents = encode(views.reshape(-1, *views.shape[2:])).reshape(parts.latents.shape)
        each_view = lambda x: jnp.repeat(x[:, None], latents.shape[1], axis=1)  # noqa: E731
        made = {
            LATENTS: latents,
            IMAGE_TOKENS: each_view(parts.image_token),
            COARSE_LATENTS: parts.latents,
            COND_AUG: each_view(parts.cond_aug),
            DEPTH: parts.depth,
        }
        return {name: made[name] for name in self.encoded_arrays()}

    def _latents(self, vae: nnx.Module, batch: Mapping[str, Array], key: Array) -> Array:
        """Scaled latents of the true views, a draw from their distribution unless they are cached."""
        if LATENTS in batch:
            return batch[LATENTS].astype(jnp.float32) * vae.config.scaling_factor
        views = over_white(batch["views"])
        posterior = self._by_views(lambda x: vae.encode(x), len(views))(views.reshape(-1, *views.shape[2:]))
        latents = posterior.sample(key).reshape(*views.shape[:2], *posterior.mean.shape[1:])
        return jax.lax.stop_gradient(latents) * vae.config.scaling_factor

    def _condition_parts(
        self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array | None
    ) -> ConditionParts:
        """The conditions of a batch; with a key, under training's noise, else under the recipe's, drawn from 0."""
        if COARSE_LATENTS in batch:
            return _decoded_parts(batch)
        recipe, views = self.recipe, over_white(batch["views"])
        coarse = over_white(batch["coarse"]) if recipe.stage == 2 else None
        encoders = Encoders.of(recipe, networks)
        encoders = dataclasses.replace(
            encoders,
            latents=self._by_views(encoders.latents, len(views)),
            depth=encoders.depth and self._by_views(encoders.depth, len(views)),
        )
        if IMAGE_TOKENS in batch and self.image_encoder is None:
            tokens = batch[IMAGE_TOKENS][:, 0].astype(jnp.float32)
            encoders = dataclasses.replace(encoders, image_token=lambda images: tokens)
        strength, noise_key = None, jax.random.key(0)
        if key is not None:
            strength_key, noise_key = jax.random.split(key)
            strength = diffusion.lognormal_sigmas(strength_key, (len(views),), *recipe.log_cond_aug)
        shown = views[:, :1] if coarse is None else coarse
        return conditioning.encode(
            recipe,
            encoders,
            views[:, 0],
            batch["elevation_deg"],
            jax.random.normal(noise_key, shown.shape),
            coarse,
            strength,
            # In training the official score is that of the true back view (HI3D.md section 2).
            views[:, views.shape[1] // 2] if key is not None and recipe.name == "official" else None,
        )

    def _by_views(self, function: Callable[[Array], Any], videos: int) -> Callable[[Array], Any]:
        """`function` of pictures [b*t h w c], called with a few views of each video at a time."""

        def mapped(pictures: Array) -> Any:
            views = len(pictures) // videos
            if not 0 < self.views_at_a_time < views:
                return function(pictures)
            parts = -(-views // self.views_at_a_time)
            if views % parts:
                raise ValueError(f"task.views_at_a_time={self.views_at_a_time} does not divide {views} views")
            # Cut along the views, every part from everywhere among them: a device that has some of each video's views
            # has as many of each part, and keeps them.
            cut = jnp.moveaxis(pictures.reshape(videos, -1, parts, *pictures.shape[1:]), 2, 0)
            made = jax.lax.map(lambda x: function(x.reshape(-1, *x.shape[2:])), cut)
            return jax.tree.map(
                lambda y: jnp.moveaxis(y.reshape(parts, videos, -1, *y.shape[2:]), 0, 2).reshape(-1, *y.shape[2:]), made
            )

        return mapped

    def samples(
        self, networks: Mapping[str, nnx.Module], batch: Mapping[str, Array], key: Array
    ) -> tuple[list[Array], dict[str, Array]]:
        """Rows of pictures, and scalars: for each video the true views, the coarse ones of stage 2, those made."""
        recipe, vae = self.recipe, networks["vae"]
        views = over_white(batch["views"])
        parts = self._condition_parts(networks, batch, None)
        network = denoiser(networks["unet"], conditioning.for_guidance(recipe, parts))
        denoise = diffusion.guided(
            diffusion.precondition(network), diffusion.linear_guidance(recipe.num_views, *recipe.guidance)
        )
        sigmas = diffusion.karras_sigmas(recipe.num_steps, recipe.sigma_min, recipe.sigma_max, recipe.rho)
        side = recipe.image_size // vae.config.downsampling
        noise = jax.random.normal(key, (len(views), recipe.num_views, side, side, vae.config.latent_channels))
        noisy, before = diffusion.initial_noisy(noise, sigmas), None
        if recipe.blend_exponent is not None:
            weights = jnp.asarray(diffusion.blend_weights(recipe.num_steps, recipe.blend_exponent))
            coarse_latents = parts.latents * vae.config.scaling_factor
            before = lambda x, i: diffusion.blend(x, coarse_latents, noise, jnp.asarray(sigmas)[i], weights[i])  # noqa: E731
        latents = diffusion.euler(denoise, noisy, sigmas, before)
        made = vae.decode(latents / vae.config.scaling_factor)
        if recipe.residual is not None:
            change = jnp.clip(made, -1, 1) - jnp.clip(vae.decode(parts.latents), -1, 1)
            made = over_white(batch["coarse"]) + recipe.residual * change
        metrics = {"sample_psnr": psnr(made[:, 1:], views[:, 1:]).mean()}
        kinds = [views, made]
        if recipe.stage == 2:
            kinds.insert(1, over_white(batch["coarse"]))
            metrics["coarse_psnr"] = psnr(kinds[1][:, 1:], views[:, 1:]).mean()
        return [kind[video] for video in range(len(views)) for kind in kinds], metrics


def _decoded_parts(batch: Mapping[str, Array]) -> ConditionParts:
    """The conditions of examples that were encoded beforehand."""
    arrays = {name: batch[name].astype(jnp.float32) for name in (IMAGE_TOKENS, COARSE_LATENTS, COND_AUG)}
    return ConditionParts(
        image_token=arrays[IMAGE_TOKENS][:, 0],
        latents=arrays[COARSE_LATENTS],
        elevation_deg=batch["elevation_deg"],
        cond_aug=arrays[COND_AUG][:, 0],
        depth=batch[DEPTH].astype(jnp.float32) if DEPTH in batch else None,
    )


def denoiser(unet: UNet, conditions: Conditions) -> Callable[[Array, Array], Array]:
    """The U-Net under its conditions, as the loss and the samplers call it."""

    def network(scaled: Array, c_noise: Array) -> Array:
        inputs = jnp.concatenate([scaled, conditions.concat_latents], axis=-1)
        return unet(inputs, c_noise, conditions.vector, conditions.image_token)

    return network
