"""Mesh protocols against an independent computation, under changes that must or must not matter, and on bad meshes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import trimesh

from hi3d_jax.evaluation import EvaluationError, check_frame, strict, syncdreamer
from hi3d_jax.mesh import Mesh, MeshError

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "surface_scores.json").read_text())


def ball(radius=0.5, subdivisions=3) -> Mesh:
    solid = trimesh.creation.icosphere(subdivisions, radius)
    return Mesh(solid.vertices.astype(np.float32), solid.faces.astype(np.int32))


def plate() -> Mesh:
    """One sheet, 1 x 1."""
    corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], np.float32)
    return Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]], np.int32))


@pytest.fixture(scope="module")
def truth() -> Mesh:
    """An ellipsoid in a tilted ring, which is apart from it in some places and cuts it in others."""
    body = trimesh.creation.icosphere(4, 0.3)
    body.vertices *= [1.0, 0.8, 1.2]
    ring = trimesh.creation.torus(0.38, 0.07, major_sections=64, minor_sections=32)
    ring.vertices = ring.vertices @ np.array([[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]])
    both = trimesh.util.concatenate([body, ring])
    low, high = both.vertices.min(axis=0), both.vertices.max(axis=0)
    vertices = (both.vertices - (low + high) / 2) / (high - low).max()
    np.testing.assert_allclose(vertices.sum(axis=0), FIXTURE["vertex_sum"], atol=1e-3)
    return Mesh(vertices.astype(np.float32), both.faces.astype(np.int32))


@pytest.fixture(scope="module")
def meshes(truth) -> dict[str, Mesh]:
    v = truth.vertices
    bumps = 0.02 * np.sin(9 * v[:, :1]) * np.cos(7 * v[:, 1:2] + 1)
    noise = np.random.default_rng(0).normal(0, 0.004, v.shape)
    changed = {"moved": v + np.float32([0.02, -0.01, 0.015]), "bent": v + bumps, "noisy": v + noise}
    return {name: Mesh(vertices.astype(np.float32), truth.faces) for name, vertices in changed.items()}


@pytest.mark.parametrize("name", FIXTURE["cases"])
def test_scores_are_those_of_open3d_and_mesh2sdf(name, truth, meshes):
    """To three digits. Chamfer of `syncdreamer` has no randomness; that of `strict` is sampled by another generator."""
    expected = FIXTURE["cases"][name]
    ours = syncdreamer(meshes[name], truth)
    assert ours.chamfer == pytest.approx(expected["syncdreamer"]["chamfer"], abs=2e-5)
    assert ours.iou == pytest.approx(expected["syncdreamer"]["iou"], abs=5e-4)
    for metric, value in dataclasses.asdict(strict(meshes[name], truth)).items():
        # Shares of 50,000 points near a threshold vary by sqrt(p (1 - p) / n) = .002, mean cosines by .0005.
        tolerance = {"f": 5e-3, "n": 1e-3}.get(metric[0], 5e-4)
        assert value == pytest.approx(expected["strict"][metric], abs=tolerance), metric


def test_neither_the_frame_nor_the_order_of_vertices_matters(truth, meshes):
    mesh = meshes["bent"]
    before = dataclasses.asdict(strict(mesh, truth))
    quarter = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    turned = [dataclasses.replace(m, vertices=m.vertices @ quarter.T) for m in (mesh, truth)]
    for metric, value in dataclasses.asdict(strict(*turned)).items():
        assert value == pytest.approx(before[metric], abs=1e-3), metric
    order = np.random.default_rng(1).permutation(len(mesh.vertices))
    shuffled = Mesh(mesh.vertices[order], np.argsort(order).astype(np.int32)[mesh.faces])
    assert dataclasses.asdict(strict(shuffled, truth)) == before


def test_a_shift_raises_chamfer_by_the_shift():
    sheet = plate()
    for shift in (0.03, 0.06):
        moved = Mesh(sheet.vertices + np.float32([0, 0, shift]), sheet.faces)
        assert strict(moved, sheet).chamfer == pytest.approx(shift, rel=0.01)


def test_holes_lower_the_volume():
    whole = ball()
    height = whole.triangles.mean(axis=1)[:, 0]
    previous = {"strict": 1.0, "syncdreamer": 1.0}
    for cut in (0.45, 0.25):
        open_ball = Mesh(whole.vertices, whole.faces[height < cut])
        now = {"strict": strict(open_ball, whole).iou, "syncdreamer": syncdreamer(open_ball, whole).iou}
        assert all(now[name] < previous[name] for name in now)
        previous = now
    assert "not watertight" in check_frame(open_ball, whole)[0]


def test_an_inside_out_mesh_is_scored_alike_and_said_to_be_so(truth, meshes):
    inside_out = dataclasses.replace(meshes["moved"], faces=meshes["moved"].faces[:, ::-1].copy())
    assert strict(inside_out, truth).iou == strict(meshes["moved"], truth).iou
    assert any("inside out" in note for note in check_frame(inside_out, truth))
    assert check_frame(meshes["moved"], truth) == ()


def test_three_faces_at_one_edge_are_scored_and_said_to_be_open():
    whole = ball()
    fin = Mesh(
        np.concatenate([whole.vertices, whole.vertices[whole.faces[0, :1]] * np.float32(1.2)]),
        np.concatenate([whole.faces, [[whole.faces[0, 0], whole.faces[0, 1], len(whole.vertices)]]]).astype(np.int32),
    )
    assert strict(fin, whole).iou == pytest.approx(1, abs=0.01)
    assert "not watertight" in check_frame(fin, whole)[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v: v * 100, r"another unit: the mesh fills \[-50, 50\] x .*the truth \[-0.5, 0.5\]"),
        (lambda v: v / 100, "another unit"),
        (lambda v: v + np.float32([3, 0, 0]), r"lies elsewhere: the mesh fills \[2.5, 3.5\]"),
        (lambda v: np.where(np.arange(len(v))[:, None] == 5, np.float32(np.nan), v), "1 of 642 vertices are NaN"),
    ],
)
def test_a_mesh_in_another_frame_is_refused_with_both_boxes(change, complaint):
    whole = ball()
    with pytest.raises((EvaluationError, MeshError), match=complaint):
        check_frame(Mesh(change(whole.vertices).astype(np.float32), whole.faces), whole)


def test_a_truth_that_is_not_normalised_and_a_mesh_without_faces_are_refused():
    with pytest.raises(EvaluationError, match="truth is not centred with its longest side 1"):
        check_frame(ball(0.5), ball(0.7))
    with pytest.raises(MeshError, match="0 faces"):
        check_frame(Mesh(ball().vertices, np.zeros((0, 3), np.int32)), ball())
