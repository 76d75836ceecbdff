"""Pictures from strangers: what is read, what is refused, and how well the object is cut out."""

import contextlib
import os
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from hi3d_jax import images
from hi3d_jax.images import ImageError


def picture(height=24, width=32):
    """RGBA in [0, 255] with a different colour in each quarter and a transparent last column."""
    data = np.zeros((height, width, 4), np.uint8)
    data[: height // 2, : width // 2] = (200, 40, 30, 255)
    data[: height // 2, width // 2 :] = (30, 180, 60, 255)
    data[height // 2 :, : width // 2] = (20, 50, 210, 255)
    data[height // 2 :, width // 2 :] = (120, 120, 120, 255)
    data[:, -1, 3] = 0
    return data


def saved(path, mode="RGBA", **options):
    Image.fromarray(picture()).convert(mode).save(path, **options)
    return path


def disc(size=128, radius=40.3, colour=(0.1, 0.3, 0.2), background=(1.0, 1.0, 1.0), supersample=8):
    """An antialiased disc: its exact picture as RGBA with alpha 1, and its true alpha."""
    grid = (np.arange(size * supersample) + 0.5) / supersample - size / 2
    inside = (np.hypot(*np.meshgrid(grid, grid)) < radius).astype(np.float32)
    alpha = inside.reshape(size, supersample, size, supersample).mean((1, 3))[..., None]
    rgb = alpha * np.float32(colour) + (1 - alpha) * np.float32(background)
    return opaque(rgb), alpha[..., 0]


def opaque(rgb):
    return np.concatenate([rgb, np.ones_like(rgb[..., :1])], axis=-1).astype(np.float32)


WRITABLE_MODES = {
    ".png": ["RGBA", "RGB", "P", "LA", "L", "1"],
    ".jpg": ["RGB", "L", "CMYK", "YCbCr"],
    ".webp": ["RGBA", "RGB"],
    ".tif": ["RGBA", "RGB", "P", "LA", "L", "1", "CMYK", "YCbCr"],
    ".bmp": ["RGBA", "RGB", "P", "L", "1"],
    ".gif": ["RGBA", "RGB", "P", "L", "1"],
}


@pytest.mark.parametrize(("suffix", "mode"), [(s, mode) for s, modes in WRITABLE_MODES.items() for mode in modes])
def test_every_format_and_mode_is_read_as_rgba(tmp_path, suffix, mode):
    image = images.read_image(saved(tmp_path / f"picture{suffix}", mode))
    assert image.shape == (24, 32, 4)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1
    if mode in ("RGB", "CMYK", "YCbCr") and suffix != ".gif":
        np.testing.assert_allclose(image[4, 4, :3] * 255, (200, 40, 30), atol=12)
        assert (image[..., 3] == 1).all()
    if mode == "RGBA" and suffix in (".png", ".webp", ".tif"):
        assert (image[:, -1, 3] == 0).all()
        assert (image[:, :-1, 3] == 1).all()


def test_palette_transparency_becomes_alpha(tmp_path):
    indexed = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8)[:, None], 10, 1).repeat(4, 0)).convert("P")
    indexed.save(tmp_path / "p.png", transparency=2)
    alpha = images.read_image(tmp_path / "p.png")[..., 3]
    np.testing.assert_array_equal(alpha[:, 0], np.repeat([1, 1, 0, 1], 4))


@pytest.mark.parametrize(("name", "dtype", "scale"), [("a.png", np.uint16, 65535), ("a.tif", np.uint16, 65535)])
def test_sixteen_bit_grey_keeps_its_range(tmp_path, name, dtype, scale):
    ramp = np.linspace(0, 1, 160).reshape(10, 16)
    Image.fromarray((ramp * scale).astype(dtype)).save(tmp_path / name)
    image = images.read_image(tmp_path / name)
    np.testing.assert_allclose(image[..., 0], ramp, atol=2 / 65535)
    assert (image[..., 3] == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 255.0])
def test_float_pictures_outside_their_range_are_refused(tmp_path, bad):
    data = np.full((10, 10), 0.5, np.float32)
    Image.fromarray(data).save(tmp_path / "ok.tif")
    assert (images.read_image(tmp_path / "ok.tif")[..., :3] == 0.5).all()
    data[3, 3] = bad
    Image.fromarray(data).save(tmp_path / "bad.tif")
    with pytest.raises(ImageError, match="outside its range"):
        images.read_image(tmp_path / "bad.tif")


def test_exif_rotation_is_applied(tmp_path):
    upright = Image.fromarray(picture()).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view"
    upright.rotate(90, expand=True).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    image = images.read_image(tmp_path / "phone.jpg")
    assert image.shape == (24, 32, 4)
    np.testing.assert_allclose(image[4, 4, :3] * 255, (200, 40, 30), atol=12)


def png_with_header_only(path, width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in chunks:
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


@pytest.mark.parametrize("side", [20_000, 9_000, 60_000])
def test_huge_pictures_are_refused_before_a_pixel_is_decoded(tmp_path, side, monkeypatch):
    png_with_header_only(tmp_path / "bomb.png", side, side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"scale it down"):
        images.read_image(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match=r"scale it down"):
        images.read_size(tmp_path / "bomb.png")


def test_one_pixel_pictures_are_refused(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    with pytest.raises(ImageError, match=r"1 x 1 pixels.*larger image"):
        images.read_image(tmp_path / "dot.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.gif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused_in_one_line(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError) as caught:
        images.read_image(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    random = np.random.default_rng(1)
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tif"):
        saved(tmp_path / name, "RGB")
        good = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[random.integers(0, len(bad), 6)] = random.integers(0, 256, 6)
            (tmp_path / name).write_bytes(bad.tobytes())
            with contextlib.suppress(ImageError):
                assert np.isfinite(images.read_image(tmp_path / name)).all()


def test_moving_pictures_and_many_pages_are_refused(tmp_path):
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 90, 180)]
    for name in ("a.gif", "a.webp", "a.tif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match=r"3 frames or pages.*PNG"):
            images.read_image(tmp_path / name)


def test_what_is_no_picture_says_so(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    saved(tmp_path / "icon.ico")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        tmp_path / "text.png": "convert it to PNG",
        tmp_path / "empty.png": "is empty",
        tmp_path / "icon.ico": "convert it to PNG",
        tmp_path / "pipe.png": "no regular file",
        tmp_path / "missing.png": r"No such file.*check the path",
        tmp_path: "is a folder",
        "https://example.org/a.png": "download the file first",
    }
    for path, message in cases.items():
        with pytest.raises(ImageError, match=message):
            images.read_image(path)


def test_files_of_absurd_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    with pytest.raises(ImageError, match="more than 100"):
        images.read_image(saved(tmp_path / "a.png"))


def test_written_pictures_are_read_back(tmp_path):
    random = np.random.default_rng(2).random((9, 11, 4), np.float32)
    images.write_png(tmp_path / "a.png", random)
    np.testing.assert_allclose(images.read_image(tmp_path / "a.png"), random, atol=0.5 / 255 + 1e-6)
    images.write_png(tmp_path / "b.png", random[..., :1] * 3 - 1)
    grey = images.read_image(tmp_path / "b.png")
    np.testing.assert_allclose(grey[..., 1], np.clip(random[..., 0] * 3 - 1, 0, 1), atol=0.5 / 255 + 1e-6)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    images.write_png(path, np.zeros((8, 8, 3), np.float32))
    before = path.read_bytes()

    def full_disk(self, aside, **_):
        aside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        images.write_png(path, np.ones((8, 8, 3), np.float32))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_never_written(tmp_path):
    image = np.zeros((8, 8, 3), np.float32)
    image[0, 0, 0] = np.nan
    with pytest.raises(ImageError, match="NaN"):
        images.write_png(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_straight_alpha_inverts_over_white():
    random = np.random.default_rng(3).random((6, 7, 4), np.float32)
    random[0, 0, 3] = 0
    view = images.over_white(random)
    back = images.straight_alpha(view, random[..., 3])
    np.testing.assert_allclose(images.over_white(back), view, atol=1e-6)
    visible = random[..., 3] > 0.01
    np.testing.assert_allclose(back[visible], random[visible], atol=1e-4)


def test_resize_takes_exact_area_means_and_stays_in_range():
    random = np.random.default_rng(4).random((12, 20, 3), np.float32)
    expected = random.reshape(4, 3, 5, 4, 3).mean((1, 3))
    np.testing.assert_allclose(images.resize(random, 5, 4), expected, atol=1e-6)
    np.testing.assert_array_equal(images.resize(random, 20, 12), random)
    for size in ((33, 25), (7, 25), (33, 5), (1, 1)):
        resized = images.resize(random, *size)
        assert resized.shape == (size[1], size[0], 3)
        assert random.min() <= resized.min()
        assert resized.max() <= random.max()
    np.testing.assert_allclose(images.resize(np.full((7, 9, 1), 0.3, np.float32), 31, 4), 0.3, atol=1e-6)


def test_invisible_colour_does_not_bleed_when_resized():
    image = np.zeros((8, 8, 4), np.float32)
    image[:, :4] = (1, 0, 0, 1)
    image[:, 4:] = (0, 1, 0, 0)
    small = images.resize(image, 4, 4)
    np.testing.assert_allclose(small[:, :2], np.broadcast_to(np.float32([1, 0, 0, 1]), (4, 2, 4)), atol=1e-6)
    odd = images.resize(image, 3, 3)
    np.testing.assert_allclose(odd[:, 1], np.broadcast_to(np.float32([1, 0, 0, 0.5]), (3, 4)), atol=1e-6)


@pytest.mark.parametrize(("size", "ratio"), [(64, 0.5), (200, 0.9), (64, 1.0)])
def test_recentre_frames_the_object(size, ratio):
    image = np.zeros((100, 150, 4), np.float32)
    image[10:50, 100:120] = (0.2, 0.4, 0.6, 1)
    framed = images.recentre(image, size, ratio)
    assert framed.shape == (size, size, 4)
    rows, columns = (np.flatnonzero((framed[..., 3] > 0.5).any(axis)) for axis in (1, 0))
    assert len(rows) == pytest.approx(ratio * size, abs=1.5)
    assert len(columns) == pytest.approx(ratio * size / 2, abs=1.5)
    assert abs(rows.mean() + 0.5 - size / 2) <= 1
    assert abs(columns.mean() + 0.5 - size / 2) <= 1
    np.testing.assert_allclose(framed[size // 2, size // 2], (0.2, 0.4, 0.6, 1), atol=1e-5)


def test_recentre_refuses_what_cannot_be_framed():
    with pytest.raises(ImageError, match="no object"):
        images.recentre(np.zeros((8, 8, 4), np.float32), 32, 0.8)
    with pytest.raises(ImageError, match="ratio"):
        images.recentre(np.ones((8, 8, 4), np.float32), 32, 1.5)


@pytest.mark.parametrize("background", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.1, 0.2, 0.9), (0.5, 0.5, 0.5)])
def test_keyed_edges_are_soft_and_carry_no_halo(background):
    colour = (0.7, 0.3, 0.2)
    image, alpha = disc(colour=colour, background=background)
    cut = images.matte(image)
    assert np.abs(cut[..., 3] - alpha).mean() < 2e-4
    assert np.abs(cut[..., 3] - alpha).max() < 0.06
    edge = (cut[..., 3] > 0.1) & (cut[..., 3] < 0.9)
    assert edge.sum() > 100
    np.testing.assert_allclose(cut[edge][:, :3], np.broadcast_to(np.float32(colour), (edge.sum(), 3)), atol=0.02)


def test_keying_white_and_compositing_over_white_changes_nothing_seen():
    image, _ = disc()
    np.testing.assert_allclose(images.over_white(images.matte(image)), image[..., :3], atol=4.5 / 255)


def test_white_parts_stay_and_gaps_go():
    image, alpha = disc(size=256, radius=100)
    y, x = np.mgrid[:256, :256] - 127.5
    highlight = np.clip(1.5 - np.hypot(y + 40, x) / 20, 0, 1)[..., None]  # fades into the dark like shading
    image[..., :3] += (1 - image[..., :3]) * highlight
    gap = np.clip(15.5 - np.hypot(y - 40, x), 0, 1)
    image[..., :3] += (1 - image[..., :3]) * gap[..., None]
    cut = images.matte(image)[..., 3]
    expected = alpha * (1 - gap)
    assert np.abs(cut - expected).mean() < 2e-3
    assert cut[87, 127] == 1
    assert cut[167, 127] == 0


def test_lossy_noise_leaves_no_specks():
    image, alpha = disc(size=256, radius=80)
    random = np.random.default_rng(5)
    ring = np.abs(np.hypot(*(np.mgrid[:256, :256] - 127.5)) - 86) < 5
    noise = random.normal(0, 1.5 / 255, (256, 256, 1)) + ring[..., None] * random.normal(0, 3 / 255, (256, 256, 1))
    image[..., :3] = np.clip(image[..., :3] + noise, 0, 1)
    image[20, 30, :3] = 0  # one dead pixel
    cut = images.matte(image)[..., 3]
    assert (cut[np.hypot(*(np.mgrid[:256, :256] - 127.5)) > 92] == 0).all()
    inside, truth = cut > 0.5, alpha > 0.5
    assert (inside & truth).sum() / (inside | truth).sum() > 0.985
    assert (cut[truth] > 0.5).mean() > 0.999


def test_an_object_that_leaves_the_frame_is_still_keyed():
    image, alpha = disc(size=128, radius=50)
    image, alpha = image[:80], alpha[:80]
    assert np.abs(images.matte(image)[..., 3] - alpha).mean() < 1e-3


def test_thin_parts_survive():
    image = opaque(np.ones((128, 128, 3), np.float32))
    image[20:100, 64, :3] = 0.1
    image[60:100, 30:100, :3] = 0.3
    assert (images.matte(image)[20:100, 64, 3] > 0.95).all()


def test_alpha_of_the_file_comes_first():
    image, alpha = disc()
    image[..., 3] = alpha
    np.testing.assert_array_equal(images.matte(image), image)
    np.testing.assert_array_equal(images.matte(image, "alpha"), image)
    with pytest.raises(ImageError, match=r"no transparent background.*'key'"):
        images.matte(disc()[0], "alpha")


def test_a_busy_background_asks_for_the_extra(monkeypatch):
    image = opaque(np.random.default_rng(6).random((64, 64, 3), np.float32))
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ImageError, match=r"pip install 'hi3d_jax\[matting\]'"):
        images.matte(image)
    with pytest.raises(ImageError, match="not of one plain colour"):
        images.matte(image, "key")


def test_rembg_is_used_where_it_is_installed(monkeypatch):
    def remove(picture):
        cut = np.asarray(picture.convert("RGBA")).copy()
        cut[:, 20:, 3] = 0
        return Image.fromarray(cut)

    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(remove=remove))
    image = opaque(np.random.default_rng(7).random((64, 64, 3), np.float32))
    cut = images.matte(image)
    np.testing.assert_allclose(cut[..., :3], image[..., :3], atol=0.5 / 255 + 1e-6)
    assert (cut[:, 20:, 3] == 0).all()


def test_nothing_to_see_and_nothing_around_it_are_errors():
    with pytest.raises(ImageError, match="no object was found"):
        images.matte(opaque(np.ones((64, 64, 3), np.float32)))
    with pytest.raises(ImageError, match="no object was found"):
        images.matte(np.zeros((64, 64, 4), np.float32))
    with pytest.raises(ImageError, match="no object was found"):
        images.matte(opaque(np.full((64, 64, 3), 0.4, np.float32)), "key")


def test_real_pictures_are_keyed_nearly_as_their_alpha_says(shared):
    scores = []
    for path in sorted((shared / "images").glob("*.png")):
        truth = images.resize(images.read_image(path), 384, 384)
        white = np.round(images.over_white(truth) * 255) / 255
        mask, expected = images.matte(opaque(white), "key")[..., 3] > 0.5, truth[..., 3] > 0.5
        scores.append((mask & expected).sum() / (mask | expected).sum())
    # Measured at full size: mean .996, lowest .988 (a horse with white legs).
    assert np.mean(scores) > 0.99
    assert np.min(scores) > 0.98


def test_contact_sheet_places_every_picture():
    tiles = [np.full((40, 60, 3), shade, np.float32) for shade in (0.0, 0.2, 0.4, 0.6, 0.8)]
    plain = images.contact_sheet(tiles, columns=3)
    sheet = images.contact_sheet(tiles, columns=3, labels=list("abcde"))
    assert sheet.shape[0] > plain.shape[0]
    for tile in tiles[1:]:
        assert (np.abs(plain - tile[0, 0]).max(-1) < 1 / 255).sum() == 40 * 60
    with pytest.raises(ImageError, match="one size"):
        images.contact_sheet([*tiles, np.zeros((8, 8, 3), np.float32)], columns=3)
