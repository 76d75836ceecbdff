import gzip
import io
import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
import trimesh
from PIL import Image

from hi3d_jax.data.render import load_object
from hi3d_jax.data.sources import find_assets, opened_asset
from hi3d_jax.mesh import MeshError
from hi3d_jax.mesh.texture_files import MAX_TEXTURE_EDGE

RED, GREEN = (255, 0, 0), (0, 255, 0)


def textured_box(colour=RED):
    box = trimesh.creation.box((1, 1, 1))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.new("RGB", (8, 8), colour))
    uv = np.random.default_rng(0).random((len(box.vertices), 2))
    box.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return box


def write_scan(folder):
    """A Google Scanned Object as downloaded: the material names a texture that lies in another folder."""
    (folder / "meshes").mkdir(parents=True)
    (folder / "materials" / "textures").mkdir(parents=True)
    corners = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0.5 0.5\n"
    faces = "f 1/1 3/1 2/1\nf 1/1 2/1 4/1\nf 2/1 3/1 4/1\nf 3/1 1/1 4/1\n"
    (folder / "meshes" / "model.obj").write_text(f"mtllib model.mtl\n{corners}usemtl material_0\n{faces}")
    (folder / "meshes" / "model.mtl").write_text("newmtl material_0\nmap_Kd texture.png\n")
    Image.new("RGB", (8, 8), GREEN).save(folder / "materials" / "textures" / "texture.png")
    (folder / "metadata.pbtxt").write_text('name: "Cup"\ncategories {\n  first: "Kitchen"\n}\n')


def zipped(path, folder, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + str(file.relative_to(folder)))


def read(asset):
    with opened_asset(asset) as path:
        return load_object(path)


def test_a_folder_of_everything_becomes_a_list_of_readable_assets(tmp_path):
    source = tmp_path / "source"
    (source / "chairs").mkdir(parents=True)
    textured_box().export(source / "chairs" / "one.glb")
    textured_box().export(source / "two.obj")
    write_scan(source / "Cup_Blue")
    write_scan(tmp_path / "Cup_Red")
    zipped(source / "Cup_Red.zip", tmp_path / "Cup_Red")
    zipped(source / "boxed.zip", source / "chairs", "inner/")
    (source / "notes.txt").write_text("no object")
    assets = {asset.id: asset for asset in find_assets(source)}
    assert list(assets) == ["Cup_Blue", "Cup_Red", "boxed", "chairs/one", "two"]
    assert assets["chairs/one"].about == {"category": "chairs"}
    assert assets["Cup_Blue"].about["category"] == "Kitchen"
    assert assets["Cup_Blue"].about["licence"] == "CC-BY-4.0"
    for name, colour in (("Cup_Blue", GREEN), ("Cup_Red", GREEN), ("boxed", RED), ("chairs/one", RED), ("two", RED)):
        np.testing.assert_allclose(read(assets[name]).texture.mean((0, 1)) * 255, colour, atol=1, err_msg=name)
    assert [asset.id for asset in find_assets(source, limit=2)] == ["Cup_Blue", "Cup_Red"]
    textured_box().export(source / "two.ply")
    assert [asset.id for asset in find_assets(source)][-2:] == ["two.obj", "two.ply"]


def test_a_manifest_says_what_is_known_and_which_split(tmp_path):
    rows = [
        {"id": "a", "file": "a.glb", "split": "train", "category": "cups", "licence": "CC0-1.0", "faces": 12},
        {"file": "b.glb", "split": "val"},
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (asset,) = find_assets(tmp_path, split="train")
    assert asset.id == "a"
    assert asset.about == {"category": "cups", "licence": "CC0-1.0", "split": "train"}
    assert [asset.id for asset in find_assets(tmp_path)] == ["a", "b"]
    with pytest.raises(MeshError, match=r"split 'test'; there are \['train', 'val'\]"):
        find_assets(tmp_path, split="test")
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"file": "../../etc/passwd"}))
    with pytest.raises(MeshError, match=r"line 1 .* leads out of the folder"):
        find_assets(tmp_path)
    (tmp_path / "manifest.jsonl").write_text("{\n")
    with pytest.raises(MeshError, match="line 1"):
        find_assets(tmp_path)


@pytest.fixture
def objaverse_cache(tmp_path):
    """What the objaverse package leaves behind after downloading two of three LVIS objects."""
    cache = tmp_path / "hf-objaverse-v1"
    (cache / "glbs" / "000-023").mkdir(parents=True)
    (cache / "metadata").mkdir()
    paths = {uid: f"glbs/000-023/{uid}.glb" for uid in ("aa", "bb", "cc", "dd")}
    metadata = {"aa": {"name": "Mug", "license": "by", "user": {"displayName": "Ann"}}, "bb": {}}
    files = {"lvis-annotations": {"mug": ["aa", "bb"], "cup": ["aa", "cc"]}, "object-paths": paths}
    for name, content in {**files, "metadata/000-023": metadata}.items():
        with gzip.open(cache / f"{name}.json.gz", "wt") as file:
            json.dump(content, file)
    for uid in ("aa", "bb", "dd"):
        textured_box().export(cache / paths[uid])
    return cache


def test_objaverse_is_read_from_its_cache(objaverse_cache):
    for folder in (objaverse_cache, objaverse_cache.parent):
        assets = find_assets(folder)
        assert [asset.id for asset in assets] == ["aa", "bb"]
        assert assets[0].about == {
            "category": "mug",
            "source": "Objaverse",
            "name": "Mug",
            "licence": "by",
            "attribution": "Ann",
        }
    read(assets[0])
    (objaverse_cache / "object-paths.json.gz").write_bytes(b"half")
    with pytest.raises(MeshError, match="fetch it again"):
        find_assets(objaverse_cache)


def test_objaverse_is_fetched_by_its_package(objaverse_cache, monkeypatch):
    objaverse = pytest.importorskip("objaverse", reason="needs the extra objaverse")
    monkeypatch.setattr(objaverse, "_VERSIONED_PATH", str(objaverse_cache))
    # Everything asked for is in the cache, so nothing is downloaded.
    assert [asset.id for asset in find_assets("objaverse-lvis", limit=2)] == ["aa", "bb"]


def test_folders_and_archives_that_hold_nothing_usable_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in (("empty", "holds no .glb"), ("absent", "is not a folder")):
        with pytest.raises(MeshError, match=message):
            find_assets(tmp_path / source)
    (tmp_path / "noise.zip").write_bytes(b"PK not a zip")
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr("../../slipped.obj", "v 0 0 0\n")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    for name, message in (
        ("noise", "cannot be unpacked"),
        ("slip", "outside its folder"),
        ("none", "0 object files where one is wanted"),
    ):
        (asset,) = find_assets(tmp_path / f"{name}.zip")
        with pytest.raises(MeshError, match=message):
            read(asset)
    assert not (tmp_path.parent / "slipped.obj").exists()


def header_of_png(width, height):
    """A PNG whose header promises more pixels than its data holds."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def glb_with(texture=None, uri=None, position=None):
    """A GLB of a box whose texture's bytes, texture's address or first coordinates are replaced."""
    data = textured_box().export(file_type="glb")
    length = struct.unpack_from("<I", data, 12)[0]
    content, binary = json.loads(data[20 : 20 + length]), bytearray(data[28 + length :])
    if uri is not None:
        content["images"][0] = {"uri": uri}
    if texture is not None:
        view = content["images"][0]["bufferView"]
        content["bufferViews"][view] = {"buffer": 0, "byteOffset": len(binary), "byteLength": len(texture)}
        binary += texture
        content["buffers"][0]["byteLength"] = len(binary)
    if position is not None:
        accessor = content["accessors"][content["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
        start = content["bufferViews"][accessor["bufferView"]].get("byteOffset", 0)
        binary[start : start + 4 * len(position)] = struct.pack(f"<{len(position)}f", *position)
    text = json.dumps(content).encode()
    text, binary = text + b" " * (-len(text) % 4), bytes(binary) + bytes(-len(binary) % 4)
    body = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(binary), 0x004E4942) + binary
    return struct.pack("<III", 0x46546C67, 2, 12 + len(body)) + body


def test_objects_with_bad_bytes_textures_or_geometry_are_refused(tmp_path):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(noise, "PNG")
    (tmp_path.parent / "outside.png").write_bytes(noise.getvalue())
    for name, data, message in (
        ("cut", glb_with()[:700], "cannot be read as a mesh"),
        ("absent", glb_with(uri="absent.png"), "'absent.png', which is missing"),
        ("outside", glb_with(uri="../outside.png"), "outside its folder"),
        ("garbage", glb_with(texture=b"garbage" * 9), r"no picture that can be read \(unknown format\)"),
        ("half", glb_with(texture=noise.getvalue()[:3000]), "truncated"),
        ("large", glb_with(texture=header_of_png(9000, 9000)), "9000 x 9000 pixels; scale it"),
        ("bomb", glb_with(texture=header_of_png(60000, 60000)), "too large"),
        ("nan", glb_with(position=[float("nan")]), "1 of 8 vertices are NaN"),
        ("point", glb_with(position=[0.5] * 24), "lie in one point"),
        ("line", glb_with(position=[x for number in range(8) for x in (number / 8, 0, 0)]), "has an area"),
    ):
        (tmp_path / f"{name}.glb").write_bytes(data)
        with pytest.raises(MeshError, match=message):
            load_object(tmp_path / f"{name}.glb")
    # A line break in the first vertex: trimesh gives vertices of one coordinate.
    (tmp_path / "broken.obj").write_text("v -0\n30901 1 2\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    with pytest.raises(MeshError, match="cannot be read as a mesh"):
        load_object(tmp_path / "broken.obj")
    Image.new("RGB", (8, 8), GREEN).save(tmp_path / "beside.png")
    (tmp_path / "good.glb").write_bytes(glb_with(uri="beside.png"))
    np.testing.assert_allclose(load_object(tmp_path / "good.glb").texture[0, 0], [0, 1, 0])


def test_large_textures_are_reduced_while_they_are_decoded(tmp_path):
    wide = io.BytesIO()
    Image.new("RGB", (MAX_TEXTURE_EDGE * 2, 16), (200, 100, 50)).save(wide, "JPEG", quality=95)
    (tmp_path / "wide.glb").write_bytes(glb_with(texture=wide.getvalue()))
    texture = load_object(tmp_path / "wide.glb").texture
    assert texture.shape == (8, MAX_TEXTURE_EDGE, 3)
    np.testing.assert_allclose(texture[4, 9] * 255, [200, 100, 50], atol=3)
