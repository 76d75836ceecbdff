"""Networks filled through the converters' tables, as the parity tests run them."""

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from converters.rules import convert, export
from hi3d_jax.pretrained import abstract_network, parameters, with_parameters

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def manifest(prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the released checkpoints' tensors under `prefix`, by what follows it."""
    shapes = json.loads((FIXTURES / "conditioner_manifest.json").read_text())
    return {key.removeprefix(prefix): tuple(shape) for key, shape in shapes.items() if key.startswith(prefix)}


def filled(
    network: type[nnx.Module], config, weights: Mapping[str, np.ndarray], rules, ignore=(), **dtypes
) -> nnx.Module:
    """The network with `weights` converted; on the way, the export must give back every tensor that was used."""
    abstract = abstract_network(network, config, **dtypes)
    values = convert(weights, parameters(abstract), rules, ignore)
    for key, array in export(values, rules).items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key)
    return with_parameters(abstract, lambda path, spec: jnp.asarray(values[path].astype(spec.dtype, copy=False)))


def jitted(network: nnx.Module) -> Callable[..., jax.Array]:
    """The network's forward pass, compiled as a function of its parameters."""
    graphdef, params = nnx.split(network)
    forward = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    return lambda *inputs: forward(params, *(jnp.asarray(x) for x in inputs))


def random_network(network: type[nnx.Module], config, seed: int, **dtypes) -> nnx.Module:
    """The network with normal numbers of a tenth everywhere, ones added to the scales of norms."""
    generator = np.random.default_rng(seed)

    def values(path: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        random = 0.1 * generator.normal(size=spec.shape) + path.endswith("scale")
        return jnp.asarray(random.astype(spec.dtype))

    return with_parameters(abstract_network(network, config, **dtypes), values)


def randomised(module: torch.nn.Module, seed: int, scale: float = 0.1) -> dict[str, np.ndarray]:
    """A torch module's state, every parameter first moved at random: ones and zeros could hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return {key: value.detach().numpy() for key, value in module.eval().state_dict().items()}


_OPERATORS: list[torch.library.Library] = []


def import_or_skip(name: str) -> ModuleType:
    """A module that may need torchvision, whose CUDA wheel cannot load its operators beside a torch without CUDA.

    Then even its import fails, on the declarations of two operators: we make these; nobody calls the operators.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        _OPERATORS.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _OPERATORS[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name, reason="needs the extra parity")


def nchw(images) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, 1))


def nhwc(images) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.asarray(images), 1, -1))
