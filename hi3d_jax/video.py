"""An orbit as a file: mp4, gif, a folder of pictures, or a folder with cameras.json; in and out.

The released model writes an orbit as an mp4 of 16 views, 22.5 degrees apart (HI3D.md sections 2 and 7). ffmpeg comes
with the package imageio-ffmpeg; it is only allowed to open local files of the usual containers. Views leave this file
composited over white, their alpha beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import imageio_ffmpeg
import numpy as np
from jaxtyping import Float
from PIL import Image

from hi3d_jax import cameras as camera_files
from hi3d_jax import images
from hi3d_jax.atomic import written_aside
from hi3d_jax.cameras import ORBIT_FOV_DEG, ORBIT_NUM_VIEWS, ORBIT_RADIUS, Cameras

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
ANIMATION_SUFFIXES = (".gif", ".webp", ".png")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
CAMERA_FILES = ("cameras.json", "transforms.json")
# All views together; 128 million pixels are 2 GB as float32 RGBA.
MAX_TOTAL_PIXELS = 128_000_000
# A playlist under a video's name could make ffmpeg open other files or the network.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"


class OrbitError(images.ImageError):
    """Views or their files that cannot be used; the text names the file or view and the remedy."""


@dataclasses.dataclass(frozen=True)
class Orbit:
    """Views of one object: `views` over white and `alphas`, both in [0, 1], with the camera of each."""

    views: Float[np.ndarray, "t h w 3"]
    alphas: Float[np.ndarray, "t h w"]
    cameras: Cameras

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, some: slice) -> Orbit:
        """Some of the views."""
        return Orbit(self.views[some], self.alphas[some], self.cameras[some])


def read_orbit(
    path: str | Path,
    *,
    elevation_deg: float = 0.0,
    radius: float = ORBIT_RADIUS,
    fov_deg: float = ORBIT_FOV_DEG,
    num_views: int = ORBIT_NUM_VIEWS,
    up: Literal["z", "y"] = "z",
    matting: images.Matting = "auto",
) -> Orbit:
    """Reads the views of an object, cuts the object out and gives every view its camera.

    `path` is a video, an animated picture or a folder of pictures with `num_views` views equally spaced around the
    object (view 0 first, then counter-clockwise seen from above), taken from `elevation_deg` at `radius` with a field
    of view of `fov_deg` across the image. Or it is a folder with cameras.json or transforms.json (nerfstudio's
    fields): any number of views from any pinhole cameras, in a world where `up` points up. Raises `OrbitError`,
    `ImageError` or `CameraError`.
    """
    frames, cameras = read_views(path)
    if cameras is not None:
        cameras = camera_files.turned_to_z_up(cameras) if up == "y" else cameras
    else:
        count, height, width = frames.shape[:3]
        if count != num_views:
            raise OrbitError(
                f"{path} holds {count} views, not {num_views}; if they are equally spaced around the object set the "
                f"number of views to {count} (--num-views {count}), else give a folder with cameras.json"
            )
        azimuths = np.arange(count) * (360 / count)
        cameras = camera_files.orbit(azimuths, elevation_deg, radius, fov_deg, width, height)
    return cut_out(frames, cameras, matting)


def read_views(path: str | Path) -> tuple[Float[np.ndarray, "t h w 4"], Cameras | None]:
    """The views of an orbit as `read_orbit` finds them, nothing cut out, and their cameras where the folder holds any.

    Raises `OrbitError`, `ImageError` or `CameraError`.
    """
    camera_file = _camera_file(Path(path))
    return (read_frames(path), None) if camera_file is None else read_posed_frames(camera_file)


def _camera_file(path: Path) -> Path | None:
    if path.suffix == ".json":
        return path
    return next((path / name for name in CAMERA_FILES if (path / name).is_file()), None)


def cut_out(frames: Float[np.ndarray, "t h w 4"], cameras: Cameras, matting: images.Matting = "auto") -> Orbit:
    """The object of every view cut out of its background, with these cameras. Raises `OrbitError`."""
    views = np.empty((*frames.shape[:3], 3), np.float32)
    alphas = np.empty(frames.shape[:3], np.float32)
    for index, frame in enumerate(frames):
        try:
            cut = images.matte(frame, matting)
        except images.ImageError as error:
            raise OrbitError(f"view {index}: {error}") from error
        views[index], alphas[index] = images.over_white(cut), cut[..., 3]
    return Orbit(views, alphas, cameras)


def read_frames(path: str | Path) -> Float[np.ndarray, "t h w 4"]:
    """All frames of a video or an animated picture, or all pictures of a folder in the order of their numbers.

    Straight alpha, 1 where the file has none. Raises `OrbitError` or `ImageError` for files that are missing, damaged,
    truncated or too large, and for pictures of different sizes.
    """
    path = Path(path)
    if path.is_dir():
        pictures = (p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith("."))
        return _read_pictures(sorted(pictures, key=_by_number), path)
    images.check_file(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        with contextlib.closing(_decode_video(path)) as frames:
            return _joined(frames, path)
    if path.suffix.lower() in ANIMATION_SUFFIXES:
        return _decode_animation(path)
    raise OrbitError(
        f"{path} is no orbit that can be read; give a video ({' '.join(VIDEO_SUFFIXES)}), an animated picture "
        f"({' '.join(ANIMATION_SUFFIXES)}) or a folder of pictures"
    )


def _by_number(path: Path) -> list:
    """Sort key under which 2.png precedes 10.png."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", path.name)]


def _read_pictures(paths: list[Path], folder: Path) -> Float[np.ndarray, "t h w 4"]:
    if not paths:
        raise OrbitError(f"{folder} holds no pictures ({' '.join(PICTURE_SUFFIXES)}); give the folder of the views")
    return _joined((images.read_image(path) for path in paths), folder, paths)


def _joined(frames: Iterable[np.ndarray], source: Path, names: list[Path] | None = None) -> np.ndarray:
    """Stacks frames [h w 4]; stops reading as soon as one has another size or all together are too large."""
    collected = []
    for index, frame in enumerate(frames):
        collected.append(frame)
        if frame.shape != collected[0].shape:
            (h0, w0), (h, w) = collected[0].shape[:2], frame.shape[:2]
            raise OrbitError(
                f"{names[index] if names else f'frame {index} of {source}'} is {w} x {h} pixels and the first view "
                f"{w0} x {h0}; all views must have one size, resize them"
            )
        _check_total(len(collected), frame.shape[1::-1], source)
    return np.stack(collected)


def _check_total(count: int, size: tuple[int, int], source: Path) -> None:
    if count * size[0] * size[1] > MAX_TOTAL_PIXELS:
        raise OrbitError(
            f"the views of {source} have more than {MAX_TOTAL_PIXELS // 10**6} million pixels together; use fewer or "
            "smaller views"
        )


def _decode_animation(path: Path) -> Float[np.ndarray, "t h w 4"]:
    with images.opened(path, formats=("GIF", "WEBP", "PNG")) as file:
        count = getattr(file, "n_frames", 1)
        _check_total(count, file.size, path)
        frames = np.empty((count, file.height, file.width, 4), np.float32)
        for index in range(count):
            file.seek(index)
            frames[index] = images.to_array(file, path)
    return frames


def _decode_video(path: Path) -> Iterator[Float[np.ndarray, "h w 4"]]:
    """Frames of a video as ffmpeg decodes them, none repeated or dropped; any complaint of the decoder is an error."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-max_pixels", str(images.MAX_PIXELS)]
    command += ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-i", f"file:{path}", "-map", "0:v:0"]
    command += ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "pam", "-pix_fmt", "rgba", "-"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        try:
            while (frame := _read_pam(process.stdout)) is not None:
                images.check_size(frame.shape[1::-1], path)
                yield frame.astype(np.float32) / 255
            process.wait()
            log.seek(0)
            complaints = log.read().decode(errors="replace").strip()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
    if "exceeds specified max pixel count" in complaints:
        raise OrbitError(f"{path} has frames of more than {images.MAX_PIXELS // 10**6} million pixels; scale it down")
    if complaints or process.returncode:
        reason = re.sub(r"\[[^]]*\] ", "", complaints.splitlines()[0] if complaints else f"exit {process.returncode}")
        raise OrbitError(f"{path} is truncated, damaged or no video ({reason}); download or export it again")


def _read_pam(stream: BinaryIO) -> np.ndarray | None:
    """The next image [h w 4] uint8 of a stream of PAM images, or None at its end."""
    fields = {}
    while (line := stream.readline()) and line.strip() != b"ENDHDR":
        name, _, value = line.strip().partition(b" ")
        fields[name] = value
    if not line:
        return None
    width, height = int(fields[b"WIDTH"]), int(fields[b"HEIGHT"])
    data = stream.read(width * height * 4)
    return np.frombuffer(data, np.uint8).reshape(height, width, 4) if len(data) == width * height * 4 else None


def read_posed_frames(camera_file: Path) -> tuple[Float[np.ndarray, "t h w 4"], Cameras]:
    """The pictures that cameras.json or transforms.json names, as they are, and their cameras (in the file's world)."""
    folder = camera_file.parent.resolve()
    cameras, names = camera_files.read_transforms(
        camera_file, lambda name: images.read_size(_inside(folder, name, camera_file))
    )
    frames = _read_pictures([_inside(folder, name, camera_file) for name in names], folder)
    height, width = frames.shape[1:3]
    if (cameras.width, cameras.height) != (width, height):
        raise OrbitError(
            f"{camera_file} speaks of images of {cameras.width} x {cameras.height} pixels, but they have {width} x "
            f"{height}; correct w, h and the intrinsics"
        )
    return frames, cameras


def _inside(folder: Path, name: str, camera_file: Path) -> Path:
    """The picture `name` of a camera file; nerfstudio's and Blender's files may leave the suffix out."""
    path = (folder / name).resolve()
    if not name or not path.is_relative_to(folder):
        raise OrbitError(f"{camera_file} names the picture {name!r}; file_path must lead to a file inside {folder}")
    return path if path.suffix else path.with_suffix(".png")


def write_mp4(path: str | Path, views: Float[np.ndarray, "t h w 3"], fps: float = 8) -> None:
    """Writes views as H.264 that every player shows (yuv420p, BT.709); odd sizes get a white row or column."""
    height, width = views.shape[1:3]
    colours = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "iec61966-2-1"]
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white,scale=out_color_matrix=bt709:out_range=tv"
    with written_aside(path) as aside:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-vf", even, "-c:v", "libx264", "-crf", "17"]
        command += ["-pix_fmt", "yuv420p", *colours, "-movflags", "+faststart", "-f", "mp4", f"file:{aside}"]
        result = subprocess.run(command, input=images.to_bytes(views).tobytes(), capture_output=True, check=False)
        if result.returncode:
            reason = result.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise OrbitError(f"{path} cannot be written ({' '.join(reason)}); check free space and permissions")


def write_gif(path: str | Path, views: Float[np.ndarray, "t h w 3"], fps: float = 8) -> None:
    """Writes views as an endless GIF. 256 colours each, so it is for looking at, not for reading back."""
    first, *rest = (Image.fromarray(view) for view in images.to_bytes(views))
    with written_aside(path) as aside:
        first.save(aside, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def write_orbit(folder: str | Path, orbit: Orbit) -> None:
    """Writes views/NNN.png (RGBA) and, once they are complete, cameras.json; `read_orbit` reads the folder back."""
    folder = Path(folder)
    (folder / "views").mkdir(parents=True, exist_ok=True)
    names = [f"views/{index:03d}.png" for index in range(len(orbit))]
    for name, view, alpha in zip(names, orbit.views, orbit.alphas, strict=True):
        images.write_png(folder / name, images.straight_alpha(view, alpha))
    camera_files.write_transforms(folder / "cameras.json", orbit.cameras, names)
