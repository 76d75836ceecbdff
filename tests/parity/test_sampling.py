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


@pytest.mark.parametrize(("stage", "split_guidance"), [(1, False), (2, True)])
def test_every_step_of_the_official_loops_is_met(stage, split_guidance):
    stored = np.load(FIXTURES / f"loop_stage{stage}.npz")
    graphdef, params = nnx.split(recorded_unet(f"unet_stage{stage}"))
    recipe = Recipe.official(stage)
    noise = jnp.asarray(nhwc(stored["noise"]))[None]
    levels = noise_levels(recipe, num_steps=5)
    np.testing.assert_allclose([level.sigma for level in levels], stored["sigmas"][:-1], rtol=1e-5)
    blending = Blending(jnp.asarray(nhwc(stored["z"]))[None], noise) if stage == 2 else None
    scale = jnp.asarray(diffusion.linear_guidance(noise.shape[1], *recipe.guidance))
    noisy, after = diffusion.initial_noisy(noise, stored["sigmas"]), []
    inputs = scale, recorded_conditions(stored), blending
    lowered = denoise_step.lower(graphdef, params, noisy, levels[0], *inputs, split_guidance=split_guidance)
    step = lowered.compile(FAST_COMPILE)
    for level in levels:
        noisy, _, finite = step(params, noisy, level, *inputs)
        assert finite
        after.append(np.asarray(noisy)[0])
    expected = stored["x_after"] if stage == 2 else [*stored["x_before_step"][1:], stored["result"]]
    # Measured: at most 3e-6 of the scale.
    errors = [relative_error(ours, nhwc(theirs)) for ours, theirs in zip(after, expected, strict=True)]
    assert max(errors) < 1e-4, errors


def test_the_training_loss_is_the_official_one():
    stored = np.load(FIXTURES / "loss_stage1.npz")
    graphdef, params = nnx.split(recorded_unet("unet_stage1"))
    latents, noise, concat = (
        jnp.asarray(nhwc(stored[key])).reshape(2, 4, 16, 8, -1) for key in ("z", "noise", "concat")
    )

    token, vector = jnp.asarray(stored["crossattn"]), jnp.asarray(stored["vector"])

    def loss(params, sigma):
        def network(scaled, c_noise):
            inputs = jnp.concatenate([scaled, concat], axis=-1)
            return nnx.merge(graphdef, params)(inputs, c_noise, vector, token)

        return diffusion.edm_loss(network, latents, noise, sigma)

    got = jax.jit(loss, compiler_options=FAST_COMPILE)(params, jnp.asarray(stored["sigma"]))
    # The official loss is one number per view. Measured 2e-6.
    np.testing.assert_allclose(got, stored["loss"].reshape(2, 4).mean(1), rtol=1e-5)
