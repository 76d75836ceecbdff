"""Single images: reading files nobody vouches for, matting, framing, resizing, writing.

Inside the program an image is float32 in [0, 1], sRGB, channels last; four channels mean straight (not premultiplied)
alpha. Embedded colour profiles are ignored: the stored numbers are taken for sRGB. Matting is the first arrow of Hi3D
(the released code calls rembg and pastes on white; HI3D.md section 2). Here alpha in the file comes first, a plain
background is keyed, and rembg is the last resort.
"""

from __future__ import annotations

import contextlib
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage

from hi3d_jax.atomic import written_aside

MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 256 * 2**20
MIN_SIDE = 8
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")

Matting = Literal["auto", "alpha", "key", "rembg"]

# Keying, distances as the largest difference of a channel. H.264 leaves a plain background noisy by about 4/255 and
# rings up to 16/255 around dark silhouettes (measured on the released model's mp4); a PNG has neither.
CLEAN_TOLERANCE = 4 / 255
NOISY_TOLERANCE = 14 / 255
PLAIN_BORDER_SHARE = 0.6
# Shares of the image's area: specks that are not part of the object, and gaps through which one sees the background.
SPECK_AREA = 1e-4
GAP_AREA = 2e-4
GAP_CONTRAST = 0.15


class ImageError(ValueError):
    """An image that cannot be used; the text names the file or value and the remedy."""


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Float[np.ndarray, "h w 4"]:
    """Reads a still PNG, JPEG, WebP, TIFF, BMP or GIF as RGBA in [0, 1]; alpha is 1 where the file has none.

    Any colour mode (palette, grey, 16 bit grey, CMYK ...) is converted, and EXIF rotation is applied. The size is
    taken from the header and checked before a pixel is decoded. Raises `ImageError` for files that are missing, too
    large, too small, truncated, animated or of another format.
    """
    path = Path(path)
    check_file(path)
    with opened(path, max_pixels) as file:
        frames = getattr(file, "n_frames", 1)
        # Phones append previews to their JPEGs (MPO): those are stills.
        if frames > 1 and file.format not in ("JPEG", "MPO"):
            raise ImageError(
                f"{path} holds {frames} frames or pages where one image is wanted; save one of them as PNG"
            )
        return to_array(ImageOps.exif_transpose(file), path)


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height from the header of an image file, before any rotation by EXIF. Raises `ImageError`."""
    check_file(Path(path))
    with opened(Path(path)) as file:
        return file.size


@contextlib.contextmanager
def opened(path: Path, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """An image file, header read and size checked, nothing decoded yet; what Pillow raises becomes `ImageError`."""
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and, from 89 megapixels, of bombs; the check below is stricter.
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=formats) as file:
                check_size(file.size, path, max_pixels)
                yield file
        except (ImageError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"{path} is too large: {error}; scale it down first") from error
        except Image.UnidentifiedImageError as error:
            raise ImageError(f"{path} is not a {', '.join(formats)} image; convert it to PNG") from error
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            if isinstance(error, OSError) and error.strerror:
                raise ImageError(f"{path} cannot be read: {error.strerror}; check the path and permissions") from error
            raise ImageError(f"{path} is truncated or damaged ({error}); export it again") from error


def check_file(path: Path) -> None:
    """Raises `ImageError` unless `path` is a regular file of a sensible size."""
    if str(path).startswith(("http:/", "https:/")):
        raise ImageError(f"{path} is a web address; download the file first and give its path")
    try:
        status = path.stat()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}; check the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; give the path of a file")
    if status.st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes); export it again")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError(f"{path} has {status.st_size} bytes, more than {MAX_FILE_BYTES}; compress or scale it down")


def check_size(size: tuple[int, int], path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
    """Raises `ImageError` unless `size` (width, height) is one this program works with."""
    width, height = size
    if width * height > max_pixels:
        raise ImageError(f"{path} is {width} x {height} pixels, more than {max_pixels / 1e6:g} million; scale it down")
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{path} is {width} x {height} pixels; sides below {MIN_SIDE} show no object, use a larger image"
        )


def to_array(image: Image.Image, path: str | Path) -> Float[np.ndarray, "h w 4"]:
    """A Pillow image of any mode as float32 RGBA in [0, 1]. `path` only names it in errors."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey = np.asarray(image, np.float32) / (1 if image.mode == "F" else 65535)
        if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1):
            raise ImageError(f"{path} holds numbers outside its range (16 bit, or 0 to 1); save it as 8 or 16 bit PNG")
        return np.stack([grey, grey, grey, np.ones_like(grey)], axis=-1)
    return np.asarray(image.convert("RGBA"), np.float32) / 255


def over_white(image: Float[np.ndarray, "h w 4"]) -> Float[np.ndarray, "h w 3"]:
    """The image composited over white, in sRGB values as the released code does."""
    return image[..., :3] * image[..., 3:] + (1 - image[..., 3:])


def straight_alpha(view: Float[np.ndarray, "h w 3"], alpha: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 4"]:
    """The inverse of `over_white`: the object's own colour and its alpha; white where nothing is."""
    alpha = alpha[..., None]
    colour = np.where(alpha > 0, (view - (1 - alpha)) / np.maximum(alpha, 1e-6), 1)
    return np.concatenate([np.clip(colour, 0, 1), alpha], axis=-1).astype(np.float32)


def matte(image: Float[np.ndarray, "h w 4"], method: Matting = "auto") -> Float[np.ndarray, "h w 4"]:
    """The object alone: straight alpha, colours freed of the background.

    `alpha` keeps the file's alpha, `key` removes the background colour found along the border (edges stay soft),
    `rembg` asks that package (extra `matting`). `auto` takes the first of these that the image and the installation
    allow. Raises `ImageError` where the method does not apply or where no object or no background is found.
    """
    has_alpha = bool(image[..., 3].min() < 0.5)
    if method == "alpha" and not has_alpha:
        raise ImageError("the image has no transparent background; use matting 'key' or 'rembg', or cut it out first")
    if method == "alpha" or (method == "auto" and has_alpha):
        cut = image
    elif method == "rembg":
        cut = _ask_rembg(image)
    else:
        opaque = over_white(image)
        background = _plain_background(opaque)
        if background is not None:
            cut = _key(opaque, background)
        elif method == "key":
            raise ImageError("the background is not of one plain colour; use an image with alpha, or matting 'rembg'")
        else:
            cut = _ask_rembg(image)
    return _check_cut(cut)


def _check_cut(cut: Float[np.ndarray, "h w 4"]) -> Float[np.ndarray, "h w 4"]:
    share = float((cut[..., 3] > 0.5).mean())
    if share < SPECK_AREA:
        raise ImageError("no object was found in front of the background; use an image with contrast or with alpha")
    if share == 1:
        raise ImageError("the object fills the whole image and leaves no background; use an image with a margin")
    return cut


def _plain_background(rgb: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, " 3"] | None:
    """The colour of a background that is plain along most of the border, or None."""
    border = np.concatenate([rgb[0], rgb[-1], rgb[1:-1, 0], rgb[1:-1, -1]])
    colour = np.median(border, axis=0)
    plain = np.abs(border - colour).max(-1) <= NOISY_TOLERANCE
    return colour if plain.mean() >= PLAIN_BORDER_SHARE else None


def _key(rgb: Float[np.ndarray, "h w 3"], background: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "h w 4"]:
    """Straight-alpha cut-out of what differs from `background` or is enclosed by what differs."""
    difference = rgb - background
    distance = np.abs(difference).max(-1)
    object_mask = _without_specks(~_background_region(distance))
    alpha = _soft_alpha(difference, distance, object_mask)
    # No colour in [0, 1] explains the pixel with less alpha than this.
    room = np.where(difference > 0, 1 - background, background)
    least = (np.abs(difference) - CLEAN_TOLERANCE) / np.maximum(room, 1e-6)
    alpha = np.where(object_mask, np.clip(least.max(-1), alpha, 1), 0)
    colour = background + difference / np.maximum(alpha, 1e-3)[..., None]
    return np.concatenate([np.clip(colour, 0, 1), alpha[..., None]], axis=-1).astype(np.float32)


def _background_region(distance: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels like the background that are joined to the border, or that form a gap in the object."""
    flat = _joined_to_border(distance <= CLEAN_TOLERANCE)
    # Within a block of the codec around the object, a lossy video is uneven in 16 % of the background and more (its
    # ringing), clean pixels in 4 % at most (soft edges): measured on 41 objects.
    near = flat & (ndimage.distance_transform_edt(flat) <= 8)
    unevenness = float((distance[near] > 1.5 / 255).mean()) if near.any() else 1.0
    tolerance = np.interp(unevenness, [0.06, 0.14], [CLEAN_TOLERANCE, NOISY_TOLERANCE])
    similar = distance <= tolerance
    outside = _joined_to_border(similar)
    return outside | _gaps(similar & ~outside, distance, tolerance)


def _joined_to_border(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    labels, count = ndimage.label(mask)
    joined = np.zeros(count + 1, bool)
    joined[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
    joined[0] = False
    return joined[labels]


def _gaps(enclosed: Bool[np.ndarray, "h w"], distance: Float[np.ndarray, "h w"], tolerance: float):
    """Those parts of `enclosed` through which one sees the background, as a mask [h w].

    Around a gap the object begins at once; a white part of an object on white fades into its shading. A part taken for
    a gap would be carved through the whole object, a gap taken for a part costs little: in doubt it stays.
    """
    labels, _ = ndimage.label(enclosed)
    boxes = ndimage.find_objects(labels)
    large = np.bincount(labels.ravel()) >= max(GAP_AREA * enclosed.size, 4)
    gaps = np.zeros_like(enclosed)
    for label in np.flatnonzero(large[1:]) + 1:
        window = tuple(slice(max(side.start - 4, 0), side.stop + 4) for side in boxes[label - 1])
        part = labels[window] == label
        if distance[window][part].mean() > tolerance / 2:
            continue
        around = ndimage.binary_dilation(part, iterations=4) & ~ndimage.binary_dilation(part, iterations=2)
        if np.quantile(distance[window][around], 0.2) > GAP_CONTRAST:
            gaps[window] |= part
    return gaps


def _without_specks(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """`mask` without its connected parts (diagonals count) too small to be part of an object."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    kept = areas >= max(SPECK_AREA * mask.size, 4)
    kept[0] = False
    return kept[labels]


def _soft_alpha(difference, distance, object_mask) -> Float[np.ndarray, "h w"]:
    """Alpha of pixels that mix object and background: how far they lie on the way to the object's colour inside.

    Only the rim of the object (2 pixels at 512) can be soft. Its colour is that of the nearest pixel behind the rim;
    where a part is too thin to have one, that of the most different pixel around.
    """
    width = max(round(min(object_mask.shape) / 256), 1)
    depth = ndimage.distance_transform_edt(np.pad(object_mask, 1, mode="edge"))[1:-1, 1:-1]
    rim = object_mask & (depth < width + 0.5)
    core = object_mask & ~rim
    alpha = object_mask.astype(np.float32)
    if core.any():
        away, nearest = ndimage.distance_transform_edt(~core, return_indices=True)
        inside = difference[tuple(nearest)]
        along = (difference * inside).sum(-1) / np.maximum((inside**2).sum(-1), 1e-6)
        usable = away <= 2 * width
    else:
        along, usable = distance, np.zeros_like(object_mask)
    local = distance / np.maximum(ndimage.maximum_filter(distance, 2 * width + 1), 1e-6)
    alpha[rim] = np.clip(np.where(usable, along, local), 0, 1)[rim]
    return alpha


def _ask_rembg(image: Float[np.ndarray, "h w 4"]) -> Float[np.ndarray, "h w 4"]:
    try:
        from rembg import remove
    except (ImportError, SystemExit) as error:  # rembg leaves by sys.exit where it finds no onnxruntime
        raise ImageError(
            "the image has no alpha and its background is not of one plain colour; cut the object out first, or "
            "install background removal: pip install 'hi3d_jax[matting]'"
        ) from error
    opaque = Image.fromarray(to_bytes(over_white(image)))
    return np.asarray(remove(opaque).convert("RGBA"), np.float32) / 255


def recentre(image: Float[np.ndarray, "h w 4"], size: int, foreground_ratio: float) -> Float[np.ndarray, "s s 4"]:
    """The object in the middle of a square of `size` pixels, its longer side `foreground_ratio` of the square's.

    Raises `ImageError` where the image shows nothing or the ratio is not in (0, 1].
    """
    if not 0 < foreground_ratio <= 1:
        raise ImageError(f"foreground ratio {foreground_ratio} is outside (0, 1]")
    visible = image[..., 3] > 0.5
    if not visible.any():
        raise ImageError("the image shows no object to put in the centre; check its alpha")
    (top, bottom), (left, right) = (np.flatnonzero(visible.any(axis))[[0, -1]] for axis in (1, 0))
    scale = foreground_ratio * size / max(bottom + 1 - top, right + 1 - left)
    # One pixel of margin keeps the soft edge.
    top, left, bottom, right = max(top - 1, 0), max(left - 1, 0), bottom + 2, right + 2
    crop = image[top:bottom, left:right]
    height, width = (max(round(side * scale), 1) for side in crop.shape[:2])
    # Beyond the square there can only be that margin.
    y, x = (size - height) // 2, (size - width) // 2
    inside = resize(crop, width, height)[max(-y, 0) : size - y, max(-x, 0) : size - x]
    centred = np.concatenate([np.ones((size, size, 3)), np.zeros((size, size, 1))], axis=-1).astype(np.float32)
    centred[max(y, 0) : max(y, 0) + inside.shape[0], max(x, 0) : max(x, 0) + inside.shape[1]] = inside
    return centred


def resize(image: Float[np.ndarray, "h w c"], width: int, height: int) -> Float[np.ndarray, "height width c"]:
    """The image at another size: exact area means where it shrinks, bilinear where it grows, never out of range.

    Four channels are taken for straight alpha and averaged premultiplied, so that invisible colours do not bleed in.
    """
    if image.shape[2] == 4:
        alpha = resize(image[..., 3:], width, height)
        premultiplied = resize(image[..., :3] * image[..., 3:], width, height)
        colour = np.where(alpha > 0, premultiplied / np.maximum(alpha, 1e-6), 1)
        return np.concatenate([np.clip(colour, 0, 1), alpha], axis=-1).astype(np.float32)
    return np.stack([_resize_channel(image[..., c], width, height) for c in range(image.shape[2])], axis=-1)


def _resize_channel(channel: Float[np.ndarray, "h w"], width: int, height: int) -> Float[np.ndarray, "height width"]:
    picture = Image.fromarray(np.ascontiguousarray(channel, np.float32))
    for size in ((width, picture.height), (width, height)):
        shrinks = size[0] < picture.width or size[1] < picture.height
        picture = picture.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)
    return np.asarray(picture, np.float32)


def to_bytes(image: Float[np.ndarray, "*shape"]) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded; what lies outside is clipped. Raises `ImageError` for NaN."""
    if not np.isfinite(image).all():
        raise ImageError("an image holds NaN or infinite values and cannot be written")
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def write_png(path: str | Path, image: Float[np.ndarray, "h w c"]) -> None:
    """Writes an image of 1, 3 or 4 channels in [0, 1] as 8 bit PNG; the file appears whole or not at all."""
    data = to_bytes(image)
    with written_aside(path) as aside:
        Image.fromarray(data[..., 0] if data.shape[2] == 1 else data).save(aside, format="PNG")


def contact_sheet(
    images: Sequence[Float[np.ndarray, "h w 3"]], columns: int, labels: Sequence[str] | None = None
) -> Float[np.ndarray, "sheet_h sheet_w 3"]:
    """Equally large images in rows of `columns` on white, each with its label below it."""
    height, width = images[0].shape[:2]
    if any(image.shape != images[0].shape for image in images):
        raise ImageError(f"a contact sheet needs images of one size, not {sorted({i.shape[:2] for i in images})}")
    strip = max(height // 14, 12) if labels else 0
    gap = max(width // 64, 2)
    rows = -(-len(images) // columns)
    canvas = (rows * (height + strip + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = Image.fromarray(np.full(canvas, 255, np.uint8))
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + strip + gap)
        sheet.paste(Image.fromarray(to_bytes(image)), (x, y))
        if labels:
            font = ImageFont.load_default(strip * 0.8)
            draw.text((x + width / 2, y + height + strip / 2), labels[index], fill="black", font=font, anchor="mm")
    return np.asarray(sheet, np.float32) / 255
