"""The .ply files of 3DGS (INRIA's layout), which the usual viewers open.

One vertex per Gaussian, binary little endian, float32: x y z nx ny nz f_dc_0..2 f_rest_* opacity scale_0..2 rot_0..3.
Opacities, scales and rotations are stored before their activations, as in `Gaussians`; f_rest runs through all
coefficients of red, then green, then blue. Normals are zero and mean nothing.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hi3d_jax.atomic import written_aside
from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.spherical_harmonics import MAX_DEGREE, num_coefficients

MAX_HEADER_BYTES = 1 << 16
NORMALS = ("nx", "ny", "nz")
TYPES = {
    **dict.fromkeys(("float", "float32"), "<f4"),
    **dict.fromkeys(("double", "float64"), "<f8"),
    **dict.fromkeys(("uchar", "uint8"), "<u1"),
    **dict.fromkeys(("char", "int8"), "<i1"),
    **dict.fromkeys(("ushort", "uint16"), "<u2"),
    **dict.fromkeys(("short", "int16"), "<i2"),
    **dict.fromkeys(("uint", "uint32"), "<u4"),
    **dict.fromkeys(("int", "int32"), "<i4"),
}


class SplatFileError(ValueError):
    """A file that is no 3DGS .ply; the text names the file, what is wrong, and the remedy."""


def write_ply(path: str | Path, gaussians: Gaussians) -> None:
    """Writes `gaussians`; the file appears whole or not at all."""
    names = _property_names(gaussians.sh.shape[1])
    sh = np.asarray(gaussians.sh, np.float32)
    columns = [
        np.asarray(gaussians.means),
        np.zeros((len(gaussians), 3)),
        sh[:, 0],
        sh[:, 1:].swapaxes(1, 2).reshape(len(gaussians), -1),
        np.asarray(gaussians.opacity_logits)[:, None],
        np.asarray(gaussians.log_scales),
        np.asarray(gaussians.quats),
    ]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(gaussians)}"]
    header += [f"property float {name}" for name in names] + ["end_header\n"]
    body = np.concatenate(columns, axis=1).astype("<f4").tobytes()
    with written_aside(path) as aside:
        aside.write_bytes("\n".join(header).encode("ascii") + body)


def read_ply(path: str | Path) -> Gaussians:
    """Reads a file written by `write_ply`, INRIA's code, or any that stores the same properties in binary.

    Raises `SplatFileError` for anything else: other formats, missing properties, files cut short, numbers that are not
    finite.
    """
    with open(path, "rb") as file:
        count, dtype = _read_header(path, file)
        body = file.read()
    if len(body) < count * dtype.itemsize:
        raise SplatFileError(
            f"{path} ends after {len(body)} of {count * dtype.itemsize} bytes of Gaussians; copy or export it again"
        )
    rows = np.frombuffer(body, dtype, count)
    coefficients = _coefficients(path, dtype.names)
    names = [name for name in _property_names(coefficients) if name not in NORMALS]
    values = np.stack([rows[name].astype(np.float32) for name in names], axis=1)
    if not np.isfinite(values).all():
        raise SplatFileError(f"{path} holds NaN or infinite numbers; export it again from a fit that converged")
    sizes = [3, 3, 3 * (coefficients - 1), 1, 3]
    means, dc, rest, opacity, log_scales, quats = np.split(values, np.cumsum(sizes), axis=1)
    sh = np.concatenate([dc[:, None], rest.reshape(count, 3, coefficients - 1).swapaxes(1, 2)], axis=1)
    return Gaussians(*(jnp.asarray(part) for part in (means, quats, log_scales, opacity[:, 0], sh)))


def _property_names(coefficients: int) -> list[str]:
    names = ["x", "y", "z", *NORMALS, "f_dc_0", "f_dc_1", "f_dc_2"]
    names += [f"f_rest_{i}" for i in range(3 * (coefficients - 1))]
    return [*names, "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]


def _read_header(path, file) -> tuple[int, np.dtype]:
    """Number of Gaussians and the layout of one; leaves `file` at the first."""
    words = _header_lines(path, file)
    if len(words) < 3 or words[0] != ["ply"] or words[1] != ["format", "binary_little_endian", "1.0"]:
        raise SplatFileError(f"{path} is no binary little endian .ply; export the splats in that format")
    if words[2][:2] != ["element", "vertex"] or len(words[2]) != 3 or not words[2][2].isdigit():
        raise SplatFileError(f"{path}: its first element is not 'vertex' with a count; export it as 3DGS .ply")
    fields = []
    for line in words[3:]:
        if line[0] == "element":
            break
        if len(line) != 3 or line[0] != "property" or line[1] not in TYPES:
            raise SplatFileError(f"{path}: '{' '.join(line)}' is no property of a Gaussian; export it as 3DGS .ply")
        fields.append((line[2], TYPES[line[1]]))
    if len({name for name, _ in fields}) != len(fields):
        raise SplatFileError(f"{path} names a property twice; export it again")
    return int(words[2][2]), np.dtype(fields)


def _header_lines(path, file) -> list[list[str]]:
    """The header's lines as words, without comments and the closing end_header."""
    start = file.read(MAX_HEADER_BYTES)
    end = start.find(b"end_header")
    line_end = start.find(b"\n", end)
    if not start.startswith(b"ply") or end < 0 or line_end < 0:
        raise SplatFileError(f"{path} has no .ply header; give a file of Gaussian splats")
    file.seek(line_end + 1)
    lines = [line.split() for line in start[:end].decode("ascii", "replace").splitlines()]
    return [line for line in lines if line and line[0] not in ("comment", "obj_info")]


def _coefficients(path, names) -> int:
    """Spherical harmonics coefficients per channel, from the number of f_rest properties."""
    rest = sum(name.startswith("f_rest_") for name in names)
    for degree in range(MAX_DEGREE + 1):
        coefficients = num_coefficients(degree)
        if rest == 3 * (coefficients - 1):
            missing = [n for n in _property_names(coefficients) if n not in names and n not in NORMALS]
            if missing:
                raise SplatFileError(f"{path} lacks {', '.join(missing)}: no Gaussian splats; export it as 3DGS .ply")
            return coefficients
    raise SplatFileError(f"{path} has {rest} f_rest properties; expected 0, 9, 24 or 45 (degrees 0 to 3)")
