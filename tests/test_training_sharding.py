"""The same step on every mesh, and what is said of parameters and batches that do not divide."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from hi3d_jax.diffusion import edm_loss, lognormal_sigmas
from hi3d_jax.models.layers import Conv
from hi3d_jax.models.unet_blocks import BlockConfig, MidBlock
from hi3d_jax.training import sharding
from hi3d_jax.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.networks import NetworkSpec
from hi3d_jax.training.program import TrainProgram

# A quarter of the compile time; the kernels are the same, less optimised.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
MESHES = (MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(2, 2, 2), MeshConfig(1, 2, 2, 2))
BLOCK = BlockConfig(32, 64, 16, num_heads=2, transformer_layers=1, epsilon=1e-5, remat="none")


class Middle(nnx.Module):
    """The middle of the U-Net: every kind of its parameters, at a fifth of the compile time."""

    def __init__(self, config: BlockConfig, *, rngs, **dtypes):
        self.conv_in = Conv(4, 32, rngs=rngs, **dtypes)
        self.mid_block = MidBlock(config, rngs=rngs, **dtypes)
        self.conv_out = Conv(32, 4, rngs=rngs, **dtypes)

    def __call__(self, x, emb, context):
        return self.conv_out(self.mid_block(self.conv_in(x), emb, context, None))


@dataclasses.dataclass(frozen=True)
class MiddleTask:
    """Denoises with it."""

    def trained(self):
        return {"middle": NetworkSpec(Middle, BLOCK)}

    def frozen(self):
        return {}

    def loss(self, networks, batch, key):
        sigma_key, noise_key = jax.random.split(key)
        sigma, noise = lognormal_sigmas(sigma_key, (8,)), jax.random.normal(noise_key, batch["latents"].shape)

        def network(scaled, c_noise):
            emb = jnp.sin(c_noise[:, None, None] * jnp.arange(1.0, 65).reshape(1, 1, 64))
            return networks["middle"](scaled, emb, batch["context"])

        losses = edm_loss(network, batch["latents"], noise, sigma)
        return losses.mean(), {"largest": losses.max()}


def one_step(mesh: MeshConfig):
    """State and metrics after a step from weights none of which is zero."""
    # Adam divides by the gradient's size: with a larger epsilon, rounding in gradients of nothing stays small.
    optimizer = OptimizerConfig(learning_rate=1e-2, epsilon=1e-3, ema_decay=0.9)
    # The task's type is that of the three real ones: this one is put in past the type check.
    config = TrainConfig.__new__(TrainConfig)
    values = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    values |= {"task": MiddleTask(), "data": DataConfig(batch_size=8), "optimizer": optimizer}
    for name, value in values.items():
        object.__setattr__(config, name, value)
    program = TrainProgram(config, sharding.make_mesh(mesh))

    def made(path, spec, place):
        name = jax.tree_util.keystr(path)
        if spec.dtype != np.float32:
            return jax.device_put(jax.random.key(0) if "key" in name else np.zeros(spec.shape, spec.dtype), place)
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=spec.shape).astype(np.float32)
        start = 0 if "opt_state" in name or "guard" in name else 0.1 * noise + name.endswith("scale']")
        return jax.device_put(np.asarray(start + 0 * noise), place)

    state = jax.tree_util.tree_map_with_path(made, program.state, program.state_shardings)
    rng = np.random.default_rng(0)
    latents, context = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 2, 4, 4, 4), (8, 1, 1, 16)))
    batch = program.place_batch({"latents": latents, "context": context})
    return program.step.lower(state, {}, batch).compile(FAST_COMPILE)(state, {}, batch)


def test_a_step_is_the_same_on_every_mesh():
    (expected, metrics), *others = [one_step(mesh) for mesh in MESHES]
    for state, other in others:
        for name in ("loss", "gradient_norm", "largest"):
            np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5)
        for name in ("params", "ema"):
            compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
            jax.tree.map(compare, getattr(state, name), getattr(expected, name))
    state = others[2][0]
    split = state.params["middle"]["mid_block.resnets.0.spatial_res_block.conv1.kernel"]
    assert split.addressable_shards[0].data.shape == (3, 3, 4, 32), "inputs over fsdp, tensor and views"
    state = others[1][0]
    split = state.params["middle"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.kernel"]
    assert split.sharding.spec == P("fsdp", "tensor")
    assert split.addressable_shards[0].data.shape == (16, 16)
    large = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)) if leaf.size > 1000]
    assert len(large) > 60
    assert not any(leaf.sharding.is_fully_replicated for leaf in large), "moments and average follow their parameter"


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 2, 2)])
def test_gradients_pass_convolutions_wherever_their_kernels_live(shape):
    """XLA has got this wrong for kernels split by inputs and outputs: by more than the gradients themselves."""
    mesh = sharding.make_mesh(MeshConfig(*shape))

    def loss(x, kernels, wanted):
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(
                nnx.silu(x), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return ((x - wanted) ** 2).mean()

    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(2, 16, 4, 4, 64)).astype(np.float32)
    kernels = (rng.normal(size=(2, 3, 3, 64, 64)) / 24).astype(np.float32)
    rows = sharding.NamedSharding(mesh, P(sharding.ROWS))
    place = sharding.parameter_sharding(mesh, "resnets.0.conv1.kernel", kernels.shape[1:])
    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(rows, place))
    made = gradient(
        jax.device_put(pictures[0], rows), tuple(jax.device_put(kernel, place) for kernel in kernels), pictures[1]
    )
    expected = jax.grad(loss, (0, 1))(pictures[0], tuple(kernels), pictures[1])
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()))


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"3, mesh.fsdp=1, mesh.tensor=1, mesh.views=1 do not arrange 8 devices"):
        sharding.make_mesh(MeshConfig(3, 1, 1))
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    path = "down_blocks.0.resnets.0.spatial_res_block.conv1.kernel"
    with pytest.raises(ValueError, match=rf"{path} \(3, 3, 30, 32\): its axis 2 does not divide by mesh.fsdp=4"):
        sharding.parameter_sharding(mesh, path, (3, 3, 30, 32))
    with pytest.raises(ValueError, match=r"6 examples does not divide by mesh.data x mesh.fsdp = 4"):
        sharding.batch_shardings(mesh, {"views": np.zeros((6, 2))})
    mesh = sharding.make_mesh(MeshConfig(1, 2, 1, 4))
    with pytest.raises(ValueError, match=rf"{path} \(3, 3, 30, 32\): .* by mesh.fsdp=2 x mesh.tensor=1 x mesh.views=4"):
        sharding.parameter_sharding(mesh, path, (3, 3, 30, 32))
    with pytest.raises(ValueError, match=r"6 views do not divide by mesh.views=4"):
        sharding.batch_shardings(mesh, {"views": np.zeros((2, 6, 1))})


def test_processes_that_share_examples_read_the_same_part():
    """Rows: parts of a batch; in them the processes of the devices that work on that part."""
    apart = np.array([[0, 0], [0, 0], [1, 1], [1, 1]])
    assert [sharding.reading_part(apart, process) for process in (0, 1)] == [(0, 2), (1, 2)]
    together = np.array([[0, 1], [0, 1], [2, 3], [2, 3]])
    assert [sharding.reading_part(together, process) for process in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    scattered = np.array([[1, 1], [0, 0], [1, 1], [0, 0]])
    assert [sharding.reading_part(scattered, process) for process in (0, 1)] == [(1, 2), (0, 2)]
    with pytest.raises(ValueError, match=r"3 devices share an example, which processes of 2 devices cannot read"):
        sharding.reading_part(np.array([[0, 0, 1], [1, 2, 2]]), 0)


@pytest.mark.parametrize(
    ("path", "ndim", "expected"),
    [
        ("conv_in.kernel", 4, P(None, None, None, "fsdp")),
        ("up_blocks.1.resnets.0.temporal_res_block.conv1.kernel", 5, P(None, None, None, ("fsdp", "tensor"), None)),
        ("mid_block.attentions.0.transformer_blocks.0.ff.proj_out.kernel", 2, P("tensor", "fsdp")),
        ("layers.attention.to_q.kernel", 3, P(None, "fsdp", "tensor")),
        ("add_embedding.linear_2.bias", 1, P(None)),
    ],
)
def test_the_table_places_the_last_axes(path, ndim, expected):
    assert sharding.parameter_spec(path, ndim) == expected
