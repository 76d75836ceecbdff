"""All that conditions the two U-Nets, against the official conditioner's recorded output."""

import jax
import jax.numpy as jnp
import numpy as np
from filled import FIXTURES, nhwc
from flax import nnx
from recorded import FAST_COMPILE, recorded_autoencoder, recorded_tower, relative_error

from converters import autoencoder
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig
from hi3d_jax.stages import conditioning
from hi3d_jax.stages.conditioning import Encoders
from hi3d_jax.stages.recipe import Recipe

VAE = AutoencoderConfig(block_channels=(32, 32, 64, 64), layers_per_block=1)


def conditions_of(recipe: Recipe, stubs, *inputs) -> tuple[conditioning.Conditions, conditioning.Conditions]:
    """Without and with conditions; `stubs` are the formulas that stood in networks' places when it was recorded."""
    vae = recorded_autoencoder(Autoencoder, VAE, autoencoder.sgm_rules(VAE), seed=31)
    graphdef, params = nnx.split({"image_encoder": recorded_tower(), "vae": vae})

    def run(params, *inputs):
        networks = {**nnx.merge(graphdef, params), **stubs}
        parts = conditioning.encode(recipe, Encoders.of(recipe, networks), *inputs)
        return conditioning.for_guidance(recipe, parts)

    both = jax.jit(run, compiler_options=FAST_COMPILE)(params, *(jnp.asarray(x, jnp.float32) for x in inputs))
    return tuple(conditioning.Conditions(*(x[half : half + 1] for x in both)) for half in (0, 1))


def pixels(u8: np.ndarray) -> np.ndarray:
    return nhwc(u8).astype(np.float32) / 255 * 2 - 1


def check(got: conditioning.Conditions, stored, half: str) -> None:
    # Measured: at most 3e-6.
    assert relative_error(got.vector, stored[f"{half}_vector"]) < 1e-5
    token, expected = got.image_token, stored[f"{half}_crossattn"]
    if half == "uc":
        np.testing.assert_array_equal(token, expected)
    else:
        assert relative_error(token, expected) < 1e-5


def test_stage_1_is_told_what_the_official_one_is_told():
    stored = np.load(FIXTURES / "conditioner_stage1.npz")
    stubs = {"aesthetic_encoder": lambda images: images, "aesthetic_predictor": lambda images: jnp.full(1, 5.25)}
    noise = nhwc(stored["noise"])[:, None]
    uncond, cond = conditions_of(Recipe.official(1), stubs, pixels(stored["u8"]), [20.0], noise)
    for half, got in (("uc", uncond), ("c", cond)):
        check(got, stored, half)
        expected = np.broadcast_to(nhwc(stored[f"{half}_concat"]), (16, 8, 8, 4))
        np.testing.assert_allclose(got.concat_latents[0], expected, atol=1e-5 * np.abs(stored["c_concat"]).max())


def test_stage_2_is_told_what_the_official_one_is_told():
    """Two of the sixteen views, which are encoded independently; they were recorded with their noise in them."""
    stored = np.load(FIXTURES / "conditioner_stage2.npz")
    shown = nhwc(np.load(FIXTURES / "depth_conditioning.npz")["frames"])[None]

    def depth(images):
        red, green, blue = jnp.moveaxis(images, -1, 0)
        return jnp.maximum(1.5 + 2 * red - 0.7 * green * blue + 0.3 * blue, 0)

    recipe = Recipe.from_dict({**Recipe.official(2).to_dict(), "num_views": 2})
    inputs = pixels(stored["u8"]), [-10.0], np.zeros_like(shown), shown
    uncond, cond = conditions_of(recipe, {"depth": depth}, *inputs)
    for half, got in (("uc", uncond), ("c", cond)):
        check(got, stored, half)
    np.testing.assert_allclose(cond.concat_latents[0], nhwc(stored["c_concat"]), atol=1e-4)
    assert stored["uc_concat_absmax"] == 0
    assert not uncond.concat_latents.any()
