"""What the U-Net promises besides its numbers: independence of views and videos, recomputation, clear refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hi3d_jax.models.layers import ResBlock
from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.models.unet_blocks import REMAT_POLICIES, apply
from hi3d_jax.pretrained import abstract_network, parameters, with_parameters

ONE_LEVEL = UNetConfig(
    vector_dim=8, context_dim=6, block_channels=(32,), num_heads=(2,), attention=(True,), layers_per_block=1
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def forward():
    """A small network with random weights, compiled for two videos of three views with conditions per view."""

    def values(path, spec):
        return jnp.asarray(0.1 * normal(*spec.shape, seed=len(path)) + path.endswith("scale"))

    graphdef, params = nnx.split(with_parameters(abstract_network(UNet, ONE_LEVEL), values))
    fast = {"xla_backend_optimization_level": 0}
    run = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs), compiler_options=fast)
    return lambda *inputs: np.asarray(run(params, *(jnp.asarray(x) for x in inputs)))


@pytest.fixture
def inputs() -> list[np.ndarray]:
    """x, c_noise, vector, image_token, image_only."""
    conditions = [normal(2, 1, 8, seed=2), normal(2, 1, 1, 6, seed=3)]
    per_view = [np.repeat(c, 3, axis=1) for c in conditions]
    return [normal(2, 3, 4, 4, 8), np.repeat(normal(2, 1, seed=1), 3, axis=1), *per_view, np.zeros((2, 3), np.float32)]


def test_conditions_of_a_video_are_conditions_of_all_its_views(forward, inputs):
    x, c_noise, vector, token, _ = inputs
    per_video = forward(x, c_noise[:, 0], vector[:, 0], token[:, 0])
    assert np.abs(per_video).max() > 0.1
    np.testing.assert_allclose(per_video, forward(*inputs), atol=1e-5)


def test_videos_do_not_see_each_other_but_views_do(forward, inputs):
    before = forward(*inputs)
    inputs[0][1, 1] += 1
    change = np.abs(forward(*inputs) - before).max(axis=(2, 3, 4))
    assert change[0].max() < 1e-6
    assert change[1].min() > 1e-4


def test_views_marked_as_images_do_not_see_each_other(forward, inputs):
    inputs[4][:] = 1
    before = forward(*inputs)
    inputs[0][1, 1] += 1
    change = np.abs(forward(*inputs) - before).max(axis=(2, 3, 4))
    assert change[1, 1] > 1e-3
    assert np.delete(change.ravel(), 4).max() < 1e-6


def test_a_new_network_starts_silent_and_all_its_state_is_parameters():
    unet = UNet(ONE_LEVEL, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.split(unet, nnx.Param, ...)[2])
    silent = [path for path, value in parameters(unet).items() if path.endswith("kernel") and not np.any(value)]
    last = ("res_block.conv2.kernel", "proj_out.kernel", "conv_out.kernel")
    expected = [path for path in parameters(unet) if path.endswith(last) and ".ff" not in path]
    assert sorted(silent) == sorted(expected)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_recomputing_changes_no_gradient(remat):
    block = ResBlock(32, 32, 16, epsilon=1e-5, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(block)
    x, emb = jnp.asarray(normal(1, 2, 4, 4, 32)), jnp.asarray(normal(1, 2, 16))

    def loss(params, remat):
        return (apply(nnx.merge(graphdef, params), remat, x, emb) ** 2).sum()

    gradient = jax.grad(loss)(params, remat)
    for ours, plain in zip(jax.tree.leaves(gradient), jax.tree.leaves(jax.grad(loss)(params, "none")), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4 * np.abs(plain).max() + 1e-5)
    recomputes = "remat" in str(jax.make_jaxpr(loss, static_argnums=1)(params, remat))
    assert recomputes == (remat != "none")


def test_recomputing_keeps_less_for_the_backward_pass():
    """Counted before XLA sees the program: its CPU backend undoes recomputation, those of accelerators do not."""

    def kept(remat: str) -> int:
        graphdef, params = nnx.split(abstract_network(UNet, dataclasses.replace(ONE_LEVEL, remat=remat)))
        spec = jax.ShapeDtypeStruct
        inputs = [spec(s, jnp.float32) for s in ((1, 4, 16, 16, 8), (1,), (1, 8), (1, 1, 6))]

        def backward(params, *inputs):
            return jax.vjp(lambda params: nnx.merge(graphdef, params)(*inputs), params)[1]

        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(backward, params, *inputs)))

    everything, products, inputs_only = (kept(remat) for remat in ("none", "products", "block"))
    assert inputs_only < 0.5 * products < 0.5 * everything


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat": "all"}, "remat='all' is unknown: choose one of none"),
        ({"num_heads": (1, 2)}, "one entry per resolution"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ONE_LEVEL, **changes)


def test_inputs_that_do_not_fit_are_refused():
    graphdef, params = nnx.split(abstract_network(UNet, UNetConfig.tiny()))

    def shape(height: int, channels: int):
        inputs = (1, 2, height, 8, channels), (1,), (1, 768), (1, 1, 1024)
        specs = (jax.ShapeDtypeStruct(s, jnp.float32) for s in inputs)
        return jax.eval_shape(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs), params, *specs)

    assert shape(8, 8).shape == (1, 2, 8, 8, 4)
    with pytest.raises(ValueError, match=r"latents are 7 x 8 cells.* multiples of 16 pixels"):
        shape(7, 8)
    with pytest.raises(ValueError, match="17 channels, but this network takes 8"):
        shape(8, 17)
