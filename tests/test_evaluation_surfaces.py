from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from hi3d_jax.cameras import orbit
from hi3d_jax.data import normalise
from hi3d_jax.evaluation import EvaluationError, floors, strict, syncdreamer, syncdreamer_cameras
from hi3d_jax.evaluation.occupancy import exact_winding_numbers, parity_inside, winding_inside, winding_numbers
from hi3d_jax.evaluation.surfaces import (
    f_score,
    nearest_distances,
    sample_surface,
    visible_points,
    volume_iou,
    voxel_downsample,
)
from hi3d_jax.mesh import Mesh, depth_maps, read_mesh


def mesh_of(solid) -> Mesh:
    return Mesh(solid.vertices.astype(np.float32), solid.faces.astype(np.int32))


def ball(radius=0.5, subdivisions=4):
    return mesh_of(trimesh.creation.icosphere(subdivisions, radius))


def lattice(first, spacing, resolution):
    return first + np.indices([resolution] * 3).reshape(3, -1).T * spacing


FIRST = np.full(3, -0.575)


def test_winding_of_closed_and_nested_bodies_is_exact():
    outer, inner = ball(0.5, 3), ball(0.25, 3)
    hollow = Mesh(
        np.concatenate([outer.vertices, inner.vertices]),
        np.concatenate([outer.faces, inner.faces[:, ::-1] + len(outer.vertices)]).astype(np.int32),
    )
    winding = winding_numbers(hollow, FIRST, 0.05, 24).reshape(-1)
    radius = np.linalg.norm(lattice(FIRST, 0.05, 24), axis=1)
    np.testing.assert_allclose(winding[radius < 0.24], 0, atol=1e-6)
    np.testing.assert_allclose(winding[(radius > 0.255) & (radius < 0.49)], 1, atol=1e-6)
    np.testing.assert_allclose(winding[radius > 0.505], 0, atol=1e-6)


def test_winding_of_an_open_mesh_is_near_the_exact_solid_angle():
    half = trimesh.creation.icosphere(3, 0.5)
    half.update_faces(half.triangles_center[:, 2] < 0.2)
    mesh = mesh_of(half)
    points = lattice(FIRST, 0.1, 12)
    exact = exact_winding_numbers(mesh, points)
    winding = winding_numbers(mesh, FIRST, 0.1, 12).reshape(-1)
    assert np.abs(winding - exact).mean() < 0.04
    clear = np.abs(np.abs(exact) - 0.5) > 0.15
    np.testing.assert_array_equal(winding[clear] > 0.5, exact[clear] > 0.5)


def test_exact_winding_of_an_octant():
    """A point sees each face of a cube around it under a sixth of the sphere."""
    box = trimesh.creation.box((1, 1, 1))
    faces = box.faces[np.argsort(box.triangles_center[:, 0])[-2:]]
    sixth = exact_winding_numbers(Mesh(box.vertices.astype(np.float32), faces.astype(np.int32)), np.zeros((1, 3)))
    assert sixth[0] == pytest.approx(1 / 6)


def test_inside_ignores_winding_direction_doubled_sheets_and_alignment_with_the_grid():
    """A cube whose faces lie on grid lines, turned inside out, with a doubled sheet beside it."""
    box = trimesh.creation.box((0.5, 0.5, 0.5))
    sheet = np.array([[0.4, -0.3, -0.3], [0.4, 0.3, -0.3], [0.4, 0.0, 0.4]])
    vertices = np.concatenate([box.vertices, sheet]).astype(np.float32)
    faces = np.concatenate([box.faces[:, ::-1], [[8, 9, 10], [9, 8, 10]]]).astype(np.int32)
    first = np.full(3, -0.5 + 1 / 32)
    expected = (np.abs(lattice(first, 1 / 16, 16)) < 0.25).all(axis=1)
    for inside in (winding_inside, parity_inside):
        np.testing.assert_array_equal(inside(Mesh(vertices, faces), first, 1 / 16, 16).reshape(-1), expected)


def test_parity_gives_the_signs_of_mesh2sdf():
    """fixtures/mesh2sdf_signs.npz: mesh2sdf 1.1.0, `compute(vertices, faces, 64, fix=False) < 0`, of the mesh below."""
    half = trimesh.creation.icosphere(3, 0.5)
    half.update_faces((half.triangles_center @ [0.6, 0.5, 0.4]) < 0.15)
    ring = trimesh.creation.torus(0.3, 0.11, major_sections=24, minor_sections=12)
    mesh = mesh_of(trimesh.util.concatenate([half, ring]))
    with np.load(Path(__file__).parent / "fixtures" / "mesh2sdf_signs.npz") as stored:
        np.testing.assert_allclose(mesh.vertices.sum(axis=0), stored["vertex_sum"], atol=1e-3)
        theirs = np.unpackbits(stored["signs"]).astype(bool).reshape(64, 64, 64)
    ours = parity_inside(mesh, np.full(3, -1.0), 2 / 64, 64)
    assert theirs.sum() > 5000
    # Lines that graze an edge are decided by rounding.
    assert (ours != theirs).sum() <= 0.002 * theirs.sum()


def test_samples_are_even_on_the_surface():
    box = mesh_of(trimesh.creation.box((1, 0.5, 0.25)))
    points, normals = sample_surface(box, 20_000, seed=0)
    on_face = np.isclose(np.abs(points), np.array([0.5, 0.25, 0.125]), atol=1e-6)
    assert (on_face.sum(axis=1) >= 1).all()
    top = on_face[:, 2].mean()
    assert top == pytest.approx(0.5 / (0.5 + 0.25 + 0.125), abs=0.02)
    np.testing.assert_allclose(np.abs(normals[on_face[:, 2]]), [[0, 0, 1]] * on_face[:, 2].sum(), atol=1e-6)


def test_visible_points_lie_on_the_surface_where_cameras_look():
    points = visible_points(ball(0.5, 5), orbit([0.0], width=64))
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 0.5, atol=1e-3)
    assert points[:, 0].min() > 0


def test_voxels_hold_the_mean_of_their_points():
    points = np.array([[0, 0, 0], [0.004, 0, 0], [0.006, 0, 0], [0.5, 0.2, 0.1]])
    thin = voxel_downsample(points, 0.01)
    # The first voxel reaches from -0.005 to 0.005.
    expected = [[0.002, 0, 0], [0.006, 0, 0], [0.5, 0.2, 0.1]]
    np.testing.assert_allclose(thin[np.argsort(thin[:, 0])], expected, atol=1e-12)
    many = np.random.default_rng(0).uniform(-1, 1, (5000, 3))
    index = np.floor((many - many.min(0) + 0.05) / 0.1).astype(int)
    assert len(voxel_downsample(many, 0.1)) == len(np.unique(index, axis=0))


def test_distances_equal_brute_force_and_scores_their_definitions():
    a, b = np.random.default_rng(1).normal(size=(2, 50, 3))
    distance, nearest = nearest_distances(a, b)
    every = np.linalg.norm(a[:, None] - b[None], axis=-1)
    np.testing.assert_allclose(distance, every.min(axis=1))
    np.testing.assert_array_equal(nearest, every.argmin(axis=1))
    # Precision 1/2, recall 1.
    assert f_score(np.array([0.1, 0.3]), np.array([0.1, 0.1]), 0.2) == pytest.approx(2 / 3)
    assert f_score(np.ones(2), np.ones(2), 0.2) == 0
    assert volume_iou(np.array([True, True, False]), np.array([True, False, False])) == 0.5


def test_strict_scores_of_a_grown_ball_have_their_closed_forms():
    scores = strict(ball(0.47), ball(0.5))
    assert scores.chamfer == pytest.approx(0.03, rel=0.05)
    assert scores.f_score_02 == 0
    assert scores.normal_consistency > 0.99
    assert scores.iou == pytest.approx((0.47 / 0.5) ** 3, abs=0.01)


def test_floors_show_what_sampling_alone_costs():
    itself, moved = floors(strict, ball())
    # Random points of density n / A lie sqrt(A / n) / 2 apart on the mean.
    assert itself.chamfer == pytest.approx(0.5 * np.sqrt(np.pi / 50_000), rel=0.03)
    assert itself.f_score_01 > 0.99
    assert itself.iou == 1
    assert moved.iou < 1


def test_syncdreamer_scores_a_moved_ball_and_its_own_floor():
    itself, moved = floors(syncdreamer, ball(subdivisions=3))
    assert (itself.chamfer, itself.iou) == (0, 1)
    assert 5e-4 < moved.chamfer < 4e-3
    assert moved.iou > 0.98
    smaller = syncdreamer(ball(0.45, 3), ball(0.5, 3))
    assert smaller.chamfer == pytest.approx(0.05, rel=0.1)
    assert smaller.iou == pytest.approx(0.9**3, abs=0.02)


def test_a_mesh_out_of_sight_is_refused():
    far = Mesh(ball(0.1, 2).vertices + np.float32([50, 50, 0]), ball(0.1, 2).faces)
    with pytest.raises(EvaluationError, match="no camera of the protocol sees the mesh"):
        syncdreamer(far, ball(0.5, 2))


def test_depths_of_the_published_benchmark_are_ours_to_a_16_bit_step(shared):
    """SyncDreamer's rendered depths of the chicken against ours: cameras, axes and depth convention in one."""
    folder = shared / "evaluation" / "chicken"
    mesh = normalise(read_mesh(folder / "mesh.obj"))
    x, y, z = mesh.vertices.T
    turned = Mesh(np.stack([-y, x, z], axis=1), mesh.faces)  # Rz(-270 degrees)
    ours = depth_maps(turned, syncdreamer_cameras())
    for view in range(0, 16, 5):
        with Image.open(folder / "gt" / f"{view:03d}-depth.png") as image:
            theirs = np.asarray(image) / 65535 * 1.8 + 0.6
        seen = (theirs > 0.63) & (theirs < 2.37)
        np.testing.assert_array_equal(seen, np.isfinite(ours[view]))
        assert np.median(np.abs(ours[view][seen] - theirs[seen])) < 1.8 / 65535
