"""`hi3d reconstruct`: an orbit of views becomes a textured mesh."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from hi3d_jax.cli.orbit_defaults import ORBIT_FOV_DEG, ORBIT_NUM_VIEWS, ORBIT_RADIUS
from hi3d_jax.cli.output import Output, prepare_output

ByQuality = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: by quality)")]


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """Turn views of an object into a textured mesh (stage 3 of the paper).

    ORBIT is a video or animated picture whose frames go once around the object, a folder of such pictures, or a folder
    with cameras.json or transforms.json (nerfstudio's fields): any number of views from any pinhole cameras. View 0 is
    the front; the camera then moves to its own right.

    examples:
      hi3d reconstruct orbit.mp4 -o out
      hi3d reconstruct orbit.mp4 -o out --elevation-deg 20 --quality draft
      hi3d reconstruct capture/ -o out --up y          # a folder with transforms.json, y up
      hi3d reconstruct orbit.mp4 -o out --resume       # after Ctrl-C or a full disk

    FOLDER will hold mesh.glb, contact_sheet.png (look at this first) and turntable.mp4; views/, cameras.json and
    orbit.mp4, what was read; splats.ply, interpolated/, surface.npz and geometry.ply, what lies between; and run.json,
    with settings, versions, time and memory of each step, and how near the mesh comes to the views.
    """

    orbit: Annotated[Positional[Path], arg(metavar="ORBIT")]
    """Video, animated picture or folder with the views."""
    output: Output
    """New folder for the results."""
    quality: Literal["draft", "standard", "full"] = "standard"
    """draft: a first look on a laptop; standard: more detail, minutes on a CPU; full: for a GPU."""
    elevation_deg: float = 0.0
    """How far above the horizon the cameras stand, in degrees. Ignored where the folder holds cameras."""
    radius: float = ORBIT_RADIUS
    """Distance of the cameras from the centre, in units of the object's longest side. Ignored likewise."""
    fov_deg: float = ORBIT_FOV_DEG
    """Field of view across the image's width, in degrees. Ignored likewise."""
    num_views: int = ORBIT_NUM_VIEWS
    """Number of equally spaced views in the orbit. Ignored likewise."""
    up: Literal["z", "y"] = "z"
    """The axis that points up in the world of a folder with cameras."""
    matting: Literal["auto", "alpha", "key", "rembg"] = "auto"
    """How the object is cut out: the file's alpha, keying a plain background, rembg; auto: the first that fits."""
    num_interpolated: ByQuality = None
    """Views rendered between the given ones for the surface fit; 0: none, and no splats.ply."""
    resolution: ByQuality = None
    """Grid cells along each side when the surface is extracted."""
    faces: ByQuality = None
    """Triangles of the mesh, about."""
    texture_size: ByQuality = None
    """Width and height of the texture in pixels."""
    seed: int = 0
    """The same seed gives the same mesh on the same machine."""
    resume: FlagCreatePairsOff[bool] = False
    """Continue the run that FOLDER holds after its last finished step."""

    def run(self) -> None:
        prepare_output(self.output, self.resume, self.orbit)
        from hi3d_jax.stages.reconstruct import ReconstructConfig, reconstruct
        from hi3d_jax.video import read_orbit

        orbit = read_orbit(
            self.orbit,
            elevation_deg=self.elevation_deg,
            radius=self.radius,
            fov_deg=self.fov_deg,
            num_views=self.num_views,
            up=self.up,
            matting=self.matting,
        )
        chosen = {
            "num_interpolated": self.num_interpolated,
            "resolution": self.resolution,
            "num_faces": self.faces,
            "texture_size": self.texture_size,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        config = ReconstructConfig.preset(self.quality, seed=self.seed, **given)
        result = reconstruct(orbit, self.output, config, resume=self.resume)
        scores, report = result.scores, result.report
        print(f"against the {len(orbit)} views: silhouette IoU {scores.silhouette_iou:.3f}, PSNR {scores.psnr:.1f} dB")
        closed = "watertight" if report.watertight else "not watertight"
        print(f"{self.output / 'mesh.glb'}: {report.faces} faces, {closed}, {sum(result.seconds.values()):.0f} s")
