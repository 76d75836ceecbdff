import json

import numpy as np
import pytest
import trimesh
from PIL import Image

from hi3d_jax.cameras import orbit, read_transforms
from hi3d_jax.data import example_mesh, load_object, normalise, render_orbit, write_orbit
from hi3d_jax.mesh import Mesh, MeshError, mesh_report, render


def box_scene():
    """Two textured boxes and a plain one, in glTF's y-up world; the second box is moved and mirrored by its node."""

    def textured(colour):
        box = trimesh.creation.box((1, 1, 1))
        image = Image.new("RGB", (8, 8), colour)
        material = trimesh.visual.material.PBRMaterial(baseColorTexture=image)
        uv = np.random.default_rng(0).uniform(-1, 2, (len(box.vertices), 2))
        box.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
        return box

    plain = trimesh.creation.box((1, 1, 1))
    plain.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(baseColorFactor=[0, 0, 255, 255])
    )
    scene = trimesh.Scene()
    scene.add_geometry(textured((255, 0, 0)))
    mirrored = np.diag([-1.0, 1, 1, 1])
    mirrored[0, 3] = 2
    scene.add_geometry(textured((0, 255, 0)), transform=mirrored)
    scene.add_geometry(plain, transform=trimesh.transformations.translation_matrix([0, 2, 0]))
    return scene


def test_a_scene_becomes_one_normalised_z_up_mesh_with_one_texture(tmp_path):
    box_scene().export(tmp_path / "scene.glb")
    mesh = load_object(tmp_path / "scene.glb")
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), [1, 1 / 3, 1], atol=1e-6)
    np.testing.assert_allclose(mesh.vertices.min(0) + mesh.vertices.max(0), 0, atol=1e-6)
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces)
    assert solid.is_watertight
    assert solid.is_winding_consistent
    np.testing.assert_allclose(solid.volume, 3 / 27, rtol=1e-5)
    # Seen from -y (azimuth 270), x points right and z up: red at the origin, green at its right, blue above it.
    view = render(mesh, orbit([270.0], width=60), supersample=1).views[0]
    np.testing.assert_allclose(view[38, 20], [1, 0, 0], atol=0.01)
    np.testing.assert_allclose(view[38, 40], [0, 1, 0], atol=0.01)
    np.testing.assert_allclose(view[20, 20], [0, 0, 1], atol=0.01)
    np.testing.assert_allclose(view[20, 40], [1, 1, 1], atol=0.01)


def test_vertex_colours_and_factors_survive(tmp_path):
    box = trimesh.creation.box((1, 1, 1))
    box.visual.vertex_colors = np.full((8, 4), [200, 100, 50, 255], np.uint8)
    box.export(tmp_path / "box.ply")
    mesh = load_object(tmp_path / "box.ply")
    np.testing.assert_allclose(mesh.colours[0] * 255, [200, 100, 50], atol=0.5)


def test_written_orbit_reads_back(tmp_path):
    ball = trimesh.creation.icosphere(3)
    mesh = normalise(Mesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int32)))
    renders, cameras = render_orbit(mesh, azimuths_deg=[0.0, 90.0], width=48, supersample=2)
    write_orbit(tmp_path / "orbit", renders, cameras)
    again, names = read_transforms(tmp_path / "orbit" / "cameras.json")
    np.testing.assert_allclose(again.c2w, cameras.c2w, atol=1e-6)
    np.testing.assert_allclose(again.K, cameras.K, atol=1e-4)
    assert names == ["views/000.png", "views/001.png"]
    for name, view, alpha in zip(names, renders.views, renders.alphas, strict=True):
        rgba = np.asarray(Image.open(tmp_path / "orbit" / name), np.float32) / 255
        np.testing.assert_allclose(rgba[..., 3], alpha, atol=0.003)
        over_white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
        np.testing.assert_allclose(over_white, view, atol=0.006)
    depth = np.asarray(Image.open(tmp_path / "orbit" / "depths" / "000.png")) / 10_000
    np.testing.assert_allclose(depth, np.where(np.isinf(renders.depths[0]), 0, renders.depths[0]), atol=1e-4)
    assert depth[24, 24] == pytest.approx(1.0, abs=0.01)  # radius 1.5 less the ball's 0.5
    assert json.loads((tmp_path / "orbit" / "cameras.json").read_text())["w"] == 48


def test_normalising_ignores_unused_vertices_and_drops_faces_without_area():
    vertices = np.array([[0, 0, 0], [2, 0, 0], [0, 1, 0], [99, 99, 99]], np.float32)
    mesh = normalise(Mesh(vertices, np.array([[0, 1, 2], [0, 1, 1]], np.int32)))
    np.testing.assert_allclose(mesh.vertices[:3], [[-0.5, -0.25, 0], [0.5, -0.25, 0], [-0.5, 0.25, 0]], atol=1e-6)
    assert len(mesh.faces) == 1


@pytest.mark.parametrize(
    ("vertices", "message"),
    [([[0, 0, 0]] * 3, "one point"), ([[0, 0, 0], [1, 1, 1], [2, 2, 2]], "none of the object's 1 faces has an area")],
)
def test_objects_without_surface_are_refused(vertices, message):
    with pytest.raises(MeshError, match=message):
        normalise(Mesh(np.array(vertices, np.float32), np.array([[0, 1, 2]], np.int32)))


def test_bad_files_are_refused_with_a_remedy(tmp_path):
    (tmp_path / "noise.glb").write_bytes(b"not a mesh at all")
    (tmp_path / "empty.obj").write_text("# nothing\n")
    (tmp_path / "nan.obj").write_text("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (tmp_path / "points.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 1\n"
        "property float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n"
    )
    (tmp_path / "paint.mtl").write_text("newmtl paint\nmap_Kd missing.png\n")
    (tmp_path / "bare.obj").write_text(
        "mtllib paint.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl paint\nf 1/1 2/2 3/3\n"
    )
    for name, message in [
        ("noise.glb", "cannot be read as a mesh"),
        ("empty.obj", "export"),
        ("nan.obj", "NaN"),
        ("points.ply", "no triangles"),
        ("bare.obj", "'missing.png', which is missing"),
        ("absent.glb", "not a file"),
        ("scene.fbx", "convert it"),
    ]:
        with pytest.raises(MeshError, match=message):
            load_object(tmp_path / name)


def test_the_example_is_one_closed_textured_body_with_a_front():
    mesh = example_mesh(num_faces=6000, texture_size=256, resolution=96)
    report = mesh_report(mesh)
    assert (report.watertight, report.components) == (True, 1)
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0).max(), 1, atol=1e-6)
    front, back = render(mesh, orbit([0.0, 180.0], width=64)).views
    yellow = [(np.abs(view - np.float32([0.97, 0.80, 0.22])).max(axis=-1) < 0.12).sum() for view in (front, back)]
    assert yellow[0] > 10
    assert yellow[1] == 0
