"""Opens checkpoint files as memory-mapped arrays: .safetensors, and torch's .pt .pth .bin .ckpt without torch.

Nothing in a file is executed: its pickle is read by pickle_reader.py, which builds containers and tensors only. Four
layouts are understood, told apart by their first bytes: safetensors; torch's zip archive (data.pkl beside one member
per storage, stored uncompressed), that of TorchScript programs (OpenAI's CLIP) included; torch's older layout (four
pickles, then the storages); and a plain pickle of nested dictionaries of numpy arrays (Flax's old habit). Tensors are
views into the mapped file wherever the layout allows.

Convention: `open_checkpoint` flattens nested dictionaries to dotted keys, takes what lies under "state_dict" or
"module" where there is such an entry, and strips the "module." with which DeepSpeed prefixes every key; `notes` says
what it did.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from converters.pickle_reader import MAX_BYTES, RefusedPickle, read_pickle
from converters.torch_objects import CONSTRUCTORS, NumpyArray, Storage, Tensor, storage_of
from hi3d_jax.pretrained import PretrainedError, open_safetensors

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_NESTING = 32
_MAX_ENTRIES = 300_000
_MAX_KEY_LENGTH = 1000
_WRAPPERS = ("state_dict", "module")
# How TorchScript names the classes of a program's modules.
_SCRIPT_CLASSES = "__torch__."
_SCRIPT_NOTE = "took the tensors of a TorchScript program and left its code alone"


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read or is not trusted; the text names the file, the reason and the remedy."""


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by their flat dotted keys; read-only views into the mapped file.

    `notes` has a line for each thing that was unwrapped or left out. `close()`, or leaving a `with` block, lets go of
    the file; it stays mapped while somebody still holds one of its arrays.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], notes: tuple[str, ...] = ()):
        self._arrays: dict[str, np.ndarray] | None = dict(arrays)
        self.notes = notes

    def __getitem__(self, key: str) -> np.ndarray:
        return self._open[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def _open(self) -> dict[str, np.ndarray]:
        if self._arrays is None:
            raise CheckpointError("the checkpoint was closed; open it again")
        return self._arrays

    def close(self) -> None:
        self._arrays = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_checkpoint(path: str | Path, inert: Collection[str] = ()) -> Checkpoint:
    """The tensors of a file in any of the four layouts, memory-mapped.

    A pickle that asks for anything but containers and tensors is refused by name. `inert` lists such names
    ("argparse.Namespace") that are to be skipped instead: they become placeholders, and still nothing is executed.
    Raises `CheckpointError`.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
            stream.seek(0)
            if start[8:9] == b"{":
                return Checkpoint(open_safetensors(path))
            if start[:2] == b"PK":
                return _flatten(*_read_zip(stream, np.memmap(path, np.uint8, mode="r"), inert))
            if start[:1] == b"\x80":
                return _flatten(*_read_legacy(stream, np.memmap(path, np.uint8, mode="r"), inert))
            raise CheckpointError(f"it is no checkpoint: it begins with {start!r}")
    except PretrainedError as error:
        raise CheckpointError(str(error)) from error
    except (CheckpointError, RefusedPickle, zipfile.BadZipFile, NotImplementedError, struct.error, OSError) as error:
        raise CheckpointError(f"{path}: {error}{_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    if "list of harmless names" in str(error):
        return "; nothing was executed. If you trust that it is only bookkeeping, pass its name as inert to skip it"
    if isinstance(error, RefusedPickle | zipfile.BadZipFile):
        return "; download the file again and compare its checksum with the publisher's"
    return ""


_Resolver = Callable[[Storage], np.ndarray]


def _read_zip(stream: BinaryIO, data: np.ndarray, inert: Collection[str]) -> tuple[Any, _Resolver, tuple[str, ...]]:
    """The object of torch's zip archive, what gives a storage's bytes, and what is to be noted."""
    with zipfile.ZipFile(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise CheckpointError("two members of the archive have the same name")
    roots = [name.removesuffix("data.pkl") for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise CheckpointError(f"it is a zip archive, but no torch checkpoint: it has {len(roots)} data.pkl")
    order = members.get(f"{roots[0]}byteorder")
    if order and _member(data, order).tobytes() != b"little":
        raise CheckpointError("it was saved on a big-endian machine; save it again on a little-endian one")
    pickle = _member(data, members[f"{roots[0]}data.pkl"])
    if len(pickle) > MAX_BYTES:
        raise CheckpointError(f"its data.pkl has {len(pickle) >> 20} MiB; {MAX_BYTES >> 20} are read")

    def resolve(storage: Storage) -> np.ndarray:
        info = members.get(f"{roots[0]}data/{storage.key}")
        if info is None:
            raise CheckpointError(f"the archive lacks the storage {storage.key!r}")
        return _sized(_member(data, info), storage)

    script = f"{roots[0]}constants.pkl" in members
    tree = read_pickle(io.BytesIO(pickle), CONSTRUCTORS, storage_of, inert, _SCRIPT_CLASSES if script else None)
    return tree, resolve, (_SCRIPT_NOTE,) if script else ()


def _member(data: np.ndarray, info: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of an uncompressed zip member inside the mapped file."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise CheckpointError(f"its member {info.filename} is compressed or encrypted; torch never writes that")
    if info.header_offset < 0:
        raise CheckpointError(f"its member {info.filename} lies before the file")
    header = data[info.header_offset : info.header_offset + 30].tobytes()
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"its member {info.filename} is damaged or cut off")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + info.file_size > len(data):
        raise CheckpointError(f"its member {info.filename} is cut off: the file is truncated")
    return data[start : start + info.file_size]


def _sized(data: np.ndarray, storage: Storage) -> np.ndarray:
    if len(data) != storage.nbytes:
        raise CheckpointError(
            f"the storage {storage.key!r} claims {storage.numel} elements of {storage.dtype} ({storage.nbytes} bytes), "
            f"but the file has {len(data)} bytes for it"
        )
    return data


def _read_legacy(stream: BinaryIO, data: np.ndarray, inert: Collection[str]) -> tuple[Any, _Resolver]:
    """The object of torch's older layout or of a plain pickle, and what gives a storage's bytes."""
    wanted: dict[str, Storage] = {}

    def persistent(persistent_id: Any) -> Storage:
        storage = storage_of(persistent_id)
        if wanted.setdefault(storage.key, storage) != storage:
            raise RefusedPickle(f"it describes the storage {storage.key!r} in two ways")
        return storage

    first = read_pickle(stream, CONSTRUCTORS, None, inert)
    if type(first) is not int or first != _LEGACY_MAGIC:
        return first, _no_storage
    protocol, system = (read_pickle(stream, CONSTRUCTORS, None, inert) for _ in range(2))
    if protocol != _LEGACY_PROTOCOL or not (isinstance(system, dict) and system.get("little_endian") is True):
        raise CheckpointError(f"it has torch's older layout in a version that is not read ({protocol!r}, big-endian?)")
    result = read_pickle(stream, CONSTRUCTORS, persistent, inert)
    keys = read_pickle(stream, {}, None)
    if not (isinstance(keys, list) and all(isinstance(key, str) and key in wanted for key in keys)):
        raise CheckpointError("its list of storages is damaged")
    bytes_of, position = {}, stream.tell()
    for key in keys:
        storage = wanted[key]
        numel = int.from_bytes(data[position : position + 8].tobytes(), "little")
        if numel != storage.numel or position + 8 + storage.nbytes > len(data):
            raise CheckpointError(f"its storage {key!r} of {storage.numel} elements is damaged or cut off")
        bytes_of[key] = data[position + 8 : position + 8 + storage.nbytes]
        position += 8 + storage.nbytes
    return result, lambda storage: _sized(bytes_of.get(storage.key, data[:0]), storage)


def _no_storage(storage: Storage) -> np.ndarray:
    raise CheckpointError(f"it refers to the storage {storage.key!r}, but has none")


def _flatten(tree: Any, resolve: _Resolver, noted: tuple[str, ...] = ()) -> Checkpoint:
    """Nested dictionaries as one of dotted keys, with the wrappers named in the module's text taken off."""
    notes = list(noted)
    for _ in range(_MAX_NESTING):
        wrapper = next((key for key in _WRAPPERS if isinstance(tree, dict) and isinstance(tree.get(key), dict)), None)
        if wrapper is None:
            break
        others = [str(key) for key in tree if key != wrapper]
        notes.append(f"took what is under {wrapper!r}" + (f" and left out {_listed(others)}" if others else ""))
        tree = tree[wrapper]
    arrays, skipped = {}, []
    for key, leaf in _leaves(tree):
        if not isinstance(leaf, Tensor | NumpyArray):
            skipped.append(key)
            continue
        if key in arrays:
            raise CheckpointError(f"two of its tensors are called {key}")
        arrays[key] = leaf.view(resolve(leaf.storage)) if isinstance(leaf, Tensor) else leaf.array
        if arrays[key] is None:
            raise CheckpointError(f"the numpy array {key} never got its values")
    if not arrays:
        raise CheckpointError("it holds no dictionary of tensors")
    if skipped:
        notes.append(f"left out what is no tensor: {_listed(skipped)}")
    if all(key.startswith("module.") for key in arrays):
        notes.append("took the prefix 'module.' off every key")
        arrays = {key.removeprefix("module."): array for key, array in arrays.items()}
    return Checkpoint(arrays, tuple(notes))


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The entries of nested dictionaries that are no dictionaries; what is too deep or too many is refused.

    A small pickle can describe exponentially many entries, by putting one dictionary in several places.
    """
    pending, seen = [("", tree, 0)], 0
    while pending:
        key, node, depth = pending.pop()
        seen += 1
        if not isinstance(node, dict):
            yield key, node
            continue
        if depth >= _MAX_NESTING or len(key) > _MAX_KEY_LENGTH or seen + len(pending) + len(node) > _MAX_ENTRIES:
            raise CheckpointError(f"its dictionaries are too many, or nested more than {_MAX_NESTING} deep")
        prefix = f"{key}." if key else ""
        pending += [(f"{prefix}{name}", child, depth + 1) for name, child in reversed(node.items())]


def _listed(names: list[str]) -> str:
    """The first of many names, each cut to a readable length."""
    return ", ".join(name[:80] for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
