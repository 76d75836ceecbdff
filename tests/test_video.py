"""Orbits in and out of files: what comes back equal, and every way in which a file can be wrong."""

import dataclasses
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hi3d_jax import cameras, images, video
from hi3d_jax.cameras import CameraError
from hi3d_jax.images import ImageError
from hi3d_jax.video import Orbit, OrbitError


def a_ball(count=16, size=64, elevation_deg=10.0) -> Orbit:
    """A ball off the axis as an orbit sees it: soft edges, half of it red and half blue."""
    rig = cameras.orbit(np.arange(count) * 360 / count, elevation_deg, width=size)
    at, depth = cameras.project(np.array([[0.2, 0.1, 0.05]], np.float32), rig)
    y, x = np.mgrid[:size, :size] + 0.5
    radius = 0.3 * rig.K[:, 0, 0] / depth[:, 0]
    away = np.hypot(x - at[:, 0, 0, None, None], y - at[:, 0, 1, None, None])
    alphas = np.clip(radius[:, None, None] - away + 0.5, 0, 1).astype(np.float32)
    colour = np.where((x < at[:, 0, 0, None, None])[..., None], (0.8, 0.1, 0.1), (0.1, 0.2, 0.7))
    views = (colour * alphas[..., None] + 1 - alphas[..., None]).astype(np.float32)
    return Orbit(views, alphas, rig)


@pytest.fixture(scope="module")
def ball() -> Orbit:
    return a_ball()


@pytest.fixture
def folder(tmp_path, ball):
    """A written orbit whose files a test may spoil."""
    video.write_orbit(tmp_path / "orbit", ball)
    return tmp_path / "orbit"


def changed(folder, change):
    """Applies `change` to the parsed cameras.json of `folder`."""
    document = json.loads((folder / "cameras.json").read_text())
    change(document)
    (folder / "cameras.json").write_text(json.dumps(document))


def refused(path, message, error=OrbitError, **options):
    with pytest.raises(error, match=message) as caught:
        video.read_orbit(path, **options)
    assert "\n" not in str(caught.value)


def overlap(a, b):
    return ((a > 0.5) & (b > 0.5)).sum() / ((a > 0.5) | (b > 0.5)).sum()


def test_a_written_orbit_is_read_back(folder, ball):
    read = video.read_orbit(folder)
    np.testing.assert_allclose(read.views, ball.views, atol=1.01 / 255)
    np.testing.assert_allclose(read.alphas, ball.alphas, atol=0.51 / 255)
    np.testing.assert_allclose(read.cameras.c2w, ball.cameras.c2w, atol=1e-6)
    np.testing.assert_allclose(read.cameras.K, ball.cameras.K, rtol=1e-6)
    assert len(read) == 16
    again = video.read_orbit(folder / "cameras.json")
    np.testing.assert_array_equal(again.views, read.views)


@pytest.mark.parametrize("size", [64, 63])
def test_an_mp4_is_keyed_and_gets_orbit_cameras(tmp_path, size):
    ball = a_ball(size=size)
    video.write_mp4(tmp_path / "orbit.mp4", ball.views)
    read = video.read_orbit(tmp_path / "orbit.mp4", elevation_deg=10.0)
    even = size + size % 2
    assert read.views.shape == (16, even, even, 3)
    assert overlap(read.alphas[:, :size, :size], ball.alphas) > 0.95
    assert np.abs(read.views[:, :size, :size] - ball.views).mean() < 0.02
    expected = cameras.orbit(elevation_deg=10.0, width=even)
    np.testing.assert_allclose(read.cameras.c2w, expected.c2w, atol=1e-6)
    assert list(tmp_path.iterdir()) == [tmp_path / "orbit.mp4"]


def test_colours_survive_the_video(tmp_path):
    """Guards the colour matrix: an untagged one shifts greens by several levels."""
    flat = np.broadcast_to(np.float32([0.2, 0.7, 0.3]), (4, 64, 64, 3))
    video.write_mp4(tmp_path / "flat.mp4", flat)
    read = video.read_frames(tmp_path / "flat.mp4")
    np.testing.assert_allclose(read[..., :3], flat, atol=3 / 255)
    assert (read[..., 3] == 1).all()


@pytest.mark.parametrize("name", ["orbit.gif", "orbit.webp", "orbit.png"])
def test_animated_pictures_are_orbits(tmp_path, name, ball):
    if name == "orbit.gif":
        video.write_gif(tmp_path / name, ball.views)
    else:
        first, *rest = (Image.fromarray(view) for view in images.to_bytes(ball.views))
        first.save(tmp_path / name, save_all=True, append_images=rest, lossless=True)
    read = video.read_orbit(tmp_path / name)
    assert overlap(read.alphas, ball.alphas) > 0.97
    assert np.abs(read.views - ball.views).mean() < 0.03


def test_a_folder_of_pictures_is_read_in_the_order_of_its_numbers(tmp_path, ball):
    for index in range(16):
        images.write_png(tmp_path / f"view_{index + 1}.png", ball.views[index])
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_text("not a picture")
    read = video.read_orbit(tmp_path, radius=2.0, fov_deg=40.0)
    assert np.abs(read.views - ball.views).max() < 5 / 255
    np.testing.assert_allclose(np.linalg.norm(read.cameras.centres, axis=1), 2, rtol=1e-6)


def test_the_number_of_views_must_be_the_one_expected(tmp_path):
    video.write_mp4(tmp_path / "twelve.mp4", a_ball(12).views)
    refused(tmp_path / "twelve.mp4", "holds 12 views, not 16.*--num-views 12")
    read = video.read_orbit(tmp_path / "twelve.mp4", num_views=12)
    np.testing.assert_allclose(cameras.azimuths_deg(read.cameras), np.arange(12) * 30, atol=1e-4)


def test_a_camera_folder_may_hold_any_number_of_any_cameras(tmp_path, ball):
    chosen = np.array([3, 9, 4])
    part = Orbit(ball.views[chosen], ball.alphas[chosen], ball.cameras[chosen])
    video.write_orbit(tmp_path, part)
    np.testing.assert_allclose(video.read_orbit(tmp_path).cameras.c2w, part.cameras.c2w, atol=1e-6)


def test_y_up_worlds_are_turned(folder, ball):
    def to_y_up(document):
        for frame in document["frames"]:
            matrix = np.array(frame["transform_matrix"])
            frame["transform_matrix"] = np.stack([matrix[0], matrix[2], -matrix[1], matrix[3]]).tolist()

    changed(folder, to_y_up)
    np.testing.assert_allclose(video.read_orbit(folder, up="y").cameras.c2w, ball.cameras.c2w, atol=1e-6)
    assert np.abs(video.read_orbit(folder).cameras.c2w - ball.cameras.c2w).max() > 0.5


def test_blenders_layout_is_read(folder, ball):
    """No w and h, a shared angle, and paths without a suffix."""

    def to_blender(document):
        focal = document["frames"][0]["fl_x"]
        frames = document["frames"]
        document.clear()
        document |= {"camera_angle_x": 2 * np.arctan(32 / focal), "frames": frames}
        for frame in frames:
            frame["file_path"] = "./" + frame["file_path"].removesuffix(".png")
            for name in ("fl_x", "fl_y", "cx", "cy"):
                del frame[name]

    changed(folder, to_blender)
    (folder / "cameras.json").rename(folder / "transforms.json")
    np.testing.assert_allclose(video.read_orbit(folder).cameras.K, ball.cameras.K, rtol=1e-5)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "views/../../outside.png", "link.png", ""])
def test_cameras_cannot_name_pictures_outside_their_folder(folder, name):
    images.write_png(folder.parent / "outside.png", np.zeros((64, 64, 3), np.float32))
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    changed(folder, lambda document: document["frames"][5].update(file_path=name))
    refused(folder, "must lead to a file inside")


def test_missing_and_damaged_views_are_named(folder):
    path = folder / "views/007.png"
    path.write_bytes(path.read_bytes()[:60])
    refused(folder, r"007\.png is truncated", ImageError)
    path.unlink()
    refused(folder, r"007\.png cannot be read", ImageError)


def test_mixed_sizes_are_refused(folder):
    images.write_png(folder / "views/003.png", np.zeros((64, 60, 4), np.float32))
    refused(folder, r"003\.png is 60 x 64 pixels and the first view 64 x 64")
    refused(folder / "views", r"003\.png is 60 x 64 pixels and the first view 64 x 64")


def test_sizes_that_cameras_do_not_mean_are_refused(folder):
    changed(folder, lambda document: document.update(w=128))
    refused(folder, "images of 128 x 64 pixels, but they have 64 x 64")


def spoiled(folder, view, change):
    path = folder / f"views/{view:03d}.png"
    image = images.read_image(path)
    change(image)
    images.write_png(path, image)


def test_views_that_show_nothing_or_only_object_are_named(folder):
    def empty(image):
        image[..., 3] = 0

    def blank(image):
        image[...] = 1

    def full(image):
        image[..., :3] = np.random.default_rng(0).random((*image.shape[:2], 3))
        image[..., 3] = 1

    for change, message in ((empty, "no object"), (blank, "no object"), (full, "not of one plain colour")):
        spoiled(folder, 4, change)
        refused(folder, f"^view 4: .*{message}")
    refused(folder, r"^view 4: .*no transparent background", matting="alpha")


def test_pictures_that_must_be_keyed_although_they_have_alpha(folder, ball):
    def tint(image):
        image[...] = np.concatenate([images.over_white(image), image[..., 3:] * 0 + 1], axis=-1)
        image[0, 0, 3] = 0

    for view in range(16):
        spoiled(folder, view, tint)
    assert overlap(video.read_orbit(folder, matting="key").alphas, ball.alphas) > 0.98


def nan_position(document):
    document["frames"][2]["transform_matrix"][0][3] = float("nan")


def scaled_rotation(document):
    for row in document["frames"][2]["transform_matrix"][:3]:
        row[0] *= 3


@pytest.mark.parametrize(
    ("change", "message"), [(nan_position, "view 2.*NaN"), (scaled_rotation, "view 2.*orthonormal")]
)
def test_cameras_that_are_none_are_refused_before_pictures_are_read(folder, change, message):
    changed(folder, change)
    (folder / "views/000.png").write_bytes(b"not reached")
    refused(folder, message, CameraError)


def test_truncated_videos_are_refused(tmp_path, ball):
    video.write_mp4(tmp_path / "whole.mp4", ball.views)
    data = (tmp_path / "whole.mp4").read_bytes()
    for share in (0.02, 0.3, 0.7, 0.95):
        (tmp_path / "cut.mp4").write_bytes(data[: int(share * len(data))])
        refused(tmp_path / "cut.mp4", "truncated, damaged or no video")


@pytest.mark.parametrize("content", [b"hello", b"#EXTM3U\n/etc/passwd\n", b"ffconcat version 1.0\nfile 'whole.mp4'\n"])
def test_files_that_only_call_themselves_video_open_nothing_else(tmp_path, content, ball):
    video.write_mp4(tmp_path / "whole.mp4", ball.views)
    (tmp_path / "fake.mp4").write_bytes(content)
    refused(tmp_path / "fake.mp4", "truncated, damaged or no video")


def test_names_that_look_like_options_or_protocols_are_only_names(tmp_path, ball, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "concat:a|b.mp4"):
        video.write_mp4(name, ball.views[:2])
        assert video.read_frames(name).shape == (2, 64, 64, 4)


def test_huge_video_frames_are_refused_by_the_decoder(tmp_path, ball, monkeypatch):
    video.write_mp4(tmp_path / "a.mp4", ball.views)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    refused(tmp_path / "a.mp4", "more than 0 million pixels; scale it down")


def test_too_many_pixels_in_total_are_refused(tmp_path, ball, folder, monkeypatch):
    video.write_mp4(tmp_path / "a.mp4", ball.views)
    video.write_gif(tmp_path / "a.gif", ball.views)
    monkeypatch.setattr(video, "MAX_TOTAL_PIXELS", 10 * 64 * 64)
    refused(tmp_path / "a.mp4", "fewer or smaller views")
    refused(tmp_path / "a.gif", "fewer or smaller views")
    refused(folder, "fewer or smaller views")


def test_huge_pictures_of_a_folder_are_refused_before_decoding(folder):
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 20_000, 20_000, 8, 6, 0, 0, 0), b"IDAT": zlib.compress(bytes(100))}
    with (folder / "views/001.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in chunks.items():
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    refused(folder, r"001\.png.*scale it down", ImageError)


def test_one_pixel_views_are_refused(tmp_path):
    for index in range(16):
        Image.new("RGB", (1, 1)).save(tmp_path / f"{index}.png")
    refused(tmp_path, "1 x 1 pixels", ImageError)


def test_what_is_no_orbit_at_all_says_what_would_be(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mesh.glb").write_bytes(b"glTF")
    (tmp_path / "zero.mp4").touch()
    refused(tmp_path / "empty", "holds no pictures")
    refused(tmp_path / "mesh.glb", "no orbit that can be read")
    refused(tmp_path / "zero.mp4", "is empty", ImageError)
    refused(tmp_path / "missing.mp4", "cannot be read: No such file", ImageError)
    (tmp_path / "words.gif").write_text("GIF89a, but no more")
    refused(tmp_path / "words.gif", "truncated or damaged|convert it", ImageError)
    refused("https://example.org/orbit.mp4", "download the file first", ImageError)


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, ball):
    with pytest.raises(OrbitError, match="cannot be written"):
        video.write_mp4(tmp_path / "missing/a.mp4", ball.views)
    (tmp_path / "old.mp4").write_bytes(b"old")
    spoiled = dataclasses.replace(ball, views=np.where(ball.views > 0.9, np.float32(np.nan), ball.views))
    with pytest.raises(ImageError, match="NaN"):
        video.write_mp4(tmp_path / "old.mp4", spoiled.views)
    assert os.listdir(tmp_path) == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"old"


def test_the_released_models_orbit_is_cut_out(shared):
    orbit = video.read_orbit(shared / "orbits/hi3d_demo_0/orbit.mp4")
    assert orbit.views.shape == (16, 512, 512, 3)
    share = (orbit.alphas > 0.5).mean((1, 2))
    assert (share > 0.2).all()
    assert (share < 0.36).all()
    assert (orbit.alphas[:, :20] == 0).all()
    unkeyed = video.read_frames(shared / "orbits/hi3d_demo_0/orbit.mp4")
    assert np.abs(orbit.views - unkeyed[..., :3]).mean() < 0.006


def test_a_y_up_scene_with_alpha_is_read(shared):
    orbit = video.read_orbit(shared / "scene_a", up="y")
    expected = cameras.orbit(cameras.azimuths_deg(orbit.cameras), 20.0)
    np.testing.assert_allclose(orbit.cameras.c2w, expected.c2w, atol=1e-5)
