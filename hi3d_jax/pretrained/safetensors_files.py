"""Safetensors files, read as views of the mapped file and written one tensor at a time.

Writing more than 5 GB makes numbered files and the index that Hugging Face's tools write:
model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json. Files and folders are
written aside and renamed when complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
import safetensors

from hi3d_jax.atomic import made_aside

MAX_SHARD_BYTES = 5 * 10**9

_DTYPE_NAMES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
}
_NAME_OF_DTYPE = {np.dtype(dtype): name for name, dtype in _DTYPE_NAMES.items()}


class PretrainedError(ValueError):
    """A model folder or weights file that cannot be read or written; the text names what and the remedy."""


@runtime_checkable
class Tensors(Protocol):
    """Named tensors whose shapes are known before their values, which come one at a time, in the order of `specs`."""

    specs: Mapping[str, jax.ShapeDtypeStruct]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]: ...


def open_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file as read-only views of the mapped file. Raises `PretrainedError`."""
    try:
        # The library checks the header: lengths, offsets without gaps or overlaps, and that the file is complete.
        with safetensors.safe_open(path, "np"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise PretrainedError(f"{path} cannot be read ({error}); download or write it again") from error
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    if strange := sorted({entry["dtype"] for entry in header.values()} - set(_DTYPE_NAMES)):
        raise PretrainedError(f"{path} has tensors of dtype {', '.join(strange)}; known are {', '.join(_DTYPE_NAMES)}")
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view(_DTYPE_NAMES[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
    }


def write_safetensors(path: str | Path, tensors: Tensors) -> None:
    """Writes one .safetensors file in PyTorch's layouts, tensor by tensor. Raises `FileExistsError`."""
    with made_aside(path) as aside:
        arrays = tensors.arrays()
        _write_shard(aside, tensors.specs, arrays, "pt")
        _finish(arrays)


def _write_shard(
    path: Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    arrays: Iterator[tuple[str, np.ndarray]],
    framework: Literal["pt", "flax"],
) -> None:
    header, end = {"__metadata__": {"format": framework}}, 0
    for name, spec in specs.items():
        start, end = end, end + _nbytes(spec)
        dtype = _NAME_OF_DTYPE[np.dtype(spec.dtype)]
        header[name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            given, array = next(arrays, (None, np.empty(0)))
            if (given, array.shape, array.dtype) != (name, spec.shape, np.dtype(spec.dtype)):
                raise PretrainedError(f"{given} {array.shape} {array.dtype} came where {name} {spec} was announced")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _finish(arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    """Lets the iterator have the last word, which may be that some values were not finite."""
    for name, _ in arrays:
        raise PretrainedError(f"{name} came after the last tensor that was announced")


def _nbytes(spec: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def write_shards(folder: Path, tensors: Tensors) -> None:
    """model.safetensors, or numbered files of at most `MAX_SHARD_BYTES` (one tensor at least) with their index."""
    shards: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    size = 0
    for name, spec in tensors.specs.items():
        size += _nbytes(spec)
        if size > MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            size = _nbytes(spec)
        shards[-1][name] = spec
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    arrays = tensors.arrays()
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, arrays, "flax")
    _finish(arrays)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(map(_nbytes, tensors.specs.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def open_shards(folder: Path, stem: str = "model") -> dict[str, np.ndarray]:
    """The tensors that `write_shards` wrote, as views of the mapped files. Raises `PretrainedError`."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return open_safetensors(folder / f"{stem}.safetensors")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        if not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise ValueError(f"strange file names {names}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(f"{index} cannot be read ({type(error).__name__}: {error}); download it again") from error
    shards = {name: open_safetensors(folder / name) for name in names}
    if lost := sorted(tensor for tensor, name in weight_map.items() if tensor not in shards[name]):
        raise PretrainedError(f"{index} promises {', '.join(lost)}, which its files do not have")
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}
