"""What the autoencoders promise besides their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig, Posterior, TemporalAutoencoder, TemporalDecoderConfig
from hi3d_jax.pretrained import abstract_network


def shape_of(network: nnx.Module, method: str, *shape: int):
    graphdef, params = nnx.split(network)
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda params, x: getattr(nnx.merge(graphdef, params), method)(x), params, spec)


def test_images_shrink_eightfold_and_come_back():
    network = abstract_network(Autoencoder, AutoencoderConfig.tiny(), dtype=jnp.bfloat16)
    posterior = shape_of(network, "encode", 2, 3, 16, 24, 3)
    assert (posterior.mean.shape, posterior.mean.dtype) == ((2, 3, 2, 3, 4), jnp.float32)
    decoded = shape_of(network, "decode", 2, 3, 2, 3, 4)
    assert (decoded.shape, decoded.dtype) == ((2, 3, 16, 24, 3), jnp.float32)


def test_the_temporal_decoder_takes_clips():
    network = abstract_network(TemporalAutoencoder, TemporalDecoderConfig.svd())
    assert network.quant_conv is None
    assert shape_of(network, "decode", 1, 14, 8, 8, 4).shape == (1, 14, 64, 64, 3)


def test_images_of_odd_sizes_are_refused():
    network = abstract_network(Autoencoder, AutoencoderConfig.tiny())
    with pytest.raises(ValueError, match="24 x 18 pixels: sides must be multiples of 8"):
        shape_of(network, "encode", 1, 18, 24, 3)


def test_a_posterior_is_sampled_around_its_mean():
    mean, std = jnp.full((64, 64, 4), 3.0), jnp.full((64, 64, 4), 0.5)
    drawn = np.asarray(Posterior(mean, std).sample(jax.random.key(0)))
    np.testing.assert_allclose((drawn.mean(), drawn.std()), (3.0, 0.5), atol=0.02)
