import logging

import numpy as np
import pytest
import trimesh

from hi3d_jax.cameras import orbit
from hi3d_jax.mesh import (
    Mesh,
    MeshError,
    bake_texture,
    clean,
    is_watertight,
    paint_texture,
    render,
    unwrap,
)
from hi3d_jax.mesh.texture import texels_of
from hi3d_jax.mesh.topology import component_of_faces
from hi3d_jax.mesh.triangles import face_normals
from hi3d_jax.mesh.unwrap import pieces_of_faces, project_unwrap

CAMERAS = orbit(elevation_deg=20.0, width=128)


def bumpy_ball(subdivisions=4):
    ball = trimesh.creation.icosphere(subdivisions)
    radius = 0.36 + 0.05 * np.sin(6 * ball.vertices[:, :1]) * np.cos(5 * ball.vertices[:, 2:])
    return Mesh((ball.vertices * radius).astype(np.float32), ball.faces.astype(np.int32))


def rainbow(points):
    return (0.5 + 0.4 * np.sin(points * np.float32([9, 7, 11]) + np.float32([0, 1, 2]))).astype(np.float32)


@pytest.fixture(scope="module")
def unwrapped():
    return unwrap(bumpy_ball(), 256)


def uv_areas(mesh):
    a, b, c = mesh.uvs[mesh.faces].astype(np.float64).transpose(1, 0, 2)
    return np.abs(np.cross(np.pad(b - a, ((0, 0), (0, 1))), np.pad(c - a, ((0, 0), (0, 1))))[:, 2]) / 2


@pytest.mark.parametrize("method", ["xatlas", "projection"])
def test_unwrapping_keeps_the_body_and_gives_every_face_texels_of_its_own(unwrapped, method):
    mesh = unwrapped if method == "xatlas" else project_unwrap(bumpy_ball(), 256, 4)
    assert len(mesh.faces) == len(bumpy_ball().faces)
    assert is_watertight(mesh)
    assert mesh.uvs.min() >= 0
    assert mesh.uvs.max() <= 1
    areas = uv_areas(mesh)
    assert (areas > 0).all()
    # Charts do not overlap: the texels covered are as many as the faces' areas in the texture add up to.
    assert len(texels_of(mesh, 256).index) == pytest.approx(areas.sum() * 256**2, rel=0.03)
    density = areas / face_normals(mesh)[1]
    assert density.max() / density.min() < 8


def test_charts_keep_their_distance(unwrapped):
    texels = texels_of(unwrapped, 256)
    chart = np.full(256 * 256, -1)
    chart[texels.index] = component_of_faces(unwrapped.faces)[texels.face]
    chart = chart.reshape(256, 256)
    for shift in (1, 2):
        for one, other in ((chart[:, :-shift], chart[:, shift:]), (chart[:-shift], chart[shift:])):
            assert not ((one != other) & (one >= 0) & (other >= 0)).any()


def test_xatlas_that_takes_too_long_is_stopped_and_replaced(caplog):
    with caplog.at_level(logging.WARNING):
        mesh = unwrap(bumpy_ball(2), 128, time_limit_s=1e-3)
    assert "needs more than 0.001 s for 320 faces" in caplog.text
    assert is_watertight(mesh)
    assert mesh.uvs is not None


def test_pieces_are_bounded_and_cover_all_faces():
    piece = pieces_of_faces(bumpy_ball(), 700)
    counts = np.bincount(piece)
    assert counts.sum() == 5120
    assert counts.max() <= 700
    assert counts.min() > 300


def test_painted_texture_shows_the_function_on_the_surface(unwrapped):
    mesh = paint_texture(unwrapped, rainbow, 256)
    renders = render(mesh, CAMERAS, supersample=1)
    coloured = Mesh(unwrapped.vertices, unwrapped.faces, colours=rainbow(unwrapped.vertices))
    expected = render(coloured, CAMERAS, supersample=1)
    assert np.abs(renders.views - expected.views).mean(where=renders.alphas[..., None] > 0) < 0.01


def test_texels_carry_barycentric_places_inside_their_faces(unwrapped):
    texels = texels_of(unwrapped, 128)
    assert texels.barycentric.min() > -1e-3
    uvs = np.einsum("nkc,nk->nc", unwrapped.uvs[unwrapped.faces[texels.face]], texels.barycentric)
    row, column = np.divmod(texels.index, 128)
    np.testing.assert_allclose(uvs, np.stack([(column + 0.5) / 128, 1 - (row + 0.5) / 128], axis=1), atol=1e-4)


def test_baking_true_views_gives_them_back_and_new_ones(unwrapped):
    truth = paint_texture(unwrapped, rainbow, 512)
    shown = render(truth, CAMERAS)
    baked = bake_texture(unwrapped, shown.views, shown.alphas, CAMERAS, 256)
    between = orbit(np.arange(4.0) * 90 + 11.25, elevation_deg=25.0, width=128)
    for cameras in (CAMERAS, between):
        error = render(baked, cameras).views - render(truth, cameras).views
        assert -10 * np.log10((error**2).mean()) > 35


def test_unseen_parts_take_smooth_colours_of_the_surface_around_them(unwrapped):
    """Seen from one side only, red above, blue below: the far side must show those, and nothing else."""

    def two_halves(points):
        return np.where(points[:, 2:] > 0, np.float32([[1, 0, 0]]), np.float32([[0, 0, 1]])).astype(np.float32)

    front = orbit([0.0], width=128)
    shown = render(paint_texture(unwrapped, two_halves, 256), front)
    baked = bake_texture(unwrapped, shown.views, shown.alphas, front, 256)
    back = render(baked, orbit([180.0], width=128), supersample=1)
    colours = back.views[back.alphas > 0]
    assert colours[:, 1].max() < 0.12
    np.testing.assert_allclose(colours[:, 0] + colours[:, 2], 1, atol=0.15)
    rows = np.argwhere(back.alphas[0] > 0)[:, 0]
    assert colours[rows < rows.mean() - 15, 0].mean() > colours[rows > rows.mean() + 15, 0].mean() + 0.2
    assert (
        np.abs(np.diff(back.views[0], axis=1))[(back.alphas[0, :, 1:] > 0) & (back.alphas[0, :, :-1] > 0)].max() < 0.1
    )


def test_halos_of_white_and_soft_edges_do_not_reach_the_texture(unwrapped):
    dark = paint_texture(unwrapped, lambda points: np.full((len(points), 3), 0.1, np.float32), 128)
    shown = render(dark, CAMERAS)
    baked = bake_texture(unwrapped, shown.views, shown.alphas, CAMERAS, 256)
    np.testing.assert_allclose(baked.texture, 0.1, atol=0.01)


def test_hidden_surfaces_do_not_take_the_colour_of_what_hides_them():
    """A small red ball before a large green one: no red on the green."""
    near = trimesh.creation.icosphere(3, 0.1)
    near.apply_translation([0.42, 0, 0])
    far = trimesh.creation.icosphere(3, 0.28)
    both = trimesh.util.concatenate([near, far])
    mesh = unwrap(Mesh(both.vertices.astype(np.float32), both.faces.astype(np.int32)), 256)

    def red_or_green(points):
        return np.where(points[:, :1] > 0.3, np.float32([[1, 0, 0]]), np.float32([[0, 1, 0]])).astype(np.float32)

    shown = render(paint_texture(mesh, red_or_green, 256), CAMERAS)
    baked = bake_texture(mesh, shown.views, shown.alphas, CAMERAS, 256)
    texels = texels_of(mesh, 256)
    x = np.einsum("nk,nk->n", mesh.vertices[mesh.faces[texels.face]][..., 0], texels.barycentric)
    colours = baked.texture.reshape(-1, 3)[texels.index]
    assert colours[x < 0.25, 0].max() < 0.3
    assert colours[x < 0.25, 0].mean() < 0.01


def test_no_texel_stays_empty(unwrapped):
    white = paint_texture(unwrapped, lambda points: np.ones((len(points), 3), np.float32), 128)
    np.testing.assert_array_equal(white.texture, 1)


def test_bad_input_is_an_error(unwrapped):
    views, alphas = np.ones((16, 128, 128, 3), np.float32), np.ones((16, 128, 128), np.float32)
    with pytest.raises(MeshError, match="unwrap it first"):
        bake_texture(bumpy_ball(1), views, alphas, CAMERAS, 64)
    with pytest.raises(MeshError, match="do not belong together"):
        bake_texture(unwrapped, views[:3], alphas[:3], CAMERAS, 64)
    with pytest.raises(MeshError, match="no view sees"):
        bake_texture(unwrapped, views, 0 * alphas, CAMERAS, 64)
    with pytest.raises(MeshError, match="texture size 7"):
        unwrap(clean(bumpy_ball(1)), 7)
