"""3DGS .ply files: bit-equal round trips, the layout as another reader sees it, and files that are no splats."""

import jax.numpy as jnp
import numpy as np
import pytest
from plyfile import PlyData

from hi3d_jax.splatting import Gaussians, SplatFileError, read_ply, write_ply

COUNT = 7


def gaussians(degree: int) -> Gaussians:
    rng = np.random.default_rng(degree)
    shapes = (COUNT, 3), (COUNT, 4), (COUNT, 3), (COUNT,), (COUNT, (degree + 1) ** 2, 3)
    return Gaussians(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_reads_back_bit_equal(tmp_path, degree):
    written = gaussians(degree)
    write_ply(tmp_path / "splats.ply", written)
    read = read_ply(tmp_path / "splats.ply")
    for name in ("means", "quats", "log_scales", "opacity_logits", "sh"):
        assert np.asarray(getattr(read, name)).tobytes() == np.asarray(getattr(written, name)).tobytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["splats.ply"]


def test_layout_as_plyfile_reads_it(tmp_path):
    written = gaussians(2)
    write_ply(tmp_path / "splats.ply", written)
    ply = PlyData.read(tmp_path / "splats.ply")
    assert ply.byte_order == "<"
    vertex = ply["vertex"]
    names = [p.name for p in vertex.properties]
    assert names[:6] == ["x", "y", "z", "nx", "ny", "nz"]
    assert names[-8:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    np.testing.assert_array_equal(vertex["y"], written.means[:, 1])
    np.testing.assert_array_equal(vertex["rot_0"], written.quats[:, 0])
    np.testing.assert_array_equal(vertex["f_dc_2"], written.sh[:, 0, 2])
    # All coefficients of one channel before the next: number 8 of 24 is the first of green.
    np.testing.assert_array_equal(vertex["f_rest_8"], written.sh[:, 1, 1])
    np.testing.assert_array_equal(vertex["f_rest_1"], written.sh[:, 2, 0])


def test_reads_other_orders_and_types(tmp_path):
    written = gaussians(0)
    write_ply(tmp_path / "splats.ply", written)
    rows = PlyData.read(tmp_path / "splats.ply")["vertex"].data
    names = [name for name in reversed(rows.dtype.names) if not name.startswith("n")]
    header = ["ply", "format binary_little_endian 1.0", "comment other", f"element vertex {COUNT}"]
    header += [f"property double {name}" for name in names] + ["end_header\n"]
    body = np.stack([rows[name].astype("<f8") for name in names], axis=1).tobytes()
    (tmp_path / "other.ply").write_bytes("\n".join(header).encode() + body)
    read = read_ply(tmp_path / "other.ply")
    np.testing.assert_array_equal(read.quats, written.quats)
    np.testing.assert_array_equal(read.sh, written.sh)


def corrupted(content: bytes) -> dict[str, bytes]:
    return {
        "ends after": content[:-5],
        "no .ply header": content[:40],
        "no binary little endian": content.replace(b"binary_little_endian", b"ascii"),
        "lacks opacity": content.replace(b" opacity", b" opaquely"),
        "f_rest properties": content.replace(b"f_rest_8", b"x_rest_8"),
        "first element is not": content.replace(b"element vertex 7", b"element vertex x"),
        "is no property": content.replace(b"property float nx", b"property list uchar int nx"),
        "names a property twice": content.replace(b"float ny", b"float nx"),
        "NaN": content[:-4] + np.float32(np.nan).tobytes(),
        "no .ply header; give": b"",
    }


@pytest.mark.parametrize("problem", corrupted(b""))
def test_broken_files_are_refused_with_a_remedy(tmp_path, problem):
    write_ply(tmp_path / "good.ply", gaussians(1))
    path = tmp_path / "bad.ply"
    path.write_bytes(corrupted((tmp_path / "good.ply").read_bytes())[problem])
    with pytest.raises(SplatFileError, match=problem) as error:
        read_ply(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_absurd_count_needs_no_memory(tmp_path):
    write_ply(tmp_path / "good.ply", gaussians(0))
    content = (tmp_path / "good.ply").read_bytes().replace(b"vertex 7", b"vertex 70000000000000")
    (tmp_path / "bad.ply").write_bytes(content)
    with pytest.raises(SplatFileError, match="ends after"):
        read_ply(tmp_path / "bad.ply")
