"""Orbits as records: what a data set is made of on disk (its files are in shards.py).

A record is one orbit. Nothing in it is executed on reading (msgpack, WebP, PNG and raw numbers; no pickle), and its
head holds a checksum of the rest, so that damage is an error that names the record.

| field | dtype, shape | unit, range |
| --- | --- | --- |
| `key` | str | `OBJECT/ORBIT`, unique in the data set |
| `views` | uint8 `[t h w 4]` | sRGB with straight alpha, 0 to 255; white where alpha is 0 (lossless WebP) |
| `depths` | uint16 `[t h w]` | z along the optical axis, in 1/10000 of the object's longest side; 0: nothing (PNG) |
| `elevation_deg` | float | of all views |
| `azimuth_deg` | float | of view 0 in the object's own frame, view k is at + 360 k / t |
| `radius`, `fov_deg` | float | distance in longest sides; horizontal field of view |
| `about` | dict of str | object_id, category, name, licence, attribution, source, split, where known |
| `arrays` | dict of arrays `[t ...]` | per view: cached latents, image tokens, ... (raw little endian) |

All but `key` may be missing: a data set of cached latents or of stage 1's outputs holds `arrays` or `views` alone.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence

import msgpack
import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from hi3d_jax.data.render import DEPTH_UNITS

MAGIC = b"hi3d\x01"
CHECKSUM_BYTES = 4
# Lossless; the effort is a tenth of the time that rendering a view takes, and the files are a third below PNG's.
WEBP = {"format": "WEBP", "lossless": True, "exact": True, "quality": 50, "method": 2}
MAX_PIXELS = 1 << 26
ARRAY_DTYPES = ("float16", "float32", "uint8", "uint16", "int32", "int64", "bool")


class RecordError(ValueError):
    """A record, shard or data set that cannot be read; the text names it and the remedy."""


# Numbers of views, in an order.
Order = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class OrbitRecord:
    """One orbit, with the fields of this file's head; `views` and `depths` may be absent or left unread."""

    key: str
    views: UInt8[np.ndarray, "t h w 4"] | None = None
    depths: UInt16[np.ndarray, "t h w"] | None = None
    elevation_deg: float = 0.0
    azimuth_deg: float = 0.0
    radius: float = 0.0
    fov_deg: float = 0.0
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def num_views(self) -> int:
        """Views of the orbit: the length of what the record holds."""
        held = [part for part in (self.views, self.depths, *self.arrays.values()) if part is not None]
        return len(held[0]) if held else 0

    def selected(self, order: Order) -> OrbitRecord:
        """The record with the views, depths and arrays of `order` in that order."""
        order = np.asarray(order, np.int64)
        pick = lambda part: None if part is None else part[order]  # noqa: E731
        arrays = {name: array[order] for name, array in self.arrays.items()}
        return dataclasses.replace(self, views=pick(self.views), depths=pick(self.depths), arrays=arrays)


# A function of the number of views that says which ones are wanted, and in which order.
Select = Callable[[int], Order]
SCALARS = ("elevation_deg", "azimuth_deg", "radius", "fov_deg")


def depth_to_units(depths: np.ndarray) -> np.ndarray:
    """Depths in longest sides, infinite where nothing is, as the stored uint16."""
    return np.where(np.isfinite(depths), np.clip(np.round(depths * DEPTH_UNITS), 1, 65535), 0).astype(np.uint16)


def units_to_depth(units: np.ndarray) -> np.ndarray:
    """Stored uint16 as float32 depths in longest sides; 0 where nothing is."""
    return units.astype(np.float32) / np.float32(DEPTH_UNITS)


def encode(record: OrbitRecord) -> bytes:
    """The bytes of a record. Raises `RecordError` for an array of a kind that is not stored."""
    content = {"key": record.key, "about": dict(record.about)}
    content |= {name: float(getattr(record, name)) for name in SCALARS}
    if record.views is not None:
        content["views"] = [_compressed(view, **WEBP) for view in record.views]
    if record.depths is not None:
        content["depths"] = [_compressed(depth, format="PNG") for depth in record.depths]
    content["arrays"] = {name: _packed_array(name, array) for name, array in record.arrays.items()}
    payload = msgpack.packb(content)
    return MAGIC + zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "little") + payload


def decode(
    data: bytes,
    *,
    views: bool = True,
    depths: bool = True,
    arrays: Collection[str] | None = None,
    select: Select | None = None,
) -> OrbitRecord:
    """The record in `data`; what is not asked for is not decompressed. `arrays` None means all of them.

    Raises `RecordError` where the checksum does not fit, a picture is damaged or something asked for is absent.
    """
    content = _checked_content(data)
    try:
        absent = sorted(set(arrays or ()) - set(content["arrays"]))
        if absent:
            raise RecordError(f"it has no arrays {absent}, only {sorted(content['arrays'])}; cache them first")
        names = content["arrays"] if arrays is None else arrays
        unpacked = {name: _unpacked_array(*content["arrays"][name]) for name in names}
        order = None
        if select is not None:
            parts = [content.get("views"), content.get("depths"), *unpacked.values()]
            order = select(max((len(part) for part in parts if part is not None), default=0))
        return OrbitRecord(
            key=content["key"],
            views=_pictures(content.get("views"), "WEBP", order) if views else None,
            depths=_pictures(content.get("depths"), "PNG", order) if depths else None,
            about=content["about"],
            arrays=unpacked if order is None else {name: array[order] for name, array in unpacked.items()},
            **{name: content[name] for name in SCALARS},
        )
    except RecordError:
        raise
    except (KeyError, TypeError, ValueError, OSError, IndexError) as error:
        raise RecordError(f"a record does not have the fields of this version ({error}); render it again") from error


def _checked_content(data: bytes) -> dict:
    head = len(MAGIC) + CHECKSUM_BYTES
    if data[: len(MAGIC)] != MAGIC:
        raise RecordError("the bytes are not an orbit record of this version; render the data set again")
    if zlib.crc32(data[head:]).to_bytes(CHECKSUM_BYTES, "little") != data[len(MAGIC) : head]:
        raise RecordError("the record's checksum does not fit its content: it is damaged; copy or render it again")
    return msgpack.unpackb(memoryview(data)[head:])


def _compressed(picture: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, **options)
    return stream.getvalue()


def _pictures(files: list[bytes] | None, kind: str, order: Order | None) -> np.ndarray | None:
    """The pictures of a record, in one array; a size is read off the header before anything is decoded."""
    if files is None:
        return None
    chosen, frames = [files[index] for index in (range(len(files)) if order is None else order)], None
    for number, data in enumerate(chosen):
        with Image.open(io.BytesIO(data), formats=[kind]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise RecordError(f"a record's picture has {picture.width} x {picture.height} pixels; render it again")
            # WebP drops an alpha that is opaque everywhere.
            pixels = np.asarray(picture if kind == "PNG" else picture.convert("RGBA"))
        if frames is None:
            frames = np.empty((len(chosen), *pixels.shape), pixels.dtype)
        frames[number] = pixels
    return frames


def _packed_array(name: str, array: np.ndarray) -> list:
    if array.dtype.name not in ARRAY_DTYPES:
        raise RecordError(f"array {name!r} is {array.dtype}; stored are {', '.join(ARRAY_DTYPES)}: convert it")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return [array.dtype.name, list(array.shape), little.tobytes()]


def _unpacked_array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype not in ARRAY_DTYPES:
        raise RecordError(f"a record holds an array of {dtype!r}; this version reads {', '.join(ARRAY_DTYPES)}")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype, copy=False)


def manifest_line(record: OrbitRecord) -> dict:
    """What manifest.jsonl says of a record: enough to choose records without opening the shards."""
    return {"key": record.key, "elevation_deg": record.elevation_deg, "azimuth_deg": record.azimuth_deg, **record.about}
