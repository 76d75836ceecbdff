"""Torch archives by hand, honest and not."""

import pickle
import struct
import zipfile


def write_zip(path, data_pkl: bytes, storages: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED):
    """A torch archive by hand."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def tensor_pickle(numel=6, offset=0, shape=(2, 3), strides=(3, 1), kind=b"torch\nFloatStorage\n", key="0") -> bytes:
    """The opcodes of {"w": tensor}, with whatever the caller claims about the tensor."""

    def number(value) -> bytes:
        return pickle.LONG1 + bytes([len(data := value.to_bytes(16, "little", signed=True))]) + data

    def text(value) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

    def numbers(values) -> bytes:
        return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

    storage = (
        pickle.MARK + text("storage") + pickle.GLOBAL + kind + text(key) + text("cpu") + number(numel) + pickle.TUPLE
    )
    rebuild = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + storage + pickle.BINPERSID
    rebuild += number(offset) + numbers(shape) + numbers(strides) + pickle.NEWFALSE + pickle.NONE
    rebuild += pickle.TUPLE + pickle.REDUCE
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + text("w") + rebuild + pickle.SETITEM + pickle.STOP
