import numpy as np
import pytest
import trimesh
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from hi3d_jax.mesh import Mesh, MeshError, clean, decimate, extract_surface, is_watertight, mesh_report, smooth
from hi3d_jax.mesh.surface import POINTS_PER_CALL

BOUND = np.full(3, 0.5)


def sphere(radius=0.3, centre=(0.0, 0.0, 0.0)):
    return lambda points: np.linalg.norm(points - np.float32(centre), axis=1) - np.float32(radius)


def torus(points):
    return np.hypot(np.hypot(points[:, 0], points[:, 1]) - 0.3, points[:, 2]) - 0.1


def joined(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)


def full_grid_surface(sdf, resolution):
    """Marching cubes over every sample, without blocks."""
    axis = np.linspace(-0.5, 0.5, resolution + 1, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    values = sdf(points).reshape([resolution + 1] * 3)
    return marching_cubes(values, 0.0)[0] / resolution - 0.5


def test_sphere_has_its_volume_area_and_topology():
    mesh = extract_surface(sphere(), -BOUND, BOUND, 96)
    report = mesh_report(mesh)
    assert (report.watertight, report.components, report.genus, report.euler) == (True, 1, 0, 2)
    assert report.volume == pytest.approx(4 / 3 * np.pi * 0.3**3, rel=2e-3)
    assert report.area == pytest.approx(4 * np.pi * 0.3**2, rel=2e-3)
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), 0.3, atol=2e-4)


def test_torus_has_a_handle():
    report = mesh_report(extract_surface(torus, -BOUND, BOUND, 64))
    assert (report.watertight, report.genus) == (True, 1)


def test_two_passes_find_the_zero_set_of_the_full_grid():
    def wavy(points):
        return torus(points) + 0.01 * np.sin(40 * points[:, 0]) * np.sin(37 * points[:, 1] + 9 * points[:, 2])

    mesh = extract_surface(wavy, -BOUND, BOUND, 64)
    expected = full_grid_surface(wavy, 64)
    assert len(mesh.vertices) == len(expected)
    assert cKDTree(expected).query(mesh.vertices)[0].max() < 0.1 / 64
    # Samples next to zero move away from it by a thousandth of a cell.
    assert np.abs(wavy(mesh.vertices)).max() < np.abs(wavy(expected.astype(np.float32))).max() + 2e-3 / 64


def test_a_function_far_steeper_than_a_distance_is_followed_block_by_block():
    mesh = extract_surface(lambda points: 50 * torus(points), -BOUND, BOUND, 64)
    np.testing.assert_allclose(
        mesh_report(mesh).volume, mesh_report(extract_surface(torus, -BOUND, BOUND, 64)).volume, rtol=1e-4
    )


def test_only_blocks_near_the_surface_are_sampled_in_calls_of_one_size():
    sizes = []

    def counted(points):
        sizes.append(len(points))
        return sphere()(points)

    extract_surface(counted, -BOUND, BOUND, 128)
    assert set(sizes) == {POINTS_PER_CALL}
    assert sum(sizes) < 0.4 * 129**3


def test_surfaces_are_closed_where_they_touch_the_bounds():
    report = mesh_report(extract_surface(sphere(0.6), -BOUND, BOUND, 48))
    assert report.watertight
    assert report.volume < 1


def test_bounds_need_not_be_a_cube_nor_a_multiple_of_the_cell():
    lower, upper = np.array([-0.41, -0.33, -0.37]), np.array([0.4, 0.35, 0.31])
    mesh = extract_surface(sphere(), lower, upper, 70)
    assert mesh_report(mesh).volume == pytest.approx(4 / 3 * np.pi * 0.3**3, rel=4e-3)


def test_floaters_and_inner_cavities_go():
    def scene(points):
        shell = np.abs(np.linalg.norm(points, axis=1) - 0.25) - 0.05
        return np.minimum(shell, sphere(0.05, (0.42, 0.42, 0.42))(points))

    report = mesh_report(extract_surface(scene, -BOUND, BOUND, 64))
    assert (report.components, report.genus) == (1, 0)
    assert report.volume == pytest.approx(4 / 3 * np.pi * 0.3**3, rel=5e-3)


@pytest.mark.parametrize(("value", "side"), [(1.0, "nowhere"), (-1.0, "everywhere")])
def test_no_surface_is_an_error(value, side):
    with pytest.raises(MeshError, match=f"{side} negative"):
        extract_surface(lambda p: np.full(len(p), value), -BOUND, BOUND, 16)


def test_bad_input_is_an_error():
    with pytest.raises(MeshError, match="NaN"):
        extract_surface(lambda p: np.full(len(p), np.nan), -BOUND, BOUND, 16)
    with pytest.raises(MeshError, match="no volume"):
        extract_surface(sphere(), BOUND, -BOUND, 16)
    with pytest.raises(MeshError, match="resolution 4000"):
        extract_surface(sphere(), -BOUND, BOUND, 4000)


def test_cleaning_turns_faces_outward_joins_vertices_and_fills_holes():
    ball = trimesh.creation.icosphere(3, 0.4)
    soup = ball.vertices[ball.faces].reshape(-1, 3).astype(np.float32)
    faces = np.arange(len(soup)).reshape(-1, 3)[:, ::-1].astype(np.int32)
    with_holes = faces[np.r_[5:400, 405 : len(faces)]]
    mesh = clean(Mesh(soup, np.ascontiguousarray(with_holes)))
    report = mesh_report(mesh)
    assert report.watertight
    assert report.vertices < 700
    assert report.volume == pytest.approx(ball.volume, rel=2e-3)
    assert report.volume > 0


def test_cleaning_cuts_a_fin_that_shares_an_edge_with_a_body():
    box = trimesh.creation.box((1, 1, 1))
    vertices = np.concatenate([box.vertices, [[2.0, 2.0, 2.0]]]).astype(np.float32)
    faces = np.concatenate([box.faces, [[box.faces[0, 0], box.faces[0, 1], 8]]]).astype(np.int32)
    assert not is_watertight(Mesh(vertices, faces))
    report = mesh_report(clean(Mesh(vertices, faces)))
    assert report.watertight
    assert report.volume == pytest.approx(1, rel=0.35)


def test_an_open_sheet_cannot_be_closed():
    x, y = np.meshgrid(np.linspace(0, 1, 150), np.linspace(0, 1, 150))
    vertices = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1).astype(np.float32)
    corner = (np.arange(149)[:, None] * 150 + np.arange(149)).reshape(-1)
    faces = np.concatenate(
        [np.stack([corner, corner + 1, corner + 150], 1), np.stack([corner + 1, corner + 151, corner + 150], 1)]
    )
    with pytest.raises(MeshError, match="hole of 596 edges"):
        clean(Mesh(vertices, faces.astype(np.int32)))


@pytest.mark.parametrize("num_faces", [4000, 500, 200])
def test_decimation_reaches_its_count_and_stays_one_closed_body(num_faces):
    mesh = extract_surface(torus, -BOUND, BOUND, 64)
    report = mesh_report(decimate(mesh, num_faces))
    assert report.watertight
    assert report.components == 1
    assert num_faces * 0.9 <= report.faces <= num_faces
    assert report.volume == pytest.approx(mesh_report(mesh).volume, rel=0.1)


def test_decimation_of_rough_noise_never_returns_a_broken_mesh():
    for seed in range(6):
        noise = gaussian_filter(np.random.default_rng(seed).normal(size=(24, 24, 24)), 1.2)

        def rough(points, noise=noise):
            bumps = map_coordinates(noise, (points.T + 0.5) * 23, order=1, mode="nearest")
            return (np.linalg.norm(points, axis=1) - 0.35 + 0.6 * bumps).astype(np.float32)

        mesh = extract_surface(rough, -BOUND, BOUND, 48)
        for num_faces in (3000, 800):
            small = decimate(mesh, num_faces)
            assert joined(small).is_watertight
            assert mesh_report(small).components == 1


def test_decimation_leaves_small_meshes_alone_and_refuses_nonsense():
    box = trimesh.creation.box((1, 1, 1))
    mesh = Mesh(box.vertices.astype(np.float32), box.faces.astype(np.int32))
    assert decimate(mesh, 500) is mesh
    with pytest.raises(MeshError, match="3 faces bound no volume"):
        decimate(mesh, 3)


def test_smoothing_takes_bumps_and_leaves_the_body():
    sphere = trimesh.creation.icosphere(4, 0.3)
    bumps = np.random.default_rng(0).normal(scale=0.004, size=len(sphere.vertices))
    rough = Mesh((sphere.vertices * (1 + bumps[:, None] / 0.3)).astype(np.float32), sphere.faces.astype(np.int32))
    result = smooth(rough)
    np.testing.assert_array_equal(result.faces, rough.faces)
    left = np.linalg.norm(result.vertices, axis=1) - 0.3
    assert left.std() < 0.5 * bumps.std()
    assert abs(left.mean()) < 2e-4
    assert mesh_report(result).volume == pytest.approx(sphere.volume, rel=5e-3)


def test_smoothing_keeps_thin_things_thick():
    rod = extract_surface(lambda p: np.hypot(p[:, 0], p[:, 1]).clip(np.abs(p[:, 2]) - 0.3) - 0.02, -BOUND, BOUND, 128)
    before, after = mesh_report(rod).volume, mesh_report(smooth(rod)).volume
    assert after == pytest.approx(before, rel=0.03)


def test_smoothing_leaves_sharp_edges_that_are_held():
    box = trimesh.creation.box((0.6, 0.4, 0.3))
    for _ in range(4):
        box = box.subdivide()
    noise = np.random.default_rng(0).normal(scale=0.002, size=box.vertices.shape)
    rough = Mesh((box.vertices + noise).astype(np.float32), box.faces.astype(np.int32))
    on_edge = (np.abs(np.abs(box.vertices) - box.extents / 2) < 1e-6).sum(axis=1) >= 2
    free, held = smooth(rough), smooth(rough, np.ones(len(on_edge), bool))
    assert np.linalg.norm(free.vertices - box.vertices, axis=1)[on_edge].mean() > 0.004
    np.testing.assert_allclose(held.vertices[on_edge], rough.vertices[on_edge], atol=1e-6)
    # Sides that are held are smoothed all the same: they are no edges.
    sides = [np.linalg.norm(m.vertices - box.vertices, axis=1)[~on_edge].mean() for m in (rough, held)]
    assert sides[1] < 0.8 * sides[0]
