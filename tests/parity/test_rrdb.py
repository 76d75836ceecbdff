"""RRDBNet against a transcription in torch of ESRGAN's network."""

import jax
import numpy as np
import torch
import torch.nn.functional as F
from filled import nchw
from flax import nnx

from hi3d_jax.models.rrdb import RRDBConfig, RRDBNet
from hi3d_jax.pretrained import parameters, with_parameters


def torch_rrdb(weights: dict, x: torch.Tensor, num_groups: int) -> torch.Tensor:
    def conv(x, kernel, bias):
        return F.conv2d(x, torch.tensor(kernel).permute(3, 2, 0, 1), torch.tensor(bias), padding=1)

    def named(x, name):
        return conv(x, weights[f"{name}.kernel"], weights[f"{name}.bias"])

    def dense(x, block):
        found = [x]
        for j in range(5):
            y = conv(torch.cat(found, 1), weights[f"body.kernels.{j}"][block], weights[f"body.biases.{j}"][block])
            found.append(F.leaky_relu(y, 0.2))
        return x + 0.2 * y

    first = named(x, "conv_first")
    x = first
    for group in range(num_groups):
        start = x
        for block in range(3 * group, 3 * group + 3):
            x = dense(x, block)
        x = start + 0.2 * x
    x = first + named(x, "conv_body")
    for name in ("conv_up1", "conv_up2"):
        x = F.leaky_relu(named(F.interpolate(x, scale_factor=2, mode="nearest"), name), 0.2)
    return named(F.leaky_relu(named(x, "conv_hr"), 0.2), "conv_last")


def test_enlarged_pictures_agree_with_torch():
    config = RRDBConfig(width=8, growth=4, num_groups=2)
    generator = np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: RRDBNet(config, rngs=nnx.Rngs(0)))
    network = with_parameters(abstract, lambda path, spec: generator.normal(0, 0.2, spec.shape).astype(np.float32))
    weights = {path: np.asarray(value) for path, value in parameters(network).items()}
    pictures = generator.uniform(size=(2, 6, 5, 3)).astype(np.float32)
    graphdef, params = nnx.split(network)
    ours = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, pictures)
    theirs = torch_rrdb(weights, torch.tensor(nchw(pictures)), config.num_groups).numpy()
    assert ours.shape == (2, 24, 20, 3)
    np.testing.assert_allclose(nchw(ours), theirs, atol=1e-5 * np.abs(theirs).max())
