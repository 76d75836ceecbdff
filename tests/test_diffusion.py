"""Diffusion's formulas against recorded numbers of the official code, closed forms and each other."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hi3d_jax import diffusion

STORED = np.load(Path(__file__).parent / "fixtures" / "diffusion_math.npz")


def test_scalings_agree_with_the_official_ones():
    got = diffusion.scalings(jnp.asarray(STORED["sigma"]))
    for name, value in got._asdict().items():
        np.testing.assert_allclose(value, STORED[f"vedm_{name}"], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("num_steps", "sigma_max"), [(5, 700), (25, 700), (50, 700), (25, 80)])
def test_noise_levels_agree_with_the_official_ones(num_steps, sigma_max):
    sigmas = diffusion.karras_sigmas(num_steps, sigma_max=float(sigma_max))
    # Measured 4e-6: the official table is computed in float32, ours in float64.
    np.testing.assert_allclose(sigmas, STORED[f"sigmas_{sigma_max}_{num_steps}"], rtol=1e-5)
    assert sigmas.dtype == np.float32


def test_noise_levels_that_do_not_descend_are_refused():
    with pytest.raises(ValueError, match="0 sampling steps"):
        diffusion.karras_sigmas(0)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        diffusion.karras_sigmas(5, sigma_min=2.0, sigma_max=1.0)


@pytest.mark.parametrize("maximum", [2.5, 2.0])
def test_guidance_per_view_agrees_with_the_official_one(maximum):
    uncond, cond = np.split(np.moveaxis(STORED["guider_x"], 1, -1)[None], 2, axis=1)
    scale = diffusion.linear_guidance(16, 1.0, maximum)
    if maximum == 2.5:
        np.testing.assert_allclose(scale, STORED["linear_scale_2.5"][0], rtol=1e-6)
    expected = np.moveaxis(STORED[f"linear_out_{maximum}"], 1, -1)[None]
    np.testing.assert_allclose(diffusion.guide(jnp.asarray(cond), jnp.asarray(uncond), scale), expected, atol=1e-6)
    # The same through a denoise function that takes both halves: here it gives back what it was given, twice.
    both = diffusion.guided(lambda noisy, sigma: jnp.concatenate([uncond, cond]), scale)
    np.testing.assert_allclose(both(jnp.asarray(cond), jnp.ones(1)), expected, atol=1e-6)


def test_stage_2_weights_agree_with_the_official_ones():
    for num_steps in (5, 25):
        weights = diffusion.blend_weights(num_steps)
        np.testing.assert_allclose(weights, STORED[f"stage2_blend_alpha_{num_steps}"], rtol=1e-5)


def test_the_first_blended_latents_are_the_coarse_ones_under_noise():
    rng = np.random.default_rng(0)
    noisy, latents, noise = (jnp.asarray(rng.normal(size=(1, 2, 2, 2, 4)), jnp.float32) for _ in range(3))
    first = diffusion.blend(noisy, latents, noise, 700.0, float(diffusion.blend_weights(25)[0]))
    np.testing.assert_array_equal(first, latents + 700 * noise)
    np.testing.assert_array_equal(diffusion.blend(noisy, latents, noise, 700.0, 0.0), noisy)


def test_training_noise_levels_are_the_official_ones():
    np.testing.assert_allclose(np.exp(1.0 + 1.6 * STORED["p_rand"]), STORED["p_sigma"], rtol=1e-6)
    drawn = np.log(diffusion.lognormal_sigmas(jax.random.key(0), (20_000,), mean=-1.0, std=0.5))
    # Five standard errors.
    assert abs(drawn.mean() + 1.0) < 5 * 0.5 / 20_000**0.5
    assert abs(drawn.std() - 0.5) < 5 * 0.5 / 40_000**0.5


@pytest.mark.parametrize("sigma", [0.002, 1.0, 700.0])
def test_a_network_that_predicts_v_denoises_exactly_and_has_no_loss(sigma):
    rng = np.random.default_rng(1)
    latents, noise = (rng.normal(size=(2, 3, 4, 4, 4)) for _ in range(2))
    v = jnp.asarray((noise - sigma * latents) / np.sqrt(sigma**2 + 1), jnp.float32)
    noisy = jnp.asarray(latents + sigma * noise, jnp.float32)
    sigmas = jnp.full(2, sigma)
    denoised = diffusion.precondition(lambda scaled, c_noise: v)(noisy, sigmas)
    np.testing.assert_allclose(denoised, latents, atol=1e-6 * max(1.0, sigma**0.5))
    latents, noise = jnp.asarray(latents, jnp.float32), jnp.asarray(noise, jnp.float32)
    assert diffusion.edm_loss(lambda scaled, c_noise: v, latents, noise, sigmas).max() < 1e-12


def test_the_loss_is_the_weighted_error_of_the_denoised():
    rng = np.random.default_rng(2)
    latents, noise, mistake = (rng.normal(size=(3, 2, 2, 2, 4)) for _ in range(3))
    sigma = np.array([0.3, 2.0, 40.0])
    network = lambda scaled, c_noise: jnp.asarray(mistake, jnp.float32) * scaled  # noqa: E731
    s = sigma.reshape(3, 1, 1, 1, 1)
    noisy = latents + s * noise
    denoised = noisy / (s**2 + 1) - s / np.sqrt(s**2 + 1) * mistake * noisy / np.sqrt(s**2 + 1)
    expected = ((s**2 + 1) / s**2 * (denoised - latents) ** 2).mean((1, 2, 3, 4))
    arguments = [jnp.asarray(x, jnp.float32) for x in (latents, noise, sigma)]
    np.testing.assert_allclose(diffusion.edm_loss(network, *arguments), expected, rtol=1e-5)
    np.testing.assert_allclose(diffusion.edm_loss_and_denoised(network, *arguments)[1], denoised, rtol=1e-4, atol=1e-5)
    weights = 1 / np.asarray(diffusion.scalings(jnp.asarray(STORED["sigma"])).c_out) ** 2
    np.testing.assert_allclose(weights, STORED["w_v"], rtol=1e-5)


def gaussian_error(sampler, num_steps: int) -> float:
    """How far the sampler lands from the flow's exact end where data are normal with deviation 0.5."""
    sigmas = diffusion.karras_sigmas(num_steps, sigma_max=80.0)

    def denoise(noisy, sigma):
        return noisy * (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1, 1)

    noisy = diffusion.initial_noisy(jnp.ones((1, 1, 1, 1, 1)), sigmas)
    exact = float(noisy.max()) * 0.5 / np.sqrt(0.25 + sigmas[0] ** 2)
    return abs(float(sampler(denoise, noisy, sigmas).max()) / exact - 1)


@pytest.mark.parametrize(("sampler", "order"), [(diffusion.euler, 1), (diffusion.heun, 2)])
def test_samplers_converge_to_the_closed_form_with_their_order(sampler, order):
    coarse, fine = gaussian_error(sampler, 40), gaussian_error(sampler, 80)
    assert fine < 0.05**order
    assert 1.8**order < coarse / fine < 2.3**order


def test_a_loop_of_steps_is_the_scanned_sampler():
    sigmas = diffusion.karras_sigmas(4)
    rng = np.random.default_rng(3)
    noise = jnp.asarray(rng.normal(size=(2, 3, 2, 2, 4)), jnp.float32)

    def denoise(noisy, sigma):
        return jnp.tanh(noisy) / (1 + sigma.reshape(-1, 1, 1, 1, 1))

    def before_step(noisy, index):
        return diffusion.blend(noisy, noise, noise, jnp.asarray(sigmas)[index], jnp.asarray(weights)[index])

    weights = diffusion.blend_weights(4)
    scanned = diffusion.euler(denoise, diffusion.initial_noisy(noise, sigmas), sigmas, before_step)
    noisy = diffusion.initial_noisy(noise, sigmas)
    for sigma, sigma_next, weight in zip(sigmas, sigmas[1:], weights, strict=False):
        noisy = diffusion.blend(noisy, noise, noise, float(sigma), float(weight))
        stepped = diffusion.euler_step(denoise, noisy, float(sigma), float(sigma_next))
        noisy = stepped.noisy
    np.testing.assert_allclose(noisy, scanned, rtol=1e-5)
    # The last step ends at noise level 0, on the denoised latents themselves.
    np.testing.assert_allclose(noisy, stepped.denoised, atol=1e-6)
