"""The textures that object files name: checked before trimesh, which draws what it cannot read in grey, says nothing.

Only base colours matter here, as only they are read. Sizes are taken from the headers, before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
import urllib.parse
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError

from hi3d_jax.mesh.triangles import MeshError

MAX_TEXTURE_PIXELS = 70_000_000
# Larger textures are reduced to this edge while they are decoded: 200 MB as float32.
MAX_TEXTURE_EDGE = 4096
GLB_MAGIC, JSON_CHUNK, BINARY_CHUNK = 0x46546C67, 0x4E4F534A, 0x004E4942


def check_textures(path: Path) -> None:
    """Raises `MeshError` for a texture that is missing, outside the object's folder, unreadable or too large."""
    if path.suffix.lower() == ".obj":
        _check_obj(path)
    elif path.suffix.lower() in (".glb", ".gltf"):
        _check_gltf(path)


def decode_texture(image: Image.Image, path: Path) -> Float[np.ndarray, "h w 3"]:
    """The texture as sRGB in [0, 1], at most `MAX_TEXTURE_EDGE` along a side. Raises `MeshError` for damaged bytes."""
    _check_size(image, "a texture", path)
    edges = (MAX_TEXTURE_EDGE, MAX_TEXTURE_EDGE)
    try:
        # JPEGs can be decoded at a half, a quarter or an eighth of their size at once.
        image.draft("RGB", edges)
        image = image.convert("RGB")
        image.thumbnail(edges, Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MeshError(f"a texture of {path} is truncated or damaged ({error}); export it again") from error
    return np.asarray(image, np.float32) / 255


def _check_obj(path: Path) -> None:
    text = path.read_text(errors="replace")
    for material in [line.split(maxsplit=1)[1].strip() for line in text.splitlines() if line.startswith("mtllib ")]:
        library = path.parent / material
        if not library.is_file():
            continue
        for line in library.read_text(errors="replace").splitlines():
            key, _, texture = line.strip().partition(" ")
            if key != "map_Kd":
                continue
            file = path.parent / texture.strip()
            if not file.is_file():
                raise MeshError(f"{library} names the texture {texture!r}, which is missing; put it beside {path.name}")
            _check_picture(file, f"texture {texture!r}", path)


def _check_gltf(path: Path) -> None:
    content, binary = _gltf_content(path)
    try:
        for number in sorted(_base_colour_images(content)):
            image = content["images"][number]
            if "uri" in image and not image["uri"].startswith("data:"):
                _check_picture(_named_file(image["uri"], path), f"texture {image['uri']!r}", path)
            elif "uri" in image:
                data = base64.b64decode(image["uri"].partition(",")[2], validate=True)
                _check_picture(io.BytesIO(data), f"texture {number}", path)
            else:
                view = content["bufferViews"][image["bufferView"]]
                start = view.get("byteOffset", 0)
                # Other buffers than the file's own are external files, of which trimesh says what is missing.
                if view["buffer"] == 0 and binary:
                    data = io.BytesIO(binary[start : start + view["byteLength"]])
                    _check_picture(data, f"texture {number}", path)
    except (KeyError, IndexError, TypeError, AttributeError, binascii.Error) as error:
        raise MeshError(
            f"{path} names its textures wrongly ({type(error).__name__}: {error}); export it again"
        ) from error


def _gltf_content(path: Path) -> tuple[dict, bytes]:
    """The JSON of a glTF or GLB file, and a GLB's binary part. What is no glTF is left to the reader to complain of."""
    data = path.read_bytes()
    try:
        if path.suffix.lower() == ".gltf":
            return json.loads(data), b""
        magic, _, _ = struct.unpack_from("<III", data)
        length, kind = struct.unpack_from("<II", data, 12)
        content = json.loads(data[20 : 20 + length])
        binary = b""
        if len(data) >= 28 + length and struct.unpack_from("<II", data, 20 + length)[1] == BINARY_CHUNK:
            binary = data[28 + length :]
        known = magic == GLB_MAGIC and kind == JSON_CHUNK and isinstance(content, dict)
        return (content, binary) if known else ({}, b"")
    except (struct.error, ValueError):
        return {}, b""


def _base_colour_images(content: dict) -> set[int]:
    images = set()
    for material in content.get("materials", []):
        physical = material.get("pbrMetallicRoughness", {})
        extension = material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness", {})
        for named in (physical.get("baseColorTexture"), extension.get("diffuseTexture")):
            if named is None:
                continue
            texture = content["textures"][named["index"]]
            sources = [texture.get("source")]
            sources += [other.get("source") for other in texture.get("extensions", {}).values()]
            images |= {next(source for source in sources if source is not None)}
    return images


def _named_file(uri: str, path: Path) -> Path:
    folder = path.parent.resolve()
    file = (folder / urllib.parse.unquote(uri)).resolve()
    if not file.is_relative_to(folder):
        raise MeshError(f"{path} names the texture {uri!r} outside its folder; pack it into the file")
    if not file.is_file():
        raise MeshError(f"{path} names the texture {uri!r}, which is missing; put it beside the file, or pack it in")
    return file


def _check_picture(source: Path | io.BytesIO, name: str, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the check below is stricter.
            warnings.simplefilter("ignore")
            with Image.open(source) as picture:
                _check_size(picture, name, path)
    except Image.DecompressionBombError as error:
        raise MeshError(f"{name} of {path} is too large ({error}); scale it down") from error
    except (OSError, SyntaxError, EOFError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise MeshError(f"{name} of {path} is no picture that can be read ({reason}); export it as PNG") from error


def _check_size(picture: Image.Image, name: str, path: Path) -> None:
    if picture.width * picture.height > MAX_TEXTURE_PIXELS:
        size = f"{picture.width} x {picture.height}"
        raise MeshError(f"{name} of {path} has {size} pixels; scale it to 8000 or less along a side")
