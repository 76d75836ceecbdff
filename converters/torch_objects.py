"""What a checkpoint's pickle may build: tensors as views of storages, numpy arrays, and a few harmless values.

Each function here stands for a global that torch or numpy writes into pickles, takes its arguments from an untrusted
file and checks all of them; `CONSTRUCTORS` is the whole list. A view may not leave its storage, nor be larger than it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from converters.pickle_reader import Inert, RefusedPickle

_MAX_AXES = 16
_MAX_COUNT = 2**48

_STORAGE_DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

_NUMPY_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


@dataclasses.dataclass(frozen=True)
class StorageType:
    """A typed storage's class, as the pickle names it."""

    dtype: np.dtype

    def __call__(self, *_):
        raise RefusedPickle("it calls a storage type, which is only allowed as a value")


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage that the pickle refers to: the key under which its bytes are filed, and what they should be."""

    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as a strided view of a storage whose bytes are not known yet; counts are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, data: np.ndarray) -> np.ndarray:
        """The tensor over its storage's bytes (numpy checks once more that the view stays inside them)."""
        size = self.storage.dtype.itemsize
        strides = tuple(stride * size for stride in self.strides)
        return np.ndarray(self.shape, self.storage.dtype, data, self.offset * size, strides)


def storage_of(persistent_id: Any) -> Storage:
    """A persistent id is ("storage", type, key, device, number of elements), in old files followed by None."""
    match persistent_id:
        case ("storage", kind, str(key), str(), int(numel), *rest):
            dtype = getattr(kind, "function", None)
            if isinstance(dtype, StorageType) and numel >= 0 and rest in ([], [None]):
                return Storage(key, dtype.dtype, numel)
    raise RefusedPickle("it refers to something outside itself that is no tensor storage")


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> Tensor:
    if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise RefusedPickle("it makes a tensor of something that is no storage, shape and strides")
    if len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise RefusedPickle(f"a tensor of storage {storage.key!r} has {len(shape)} axes and {len(strides)} strides")
    # Types first: the text of an object from the file may be as long as its memo can make it.
    if not all(type(count) is int and 0 <= count <= _MAX_COUNT for count in (offset, *shape, *strides)):
        raise RefusedPickle(f"a tensor of storage {storage.key!r} has an absurd shape, stride or offset")
    numel = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if numel else 0
    # A stride of zero could make a tensor of any size out of one element.
    if numel > storage.numel or (numel and last >= storage.numel):
        raise RefusedPickle(
            f"a tensor of shape {shape}, strides {strides}, offset {offset} does not fit in its storage "
            f"{storage.key!r} of {storage.numel} elements"
        )
    return Tensor(storage, offset if numel else 0, shape, strides)


def _rebuild_parameter(tensor, requires_grad=False, hooks=None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise RefusedPickle("it makes a parameter of something that is no tensor")
    return tensor


def _ordered_dict(pairs=()) -> dict:
    result = {}
    for pair in pairs:
        match pair:
            case (str(key), value) | [str(key), value]:
                result[key] = value
            case _:
                raise RefusedPickle("it makes an OrderedDict of something that is no pairs of text and value")
    return result


def _size(shape=()) -> tuple:
    return tuple(shape)


def _device(*_) -> Inert:
    return Inert("torch.device")


class _NumpyDtype:
    """A numpy dtype in the making; only numbers of a known width."""

    def __init__(self, code, align=False, copy=True):
        if not (isinstance(code, str) and code in _NUMPY_CODES):
            name = code[:20] if isinstance(code, str) else type(code).__name__
            raise RefusedPickle(f"it holds a numpy array of dtype {name!r}; numbers are read")
        self.dtype = np.dtype(code)

    def set_state(self, state) -> None:
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|", "=")):
            raise RefusedPickle("it holds a numpy array that is not little-endian")


class NumpyArray:
    """A numpy array in the making: `set_state` gives it its bytes."""

    def __init__(self, kind, shape, code):
        self.array: np.ndarray | None = None

    def set_state(self, state) -> None:
        match state:
            case (int(), tuple(shape), _NumpyDtype() as dtype, bool(fortran), bytes(data)):
                self.array = _numpy_array(data, dtype, shape, "F" if fortran else "C")
            case _:
                raise RefusedPickle("it holds a numpy array whose state is not shape, dtype, order and bytes")


def _numpy_array(data, dtype, shape, order) -> np.ndarray:
    if not (isinstance(data, bytes | bytearray) and isinstance(dtype, _NumpyDtype) and isinstance(shape, tuple)):
        raise RefusedPickle("it holds a numpy array that is not bytes, dtype and shape")
    if len(shape) > _MAX_AXES or not all(type(size) is int and 0 <= size <= _MAX_COUNT for size in shape):
        raise RefusedPickle("it holds a numpy array of an absurd shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(data) or order not in ("C", "F"):
        raise RefusedPickle(f"a numpy array of shape {shape}, {dtype.dtype} comes with {len(data)} bytes")
    return np.ndarray(shape, dtype.dtype, memoryview(data).toreadonly(), order=order)


def _from_buffer(data, dtype, shape, order) -> NumpyArray:
    result = NumpyArray(None, None, None)
    result.array = _numpy_array(data, dtype, shape, order)
    return result


def _numpy_scalar(dtype, data) -> Any:
    if not (isinstance(dtype, _NumpyDtype) and isinstance(data, bytes) and len(data) == dtype.dtype.itemsize):
        raise RefusedPickle("it holds a numpy scalar that is not a dtype and its bytes")
    return np.frombuffer(data, dtype.dtype)[0].item()


def _encode(text, encoding) -> bytes:
    # Pickles of protocol 2 write bytes as text that is encoded back.
    if not (isinstance(text, str) and encoding == "latin1"):
        raise RefusedPickle("it encodes something other than bytes written as text")
    return text.encode("latin1")


def _not_a_function(*_):
    raise RefusedPickle("it calls a name that is only allowed as a value")


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _encode,
    "numpy.dtype": _NumpyDtype,
    "numpy.ndarray": _not_a_function,
    **{f"torch.{name}": _not_a_function for name in ("float16", "float32", "float64", "bfloat16", "int64", "int32")},
    **{f"torch.{name}": StorageType(np.dtype(dtype)) for name, dtype in _STORAGE_DTYPES.items()},
    **{f"numpy.{core}.multiarray._reconstruct": NumpyArray for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
}
