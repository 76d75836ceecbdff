"""DISTS against a transcription in torch of its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from filled import nchw
from flax import nnx

from hi3d_jax.models.dists import DISTS, DISTSConfig, hann_pool
from hi3d_jax.models.lpips import VGG
from hi3d_jax.pretrained import parameters, with_parameters

BLOCKS = ((0, 1), (2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12))


def random_network() -> DISTS:
    """Signals that neither vanish nor explode, and weights of both terms that differ."""
    generator = np.random.default_rng(0)

    def value(path, spec):
        if path.endswith("kernel"):
            return generator.normal(0, np.sqrt(2 / np.prod(spec.shape[:3])), spec.shape).astype(np.float32)
        return generator.uniform(0, 0.1, spec.shape).astype(np.float32)

    return with_parameters(nnx.eval_shape(lambda: DISTS(DISTSConfig(), rngs=nnx.Rngs(0))), value)


def torch_pool(x: torch.Tensor) -> torch.Tensor:
    window = torch.tensor([0.25, 0.5, 0.25])
    kernel = (window[:, None] * window[None, :])[None, None].repeat(x.shape[1], 1, 1, 1)
    return (F.conv2d(x**2, kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


def torch_dists(weights: dict, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    def features(x):
        maps = [(x + 1) / 2]
        x = (maps[0] - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
            3, 1, 1
        )
        for block in BLOCKS:
            x = torch_pool(x) if len(maps) > 1 else x
            for index in block:
                kernel = torch.tensor(weights[f"convs.{index}.kernel"]).permute(3, 2, 0, 1)
                x = F.relu(F.conv2d(x, kernel, torch.tensor(weights[f"convs.{index}.bias"]), padding=1))
            maps.append(x)
        return maps

    alpha, beta = (torch.tensor(weights[name]) for name in ("alpha", "beta"))
    texture, structure = [], []
    for x, y in zip(features(a), features(b), strict=True):
        mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
        var_x, var_y = x.var((2, 3), unbiased=False), y.var((2, 3), unbiased=False)
        covariance = ((x - mean_x[..., None, None]) * (y - mean_y[..., None, None])).mean((2, 3))
        texture.append((2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6))
        structure.append((2 * covariance + 1e-6) / (var_x + var_y + 1e-6))
    alike = torch.cat(texture, 1) @ alpha + torch.cat(structure, 1) @ beta
    return 1 - alike / (alpha.sum() + beta.sum())


def test_distance_agrees_with_torch():
    """Images of odd sizes: the pools reach over the border."""
    network = random_network()
    generator = np.random.default_rng(1)
    truth = generator.uniform(-1, 1, (2, 37, 45, 3)).astype(np.float32)
    images = np.clip(truth + generator.normal(0, 0.2, truth.shape), -1, 1).astype(np.float32)
    graphdef, params = nnx.split(network)
    ours = jax.jit(lambda params, a, b: nnx.merge(graphdef, params)(a, b))(params, images, truth)
    weights = {path: np.asarray(value) for path, value in parameters(network).items()}
    assert len([path for path in weights if path.endswith("kernel")]) == len(VGG)
    theirs = torch_dists(weights, *(torch.tensor(nchw(x)) for x in (images, truth)))
    assert 0.01 < float(theirs.min()) < 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_pool_agrees_with_torch_at_odd_and_even_sizes():
    for size in (6, 7):
        x = np.random.default_rng(2).normal(size=(1, size, size + 3, 4)).astype(np.float32)
        np.testing.assert_allclose(
            nchw(hann_pool(jnp.asarray(x))), torch_pool(torch.tensor(nchw(x))), rtol=1e-5, atol=1e-6
        )
