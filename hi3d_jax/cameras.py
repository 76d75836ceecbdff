"""Pinhole cameras on orbits, and the one place where axes conventions meet.

Inside the library every camera is OpenCV (x right, y down, z forward) in a z-up world, pixel centres lie at +0.5, and
the object is at the origin. Azimuth 0 is the input view; azimuth grows counter-clockwise seen from above, so the camera
moves to its own right (HI3D.md section 7, checked on real outputs of the released model). Other conventions exist only
at the edge, in the conversions of this file. Plain numpy: importing or using it touches no device.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from hi3d_jax.atomic import written_aside

# SyncDreamer's and Hi3D's camera: 35 mm lens on a 32 mm sensor, 1.5 units away (the object's longest side is 1).
ORBIT_RADIUS = 1.5
ORBIT_FOV_DEG = math.degrees(2 * math.atan(16 / 35))
ORBIT_NUM_VIEWS = 16

Numbers = Sequence[float | int] | np.ndarray


class CameraError(ValueError):
    """Cameras that cannot be used; the text names the view, the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Cameras:
    """`t` pinhole cameras that share an image size.

    `c2w`: [t 4 4] camera-to-world, OpenCV axes. `K`: [t 3 3] intrinsics in pixels of a `width` x `height` image.
    Indexing with a slice or an integer array gives the chosen cameras.
    """

    c2w: Float[np.ndarray, "t 4 4"]
    K: Float[np.ndarray, "t 3 3"]
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.c2w)

    def __getitem__(self, index) -> Cameras:
        return dataclasses.replace(self, c2w=self.c2w[index], K=self.K[index])

    @property
    def w2c(self) -> Float[np.ndarray, "t 4 4"]:
        """World-to-camera matrices."""
        return np.linalg.inv(self.c2w.astype(np.float64)).astype(np.float32)

    @property
    def centres(self) -> Float[np.ndarray, "t 3"]:
        """Camera positions in the world."""
        return self.c2w[:, :3, 3]

    @property
    def pixels_to_world(self) -> Float[np.ndarray, "t 3 3"]:
        """Turns pixel positions (x, y, 1) into directions in the world, of length 1 along the optical axis."""
        return self.c2w[:, :3, :3].astype(np.float64) @ np.linalg.inv(self.K.astype(np.float64))

    def resized(self, width: int, height: int) -> Cameras:
        """The same cameras looking at images scaled to `width` x `height` pixels."""
        scale = np.array([width / self.width, height / self.height, 1.0], np.float32)
        return dataclasses.replace(self, K=self.K * scale[:, None], width=width, height=height)

    @staticmethod
    def concatenate(parts: Sequence[Cameras]) -> Cameras:
        """All cameras of `parts`, in order. Raises `CameraError` where image sizes differ."""
        sizes = {(part.width, part.height) for part in parts}
        if len(sizes) != 1:
            raise CameraError(f"cameras of different image sizes cannot be joined: {sorted(sizes)}; resize them first")
        return dataclasses.replace(
            parts[0], c2w=np.concatenate([p.c2w for p in parts]), K=np.concatenate([p.K for p in parts])
        )


def intrinsics(fov_deg: float | int, width: int, height: int) -> Float[np.ndarray, "3 3"]:
    """`K` of a camera with square pixels and a centred principal point; `fov_deg` spans the image's width."""
    if not 0 < fov_deg < 180:
        raise CameraError(f"field of view {fov_deg} degrees is outside (0, 180)")
    focal = width / 2 / math.tan(math.radians(fov_deg) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)


def look_at(position: Numbers, target: Numbers = (0, 0, 0), up: Numbers = (0, 0, 1)) -> Float[np.ndarray, "4 4"]:
    """`c2w` [4 4] of a camera at `position` that sees `target` at its image centre with `up` pointing up in the image.

    Raises `CameraError` when the viewing direction is parallel to `up` or has no length.
    """
    position, target, up = (np.asarray(v, np.float64) for v in (position, target, up))
    forward = target - position
    right = np.cross(forward, up)
    if np.linalg.norm(right) < 1e-9:
        raise CameraError(f"a camera at {position} looking at {target} has no defined roll: its up vector is {up}")
    forward, right = forward / np.linalg.norm(forward), right / np.linalg.norm(right)
    c2w = np.eye(4)
    c2w[:3, :4] = np.stack([right, np.cross(forward, right), forward, position], axis=1)
    return c2w.astype(np.float32)


def orbit_position(azimuth_deg: float | int, elevation_deg: float | int, radius: float | int) -> Float[np.ndarray, "3"]:
    """The point at these angles on a sphere of `radius` around the origin (z up, azimuth 0 on the x axis)."""
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    horizontal = math.cos(elevation)
    return radius * np.array([math.cos(azimuth) * horizontal, math.sin(azimuth) * horizontal, math.sin(elevation)])


def orbit(
    azimuths_deg: Numbers | None = None,
    elevation_deg: float | int | Numbers = 0.0,
    radius: float | int = ORBIT_RADIUS,
    fov_deg: float | int = ORBIT_FOV_DEG,
    width: int = 512,
    height: int | None = None,
) -> Cameras:
    """Cameras around the origin that look at it; without `azimuths_deg`, the paper's 16 views 22.5 degrees apart.

    One `elevation_deg` for all or one per view. Raises `CameraError` for angles or a radius that make no camera.
    """
    if azimuths_deg is None:
        azimuths_deg = np.arange(ORBIT_NUM_VIEWS) * (360 / ORBIT_NUM_VIEWS)
    height = width if height is None else height
    azimuths = np.asarray(azimuths_deg, np.float64)
    elevations = np.broadcast_to(np.asarray(elevation_deg, np.float64), azimuths.shape)
    if not (np.isfinite(azimuths).all() and len(azimuths)):
        raise CameraError(f"an orbit needs finite azimuths, not {azimuths_deg}")
    if not (np.abs(elevations) < 90).all():
        raise CameraError(f"elevation {elevation_deg} degrees is outside (-90, 90)")
    if not (math.isfinite(radius) and radius > 0):
        raise CameraError(f"orbit radius {radius} must be a positive number")
    c2w = np.stack([look_at(orbit_position(a, e, radius)) for a, e in zip(azimuths, elevations, strict=True)])
    K = np.broadcast_to(intrinsics(fov_deg, width, height), (len(c2w), 3, 3)).copy()
    return Cameras(c2w, K, width, height)


def azimuths_deg(cameras: Cameras) -> Float[np.ndarray, " t"]:
    """Azimuth of each camera's position, in [0, 360)."""
    return np.degrees(np.arctan2(cameras.centres[:, 1], cameras.centres[:, 0])) % 360


def elevations_deg(cameras: Cameras) -> Float[np.ndarray, " t"]:
    """Elevation of each camera's position, in [-90, 90]."""
    return np.degrees(np.arctan2(cameras.centres[:, 2], np.hypot(cameras.centres[:, 0], cameras.centres[:, 1])))


def between_neighbours(cameras: Cameras, count: int) -> Cameras:
    """`count` cameras spread evenly over the gaps between neighbouring views of an orbit (paper section 4.4).

    Neighbours follow each other in azimuth; position angles, distance and intrinsics are interpolated, and the new
    cameras look at the point that the given ones look at most nearly. 16 new views for 16 given ones lie halfway.
    """
    target = nearest_point_to_axes(cameras)
    offsets = cameras.centres.astype(np.float64) - target
    # Rounded, so that azimuth 0 stays first where rounding errors make it a hair less than 360.
    order = np.argsort(np.degrees(np.arctan2(offsets[:, 1], offsets[:, 0])).round(3) % 360, kind="stable")
    offsets = offsets[order]
    radii = np.linalg.norm(offsets, axis=1)
    angles = np.unwrap(np.arctan2(offsets[:, 1], offsets[:, 0]))
    elevations = np.arcsin(offsets[:, 2] / radii)
    num = len(order)
    knots = np.arange(num + 1)

    def closed(values, turn=0.0):
        return np.append(values, values[0] + turn)

    # Where count equals the views, `at` is k + 0.5: one camera in the middle of each gap.
    at = (np.arange(count) + 0.5) * num / count
    azimuth = np.interp(at, knots, closed(angles, 2 * np.pi))
    elevation = np.interp(at, knots, closed(elevations))
    radius = np.interp(at, knots, closed(radii))
    spherical = zip(np.degrees(azimuth), np.degrees(elevation), radius, strict=True)
    positions = target + np.stack([orbit_position(*angles_and_radius) for angles_and_radius in spherical])
    K = np.stack([np.interp(at, knots, closed(k)) for k in cameras.K[order].reshape(num, 9).T], axis=1)
    c2w = np.stack([look_at(position, target) for position in positions])
    return Cameras(c2w, K.reshape(count, 3, 3).astype(np.float32), cameras.width, cameras.height)


def nearest_point_to_axes(cameras: Cameras) -> Float[np.ndarray, "3"]:
    """The point nearest, in the least-squares sense, to all optical axes: what an orbit looks at."""
    forward = cameras.c2w[:, :3, 2].astype(np.float64)
    projectors = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    right_side = np.einsum("tij,tj->i", projectors, cameras.centres.astype(np.float64))
    return np.linalg.lstsq(projectors.sum(0), right_side, rcond=None)[0]


def pixel_rays(cameras: Cameras) -> tuple[Float[np.ndarray, "t h w 3"], Float[np.ndarray, "t h w 3"]]:
    """Origins and unit directions, in the world, of the rays through all pixel centres."""
    x, y = np.meshgrid(np.arange(cameras.width) + 0.5, np.arange(cameras.height) + 0.5)
    pixels = np.stack([x, y, np.ones_like(x)], axis=-1)
    directions = np.einsum("tij,hwj->thwi", cameras.pixels_to_world, pixels)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    origins = np.broadcast_to(cameras.centres[:, None, None], directions.shape)
    return origins.astype(np.float32), directions.astype(np.float32)


def project(
    points: Float[np.ndarray, "n 3"], cameras: Cameras
) -> tuple[Float[np.ndarray, "t n 2"], Float[np.ndarray, "t n"]]:
    """Pixel positions and depths (z along the optical axis) of world points in every camera.

    Points at or behind a camera get a depth <= 0 and a pixel position that means nothing.
    """
    w2c = cameras.w2c
    local = np.einsum("tij,nj->tni", w2c[:, :3, :3], points) + w2c[:, None, :3, 3]
    depth = local[..., 2]
    homogeneous = np.einsum("tij,tnj->tni", cameras.K, local)
    return homogeneous[..., :2] / np.where(np.abs(depth) < 1e-9, 1e-9, depth)[..., None], depth


def at_pixels(image: Float[np.ndarray, "h w"], positions: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """The values of the pixels that `positions` (x, y) fall in, NaN where they fall beside the image."""
    height, width = image.shape
    column, row = np.floor(positions).astype(int).T
    within = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    return np.where(within, image[np.where(within, row, 0), np.where(within, column, 0)], np.nan)


def opencv_to_opengl(c2w):
    """Flips camera axes between OpenCV (y down, z forward) and OpenGL (y up, z backward); its own inverse.

    Blender's and nerfstudio's cameras are OpenGL cameras.
    """
    return c2w * np.array([1, -1, -1, 1], np.float32)


opengl_to_opencv = opencv_to_opengl
opencv_to_blender = opencv_to_opengl
blender_to_opencv = opencv_to_opengl


def y_up_to_z_up(points):
    """Turns coordinates [... 3] of a y-up world (glTF) into the library's z-up world: (x, y, z) -> (x, -z, y)."""
    return np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


def z_up_to_y_up(points):
    """The inverse of `y_up_to_z_up`: (x, y, z) -> (x, z, -y)."""
    return np.stack([points[..., 0], points[..., 2], -points[..., 1]], axis=-1)


def turned_to_z_up(cameras: Cameras) -> Cameras:
    """Cameras of a y-up world (nerfstudio's files do not say which they use) in the library's z-up world."""
    turn = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)
    return dataclasses.replace(cameras, c2w=turn @ cameras.c2w)


def check(cameras: Cameras) -> Cameras:
    """Returns `cameras` unchanged, or raises `CameraError` naming the first view that is no pinhole camera."""
    for view, (c2w, K) in enumerate(zip(cameras.c2w, cameras.K, strict=True)):
        if not (np.isfinite(c2w).all() and np.isfinite(K).all()):
            raise CameraError(f"camera of view {view} holds NaN or infinite numbers; write finite c2w and intrinsics")
        rotation = c2w[:3, :3].astype(np.float64)
        error = np.abs(rotation.T @ rotation - np.eye(3)).max()
        if error > 1e-3 or np.linalg.det(rotation) < 0:
            raise CameraError(
                f"camera of view {view}: its rotation is not orthonormal and right-handed (off by {error:.3g}, "
                f"determinant {np.linalg.det(rotation):.3g}); remove scale and mirroring from transform_matrix"
            )
        if np.abs(c2w[3] - [0, 0, 0, 1]).max() > 1e-6:
            raise CameraError(
                f"camera of view {view}: the last row of its transform_matrix is not 0 0 0 1; transpose it?"
            )
        if K[0, 0] <= 0 or K[1, 1] <= 0:
            raise CameraError(f"camera of view {view}: focal lengths {K[0, 0]}, {K[1, 1]} must be positive")
    return cameras


def write_transforms(path: str | Path, cameras: Cameras, image_paths: Sequence[str] | None = None) -> None:
    """Writes nerfstudio's transforms.json fields (OpenGL `c2w` in our z-up world), per-view intrinsics included."""
    frames = []
    for view, (c2w, K) in enumerate(zip(opencv_to_opengl(cameras.c2w), cameras.K, strict=True)):
        frame = {"file_path": image_paths[view]} if image_paths is not None else {}
        frame |= {"fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2])}
        frames.append(frame | {"transform_matrix": c2w.astype(float).tolist()})
    document = {"camera_model": "OPENCV", "w": cameras.width, "h": cameras.height, "frames": frames}
    with written_aside(path) as aside:
        aside.write_text(json.dumps(document, indent=1) + "\n")


def read_transforms(
    path: str | Path, image_size: Callable[[str], tuple[int, int]] | None = None
) -> tuple[Cameras, list[str]]:
    """Reads nerfstudio's transforms.json fields: cameras and each frame's `file_path` ("" where it has none).

    Intrinsics may be shared or per frame, as fl_x fl_y cx cy or camera_angle_x; lens distortion must be zero. Where w
    and h are missing, `image_size` is asked for the (width, height) of the first `file_path`. Raises `CameraError`.
    """
    try:
        document = json.loads(Path(path).read_text())
        frames = document["frames"]
        names = [str(frame.get("file_path", "")) for frame in frames]
        c2w = np.array([frame["transform_matrix"] for frame in frames], np.float32)
        if c2w.ndim != 3 or c2w.shape[1:] != (4, 4):
            raise CameraError(
                f"{path}: frames need a transform_matrix of 4 x 4 numbers each, together they are {c2w.shape}"
            )
    except CameraError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error
    size = image_size(names[0]) if image_size and not {"w", "h"} <= document.keys() else None
    try:
        width, height = size or (int(document["w"]), int(document["h"]))
        K = np.stack([_frame_intrinsics(document | frame, width, height) for frame in frames])
    except CameraError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _unreadable(path, error) from error
    return check(Cameras(opengl_to_opencv(c2w), K, width, height)), names


def _unreadable(path: str | Path, error: Exception) -> CameraError:
    return CameraError(
        f"{path} is not a transforms.json that can be read ({type(error).__name__}: {error}); it needs frames with "
        "transform_matrix [4 4], w, h, and fl_x fl_y cx cy or camera_angle_x"
    )


def _frame_intrinsics(fields: dict, width: int, height: int) -> Float[np.ndarray, "3 3"]:
    for name in ("k1", "k2", "k3", "k4", "p1", "p2"):
        if abs(fields.get(name) or 0) > 1e-9:
            raise CameraError(f"lens distortion {name}={fields[name]} is not supported; undistort the images first")
    if "fl_x" not in fields:
        return intrinsics(math.degrees(fields["camera_angle_x"]), width, height)
    focal_x = fields["fl_x"]
    centre = fields.get("cx", width / 2), fields.get("cy", height / 2)
    return np.array([[focal_x, 0, centre[0]], [0, fields.get("fl_y", focal_x), centre[1]], [0, 0, 1]], np.float32)
