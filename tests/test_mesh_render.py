import numpy as np
import pytest
import trimesh

from hi3d_jax.cameras import look_at, orbit, pixel_rays
from hi3d_jax.mesh import Mesh, MeshError, RayCaster, creased_normals, depth_maps, render, smooth_normals
from hi3d_jax.mesh.render import linear_to_srgb, sample_texture, soft_light, srgb_to_linear


def icosphere(subdivisions=4, radius=0.4):
    sphere = trimesh.creation.icosphere(subdivisions, radius)
    return Mesh(sphere.vertices.astype(np.float32), sphere.faces.astype(np.int32))


def cube(side=0.6):
    box = trimesh.creation.box((side, side, side))
    return Mesh(box.vertices.astype(np.float32), box.faces.astype(np.int32))


def quad(texture):
    """A square of side 1 in the plane x = 0, facing +x (the camera of azimuth 0), uvs upright in that view."""
    vertices = np.array([[0, -0.5, -0.5], [0, 0.5, -0.5], [0, 0.5, 0.5], [0, -0.5, 0.5]], np.float32)
    uvs = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    return Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]], np.int32), uvs=uvs, texture=texture)


def brute_force(mesh, origins, directions):
    """Möller-Trumbore for every pair of ray and triangle, in float64."""
    a, b, c = mesh.triangles.astype(np.float64).transpose(1, 0, 2)
    o, d = origins.astype(np.float64)[:, None], directions.astype(np.float64)[:, None]
    p = np.cross(d, (c - a)[None])
    determinant = (p * (b - a)).sum(-1)
    s = o - a
    u = (s * p).sum(-1) / determinant
    q = np.cross(s, (b - a)[None])
    v = (d * q).sum(-1) / determinant
    t = ((c - a) * q).sum(-1) / determinant
    hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0)
    return np.where(hit, t, np.inf).min(axis=1)


def test_rays_equal_brute_force():
    rng = np.random.default_rng(0)
    mesh = Mesh(rng.uniform(-0.5, 0.5, (60, 3)).astype(np.float32), np.arange(60).reshape(20, 3).astype(np.int32))
    origins = rng.normal(size=(500, 3)).astype(np.float32)
    directions = rng.uniform(-0.4, 0.4, (500, 3)).astype(np.float32) - origins
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    hits = RayCaster(mesh).cast(origins, directions)
    expected = brute_force(mesh, origins, directions)
    assert 50 < np.isfinite(expected).sum() < 450
    np.testing.assert_allclose(hits.distance, expected, rtol=1e-4)
    met = hits.face >= 0
    points = np.einsum("nkc,nk->nc", mesh.triangles[hits.face[met]], hits.barycentric[met])
    np.testing.assert_allclose(points, origins[met] + hits.distance[met, None] * directions[met], atol=1e-5)
    nearer = RayCaster(mesh).occluded(origins, directions, np.where(met, hits.distance, 9) * 0.99)
    farther = RayCaster(mesh).occluded(origins, directions, np.where(met, hits.distance, 9) * 1.01)
    assert not nearer.any()
    np.testing.assert_array_equal(farther, met)


def test_sphere_depth_coverage_and_normals_have_their_closed_form():
    cameras = orbit([0.0, 70.0, 200.0], elevation_deg=25, width=96)
    renders = render(icosphere(5), cameras, supersample=3)
    origins, directions = (x.astype(np.float64) for x in pixel_rays(cameras))
    b = (origins * directions).sum(-1)
    discriminant = b**2 - (origins**2).sum(-1) + 0.4**2
    distance = -b - np.sqrt(np.maximum(discriminant, 0))
    depth = distance * np.einsum("thwi,ti->thw", directions, cameras.c2w[:, :3, 2])
    well_inside, well_outside = discriminant > 0.01, discriminant < -0.01
    np.testing.assert_allclose(renders.depths[well_inside], depth[well_inside], atol=1e-3)
    assert np.isinf(renders.depths[well_outside]).all()
    assert (renders.face_ids[well_outside] == -1).all()
    assert (renders.alphas[well_inside] == 1).all()
    assert (renders.alphas[well_outside] == 0).all()
    np.testing.assert_array_equal(renders.views[well_outside], 1)
    normals = (origins + distance[..., None] * directions) / 0.4
    np.testing.assert_allclose(renders.normals[well_inside], normals[well_inside], atol=0.02)
    np.testing.assert_allclose(renders.alphas.mean(), (discriminant > 0).mean(), rtol=0.01)


def test_depth_maps_are_the_depths_of_render():
    cameras = orbit([10.0, 100.0], elevation_deg=30, width=40)
    np.testing.assert_array_equal(depth_maps(cube(), cameras), render(cube(), cameras, supersample=1).depths)


def test_texture_is_upright_and_unmirrored():
    texture = np.zeros((4, 4, 3), np.float32)
    texture[:2, :2] = [1, 0, 0]  # top left
    texture[:2, 2:] = [0, 1, 0]  # top right
    texture[2:, :2] = [0, 0, 1]  # bottom left
    view = render(quad(texture), orbit([0.0], width=64, radius=1.5), supersample=1).views[0]
    np.testing.assert_allclose(view[20, 20], [1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(view[20, 43], [0, 1, 0], atol=1e-5)
    np.testing.assert_allclose(view[43, 20], [0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(view[43, 43], [0, 0, 0], atol=1e-5)


def test_bilinear_lookup_is_exact_at_texels_linear_between_and_repeats():
    texture = np.random.default_rng(1).uniform(size=(5, 7, 3)).astype(np.float32)
    rows, columns = np.meshgrid(np.arange(5), np.arange(7), indexing="ij")
    uvs = np.stack([(columns + 0.5) / 7, 1 - (rows + 0.5) / 5], axis=-1).reshape(-1, 2).astype(np.float32)
    np.testing.assert_allclose(sample_texture(texture, uvs), texture.reshape(-1, 3), atol=1e-5)
    np.testing.assert_allclose(sample_texture(texture, uvs + np.float32([2, -3])), texture.reshape(-1, 3), atol=1e-5)
    between = sample_texture(texture, (uvs[:1] + uvs[1:2]) / 2)
    np.testing.assert_allclose(between[0], (texture[0, 0] + texture[0, 1]) / 2, atol=1e-5)


def test_edge_pixels_mix_premultiplied_colour_over_white():
    black = quad(np.zeros((2, 2, 3), np.float32))
    renders = render(black, orbit([0.0], width=31, radius=1.37), supersample=4)
    partial = (renders.alphas > 0) & (renders.alphas < 1)
    assert partial.any()
    np.testing.assert_allclose(renders.views, np.repeat(1 - renders.alphas[..., None], 3, axis=-1), atol=1e-6)


def test_colour_falls_back_from_vertices_to_grey():
    mesh = cube()
    red = np.broadcast_to(np.float32([1, 0, 0]), mesh.vertices.shape).copy()
    centre = (0, 16, 16)
    camera = orbit([0.0], width=32)
    np.testing.assert_allclose(render(mesh, camera).views[centre], 0.7)
    coloured = Mesh(mesh.vertices, mesh.faces, colours=red)
    np.testing.assert_allclose(render(coloured, camera).views[centre], [1, 0, 0])


def test_soft_light_stands_still_in_the_world_and_lights_both_sides():
    mesh = quad(np.full((2, 2, 3), 0.5, np.float32))
    flipped = Mesh(mesh.vertices, mesh.faces[:, ::-1].copy(), uvs=mesh.uvs, texture=mesh.texture)
    front = orbit([0.0, 20.0], width=32)
    views = render(mesh, front, light="soft").views
    np.testing.assert_allclose(views[0, 16, 16], views[1, 16, 16], atol=1e-5)
    np.testing.assert_allclose(render(flipped, front, light="soft").views, views, atol=1e-5)
    expected = linear_to_srgb(srgb_to_linear(np.float32([0.5])) * soft_light(np.float32([[1, 0, 0]])))
    np.testing.assert_allclose(views[0, 16, 16], np.repeat(expected, 3), atol=1e-5)
    up, down = soft_light(np.float32([[0, 0, 1], [0, 0, -1]]))
    assert up > 1.5 * down


def test_srgb_transfer_is_its_own_inverse():
    values = np.linspace(0, 1, 101, dtype=np.float32)
    np.testing.assert_allclose(linear_to_srgb(srgb_to_linear(values)), values, atol=1e-5)


def test_creases_keep_a_cube_flat_and_a_sphere_smooth():
    box = cube()
    corners = creased_normals(box)
    assert np.abs(corners).max(axis=-1).min() > 0.999  # every corner normal is an axis
    ball = icosphere(3)
    radial = ball.vertices / 0.4
    np.testing.assert_allclose(creased_normals(ball), radial[ball.faces], atol=0.02)
    np.testing.assert_allclose(smooth_normals(ball), radial, atol=0.02)
    np.testing.assert_allclose(np.abs(smooth_normals(box)), 3**-0.5, atol=1e-5)


def test_a_mesh_around_the_camera_fills_the_image():
    inside = look_at([0.01, 0.0, 0.0])
    camera = orbit([0.0], width=16)
    camera = type(camera)(inside[None], camera.K, 16, 16)
    assert (render(cube(), camera).alphas == 1).all()


def test_what_cannot_be_drawn_is_said():
    mesh = cube()
    nan = mesh.vertices.copy()
    nan[3] = np.nan
    for bad, message in [
        (Mesh(nan, mesh.faces), "1 of 8 vertices"),
        (Mesh(mesh.vertices, mesh.faces[:0]), "0 faces"),
        (Mesh(mesh.vertices, mesh.faces + np.int32(4)), "vertex 11 of 8"),
        (Mesh(mesh.vertices, mesh.faces, texture=np.zeros((2, 2, 3), np.float32)), "no texture coordinates"),
    ]:
        with pytest.raises(MeshError, match=message):
            render(bad, orbit([0.0], width=8))
    with pytest.raises(MeshError, match="supersample 0"):
        render(mesh, orbit([0.0], width=8), supersample=0)
