"""Whole sampling runs and the training loss of the official code, with the recorded U-Nets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import FIXTURES, nhwc
from flax import nnx
from recorded import FAST_COMPILE, recorded_unet, relative_error

from hi3d_jax import diffusion
from hi3d_jax.stages.conditioning import Conditions
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.stages.sampling import Blending, denoise_step, noise_levels


def recorded_conditions(stored) -> Conditions:
    """With the guidance's other half, in which the image token and the latents are zero."""
    token, vector, concat = (jnp.asarray(stored[key]) for key in ("crossattn", "vector", "concat"))
    cond = Conditions(token, jnp.asarray(nhwc(concat))[None], vector)
    uncond = cond._replace(
        image_token=jnp.zeros_like(cond.image_token), concat_latents=jnp.zeros_like(cond.concat_latents)
    )
    return jax.tree.map(lambda *halves: jnp.concatenate(halves), uncond, cond)


@pytest.fixture(scope="module")
def stage1_network():
    """F of stage 1 for two videos of four views, compiled once: guidance needs two, and so does the loss."""
    graphdef, params = nnx.split(recorded_unet("unet_stage1"))
    forward = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs), compiler_options=FAST_COMPILE)

    def with_conditions(conditions: Conditions):
        def network(scaled, c_noise):
            inputs = jnp.concatenate([scaled, conditions.concat_latents], axis=-1)
            return forward(params, inputs, c_noise, conditions.vector, conditions.image_token)

        return network

    return with_conditions


def test_every_step_of_the_official_stage_1_is_met(stage1_network):
    stored, recipe = np.load(FIXTURES / "loop_stage1.npz"), Recipe.official(1)
    levels = noise_levels(recipe, num_steps=5)
    np.testing.assert_allclose([level.sigma for level in levels], stored["sigmas"][:-1], rtol=1e-5)
    noise = jnp.asarray(nhwc(stored["noise"]))[None]
    scale = diffusion.linear_guidance(noise.shape[1], *recipe.guidance)
    denoise = diffusion.guided(diffusion.precondition(stage1_network(recorded_conditions(stored))), scale)
    noisy, errors = diffusion.initial_noisy(noise, stored["sigmas"]), []
    for level, expected in zip(levels, [*stored["x_before_step"][1:], stored["result"]], strict=True):
        noisy = diffusion.euler_step(denoise, noisy, level.sigma, level.sigma_next).noisy
        errors.append(relative_error(noisy[0], nhwc(expected)))
    # Measured: at most 3e-6 of the scale.
    assert max(errors) < 1e-4, errors


@pytest.mark.parametrize("split_guidance", [False, True])
def test_every_step_of_the_official_stage_2_is_met(split_guidance):
    stored, recipe = np.load(FIXTURES / "loop_stage2.npz"), Recipe.official(2)
    graphdef, params = nnx.split(recorded_unet("unet_stage2"))
    levels = noise_levels(recipe, num_steps=5)
    noise, latents = (jnp.asarray(nhwc(stored[key]))[None] for key in ("noise", "z"))
    scale = jnp.asarray(diffusion.linear_guidance(noise.shape[1], *recipe.guidance))
    inputs = scale, recorded_conditions(stored), Blending(latents, noise)
    noisy, errors = diffusion.initial_noisy(noise, stored["sigmas"]), []
    lowered = denoise_step.lower(graphdef, params, noisy, levels[0], *inputs, split_guidance=split_guidance)
    step = lowered.compile(FAST_COMPILE)
    for level, expected in zip(levels, stored["x_after"], strict=True):
        noisy, _, finite = step(params, noisy, level, *inputs)
        assert finite
        errors.append(relative_error(noisy[0], nhwc(expected)))
    # Measured: at most 3e-6 of the scale, guidance split or not.
    assert max(errors) < 1e-4, errors


def test_the_training_loss_is_the_official_one(stage1_network):
    stored = np.load(FIXTURES / "loss_stage1.npz")
    latents, noise, concat = (
        jnp.asarray(nhwc(stored[key])).reshape(2, 4, 16, 8, -1) for key in ("z", "noise", "concat")
    )
    token, vector, sigma = (jnp.asarray(stored[key]) for key in ("crossattn", "vector", "sigma"))
    got = diffusion.edm_loss(stage1_network(Conditions(token, concat, vector)), latents, noise, sigma)
    # The official loss is one number per view.
    np.testing.assert_allclose(got, stored["loss"].reshape(2, 4).mean(1), rtol=1e-5)
