"""Both autoencoders against sgm's (recorded) and diffusers' (live)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from filled import FIXTURES, filled, import_or_skip, nchw, nhwc, randomised
from flax import nnx
from recorded import FAST_COMPILE, recorded_autoencoder, relative_error

from converters import autoencoder
from converters.rules import plan, plan_export
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig, TemporalAutoencoder, TemporalDecoderConfig
from hi3d_jax.pretrained import abstract_network, parameters


def run(network: nnx.Module, method: str, *inputs):
    graphdef, params = nnx.split(network)
    call = jax.jit(
        lambda params, *inputs: getattr(nnx.merge(graphdef, params), method)(*inputs), compiler_options=FAST_COMPILE
    )
    return call(params, *(jnp.asarray(x) for x in inputs))


def test_the_image_autoencoder_agrees_with_the_official_one():
    stored = np.load(FIXTURES / "vae_image.npz")
    config = AutoencoderConfig(block_channels=(32, 32, 64, 64), layers_per_block=1)
    network = recorded_autoencoder(Autoencoder, config, autoencoder.sgm_rules(config), seed=31)
    # Measured 2e-6 in all.
    posterior = run(network, "encode", nhwc(stored["x"]))
    mean, log_variance = np.split(stored["moments"], 2, axis=1)
    assert relative_error(nchw(posterior.mean), mean) < 1e-5
    assert relative_error(nchw(posterior.mean), stored["mode"]) < 1e-5
    assert relative_error(nchw(posterior.std), np.exp(log_variance / 2)) < 1e-5
    drawn = nchw(posterior.mean) + nchw(posterior.std) * stored["eps"]
    assert relative_error(drawn, stored["z_sample"]) < 1e-5
    assert relative_error(nchw(run(network, "decode", nhwc(stored["z_dec"]))), stored["dec"]) < 1e-5


@pytest.mark.parametrize("tap", ["enc_down0", "enc_mid_attn", "dec_mid_attn", "dec_up3"])
def test_blocks_of_the_image_autoencoder_agree_with_the_official_ones(tap):
    """`dec_up3` is the coarsest resolution of the decoder with its upsampler: the first that runs."""
    stored = np.load(FIXTURES / "vae_image.npz")
    config = AutoencoderConfig(block_channels=(32, 32, 64, 64), layers_per_block=1)
    network = recorded_autoencoder(Autoencoder, config, autoencoder.sgm_rules(config), seed=31)
    graphdef, params = nnx.split(network)

    def forward(params, x):
        network = nnx.merge(graphdef, params)
        encoder, decoder = network.encoder, network.decoder
        half = encoder if tap.startswith("enc") else decoder
        y = half.conv_in(x if half is encoder else network.post_quant_conv(x))
        if tap == "enc_down0":
            return encoder.down_blocks[0](y)
        if half is encoder:
            for block in encoder.down_blocks:
                y = block(y)
        if tap == "dec_up3":
            return decoder.up_blocks[0](decoder.mid_block(y))
        return half.mid_block.attentions[0](half.mid_block.resnets[0](y))

    x = nhwc(stored["x" if tap.startswith("enc") else "z_dec"])
    got = jax.jit(forward, compiler_options=FAST_COMPILE)(params, x)
    assert relative_error(nchw(got), stored[f"tap_{tap}"]) < 1e-5


def test_the_temporal_decoder_agrees_with_the_official_one():
    stored = np.load(FIXTURES / "vae_temporal.npz")
    config = TemporalDecoderConfig(block_channels=(32, 32, 32, 64), quant_conv=False)
    network = recorded_autoencoder(TemporalAutoencoder, config, autoencoder.temporal_sgm_rules(config), seed=41)
    # Measured 2e-6 in all.
    mean, log_variance = np.split(stored["moments"], 2, axis=1)
    posterior = run(network, "encode", nhwc(stored["x"]))
    assert relative_error(nchw(posterior.mean), mean) < 1e-5
    assert relative_error(nchw(posterior.std), np.exp(log_variance / 2)) < 1e-5
    graphdef, params = nnx.split(network)

    def forward(params, latents):
        decoder = nnx.merge(graphdef, params).decoder
        first = decoder.mid_block.resnets[0](decoder.conv_in(latents))
        up = decoder.up_blocks[0](decoder.mid_block(decoder.conv_in(latents)))
        return first, up, decoder(latents)

    latents = nhwc(stored["z_dec"]).reshape(2, 3, 6, 4, 4)
    got = jax.jit(forward, compiler_options=FAST_COMPILE)(params, latents)
    for views, key in zip(got, ("tap_dec_mid_block_1", "tap_dec_up3", "dec"), strict=True):
        assert relative_error(nchw(views.reshape(-1, *views.shape[2:])), stored[key]) < 1e-5


def test_every_key_of_the_published_first_stage_has_its_place():
    manifest = json.loads((FIXTURES / "network_manifest.json").read_text())["stage1"]
    prefix = "first_stage_model."
    shapes = {key.removeprefix(prefix): tuple(s) for key, s in manifest.items() if key.startswith(prefix)}
    weights = {key: jax.ShapeDtypeStruct(shape, np.dtype(np.float16)) for key, shape in shapes.items()}
    config = AutoencoderConfig.stable_diffusion()
    expected = parameters(abstract_network(Autoencoder, config))
    assert sum(int(np.prod(spec.shape)) for spec in expected.values()) == 83_653_863
    assert len(plan(weights, expected, autoencoder.sgm_rules(config)).specs) == 248
    back = plan_export(expected, autoencoder.sgm_rules(config)).specs
    assert {key: spec.shape for key, spec in back.items()} == shapes


def diffusers_config(model: torch.nn.Module) -> dict:
    return {**model.config, "_class_name": type(model).__name__}


def test_the_image_autoencoder_agrees_with_diffusers():
    diffusers = import_or_skip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    weights = randomised(model, seed=1, scale=0.03)
    config = autoencoder.config_from_diffusers(diffusers_config(model))
    assert config == AutoencoderConfig(block_channels=(32, 64), layers_per_block=1)
    network = filled(Autoencoder, config, weights, autoencoder.diffusers_rules(config))
    rng = np.random.default_rng(0)
    images, latents = (rng.normal(size=s).astype(np.float32) for s in ((2, 16, 8, 3), (2, 8, 4, 4)))
    with torch.no_grad():
        theirs = model.encode(torch.from_numpy(nchw(images))).latent_dist
        decoded = model.decode(torch.from_numpy(nchw(latents))).sample.numpy()
    ours = run(network, "encode", images)
    assert relative_error(nchw(ours.mean), theirs.mean.numpy()) < 1e-5
    assert relative_error(nchw(ours.std), theirs.std.numpy()) < 1e-5
    assert relative_error(nchw(run(network, "decode", latents)), decoded) < 1e-5


def test_the_temporal_autoencoder_agrees_with_diffusers():
    diffusers = import_or_skip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    weights = randomised(model, seed=1, scale=0.03)
    config = autoencoder.config_from_diffusers(diffusers_config(model))
    assert config == TemporalDecoderConfig(block_channels=(32, 64))
    network = filled(TemporalAutoencoder, config, weights, autoencoder.temporal_diffusers_rules(config))
    rng = np.random.default_rng(0)
    images, latents = (rng.normal(size=s).astype(np.float32) for s in ((1, 16, 8, 3), (2, 3, 8, 4, 4)))
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(nchw(images))).latent_dist.mean.numpy()
        decoded = model.decode(torch.from_numpy(nchw(latents.reshape(6, 8, 4, 4))), num_frames=3).sample.numpy()
    assert relative_error(nchw(run(network, "encode", images).mean), mean) < 1e-5
    ours = run(network, "decode", latents)
    assert relative_error(nchw(ours.reshape(-1, *ours.shape[2:])), decoded) < 1e-5


def test_diffusers_configs_of_other_autoencoders_are_refused():
    with pytest.raises(ValueError, match="'VQModel'"):
        autoencoder.config_from_diffusers({"_class_name": "VQModel"})
    with pytest.raises(ValueError, match="lacks in_channels, latent_channels"):
        autoencoder.config_from_diffusers({"_class_name": "AutoencoderKL"})
