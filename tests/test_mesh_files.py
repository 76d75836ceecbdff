import json
import struct

import numpy as np
import plyfile
import pytest
import trimesh
from PIL import Image

from hi3d_jax.cameras import orbit
from hi3d_jax.mesh import (
    Mesh,
    MeshError,
    is_watertight,
    paint_texture,
    read_mesh,
    render,
    smooth_normals,
    unwrap,
    write_mesh,
)


@pytest.fixture(scope="module")
def textured():
    ball = trimesh.creation.icosphere(3, 0.4)
    mesh = unwrap(Mesh((ball.vertices * [1, 0.7, 0.5]).astype(np.float32), ball.faces.astype(np.int32)), 128)
    return paint_texture(mesh, lambda p: (0.5 + p * np.float32([1.2, 1.5, 1.9])).astype(np.float32), 128)


def chunks(path):
    """The JSON and binary chunks of a GLB, its framing checked byte by byte."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    json_length, json_kind = struct.unpack_from("<I4s", data, 12)
    binary_at = 20 + json_length
    binary_length, binary_kind = struct.unpack_from("<I4s", data, binary_at)
    assert (json_kind, binary_kind) == (b"JSON", b"BIN\0")
    assert json_length % 4 == binary_length % 4 == 0
    assert binary_at + 8 + binary_length == length
    return json.loads(data[20:binary_at]), data[binary_at + 8 :]


def accessor(document, binary, index):
    entry = document["accessors"][index]
    view = document["bufferViews"][entry["bufferView"]]
    kind = {5126: np.float32, 5125: np.uint32, 5123: np.uint16}[entry["componentType"]]
    width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}[entry["type"]]
    start = view.get("byteOffset", 0) + entry.get("byteOffset", 0)
    assert start % np.dtype(kind).itemsize == 0
    values = np.frombuffer(binary, kind, entry["count"] * width, start).reshape(-1, width)
    if "min" in entry:
        np.testing.assert_array_equal(values.min(axis=0), np.float32(entry["min"]))
        np.testing.assert_array_equal(values.max(axis=0), np.float32(entry["max"]))
    return values


def test_glb_is_structured_as_gltf_demands(textured, tmp_path):
    write_mesh(tmp_path / "mesh.glb", textured)
    document, binary = chunks(tmp_path / "mesh.glb")
    (primitive,) = document["meshes"][0]["primitives"]
    attributes = {name: accessor(document, binary, at) for name, at in primitive["attributes"].items()}
    assert set(attributes) == {"POSITION", "NORMAL", "TEXCOORD_0"}
    assert {"min", "max"} <= set(document["accessors"][primitive["attributes"]["POSITION"]])
    indices = accessor(document, binary, primitive["indices"])
    assert indices.max() == len(attributes["POSITION"]) - 1
    np.testing.assert_allclose(np.linalg.norm(attributes["NORMAL"], axis=1), 1, atol=1e-5)
    # y up: our z is glTF's y; uvs start at the top left.
    np.testing.assert_allclose(attributes["POSITION"][:, 1], textured.vertices[:, 2], atol=1e-6)
    np.testing.assert_allclose(attributes["POSITION"][:, 2], -textured.vertices[:, 1], atol=1e-6)
    np.testing.assert_allclose(
        attributes["TEXCOORD_0"], np.stack([textured.uvs[:, 0], 1 - textured.uvs[:, 1]], 1), atol=1e-6
    )
    (material,) = document["materials"]
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert material["pbrMetallicRoughness"]["roughnessFactor"] == 1
    assert not material.get("doubleSided", False)
    (image,) = document["images"]
    view = document["bufferViews"][image["bufferView"]]
    start = view.get("byteOffset", 0)
    assert binary[start : start + 4] == b"\x89PNG"


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_written_meshes_read_back_and_stay_one_watertight_body(textured, tmp_path, suffix):
    write_mesh(tmp_path / f"mesh{suffix}", textured)
    again = read_mesh(tmp_path / f"mesh{suffix}")
    assert is_watertight(again)
    loaded = trimesh.load(tmp_path / f"mesh{suffix}", force="mesh", process=False)
    loaded.merge_vertices(merge_tex=True, merge_norm=True)
    assert loaded.is_watertight
    assert loaded.body_count == 1
    assert loaded.volume > 0
    np.testing.assert_allclose(np.sort(again.vertices.min(0)), np.sort(textured.vertices.min(0)), atol=1e-6)
    cameras = orbit([20.0, 200.0], elevation_deg=30.0, width=96)
    error = render(again, cameras).views - render(textured, cameras).views
    assert -10 * np.log10((error**2).mean()) > (30 if suffix == ".ply" else 45)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_glb_stores_smooth_normals(textured, tmp_path):
    write_mesh(tmp_path / "mesh.glb", textured)
    again = read_mesh(tmp_path / "mesh.glb")
    np.testing.assert_allclose(again.normals, smooth_normals(textured), atol=1e-5)


def test_obj_brings_its_own_material_and_texture(textured, tmp_path):
    write_mesh(tmp_path / "a.obj", textured)
    write_mesh(tmp_path / "b.obj", textured)
    assert {"a.obj", "a.mtl", "a.png", "b.obj", "b.mtl", "b.png"} == {path.name for path in tmp_path.iterdir()}
    assert "mtllib a.mtl" in (tmp_path / "a.obj").read_text()
    assert "map_Kd a.png" in (tmp_path / "a.mtl").read_text()
    with Image.open(tmp_path / "a.png") as texture:
        assert texture.size == (128, 128)


def test_ply_is_one_vertex_per_position_with_colours(textured, tmp_path):
    write_mesh(tmp_path / "mesh.ply", textured)
    vertices = plyfile.PlyData.read(tmp_path / "mesh.ply")["vertex"]
    assert len(vertices) == 642
    assert {"x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"} <= set(vertices.data.dtype.names)
    expected = 255 * (0.5 + vertices["x"] * 1.2)
    assert np.abs(vertices["red"] - expected).mean() < 4


def test_vertex_colours_survive_every_format(tmp_path):
    box = trimesh.creation.box((1, 1, 1))
    colours = np.linspace(0.05, 0.95, 24).reshape(8, 3).astype(np.float32)
    mesh = Mesh(box.vertices.astype(np.float32), box.faces.astype(np.int32), colours=colours)
    for suffix in (".glb", ".obj", ".ply"):
        write_mesh(tmp_path / f"mesh{suffix}", mesh)
        again = read_mesh(tmp_path / f"mesh{suffix}")
        order, order_again = np.lexsort(mesh.vertices.T), np.lexsort(again.vertices.T)
        # Eight linear bits are coarse in the shadows.
        np.testing.assert_allclose(again.colours[order_again], colours[order], atol=0.02, err_msg=suffix)


def test_a_failed_write_leaves_the_old_file(textured, tmp_path, monkeypatch):
    write_mesh(tmp_path / "mesh.glb", textured)
    before = (tmp_path / "mesh.glb").read_bytes()

    def full_disk(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_mesh(tmp_path / "mesh.glb", textured)
    assert (tmp_path / "mesh.glb").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mesh.glb"]


def test_other_suffixes_and_broken_meshes_are_refused(textured, tmp_path):
    with pytest.raises(MeshError, match=r"\.glb, \.obj, \.ply"):
        write_mesh(tmp_path / "mesh.stl", textured)
    with pytest.raises(MeshError, match="0 faces"):
        write_mesh(tmp_path / "mesh.glb", Mesh(textured.vertices, textured.faces[:0]))
    assert list(tmp_path.iterdir()) == []
