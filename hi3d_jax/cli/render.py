"""`hi3d render`: an orbit of views of an object file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from hi3d_jax.cli.orbit_defaults import ORBIT_FOV_DEG, ORBIT_NUM_VIEWS, ORBIT_RADIUS
from hi3d_jax.cli.output import Output, OutputError, prepare_output

# What stands for the toy rocket in place of a file.
EXAMPLE = Path("example")


@dataclasses.dataclass(frozen=True)
class Render:
    """Render an orbit of an object file: pictures with alpha, depths and cameras that `hi3d reconstruct` accepts.

    The object is centred and scaled so that its longest side is 1. With no object at hand, `example` is a toy rocket.

    examples:
      hi3d render example -o rocket_orbit
      hi3d render chair.glb -o chair_orbit
      hi3d render chair.glb -o chair_orbit --elevation-deg 30 --azimuth-deg 45 --size 256 --light unlit

    A folder of many objects becomes a training set by experiments/render_dataset.py.
    """

    mesh: Annotated[Positional[Path], arg(metavar="MESH")]
    """GLB, glTF, OBJ or PLY file, a zip with one of them, a folder as Google Scanned Objects has it for each object, or
    the word example."""
    output: Output
    """New folder for views/, depths/ and cameras.json."""
    num_views: int = ORBIT_NUM_VIEWS
    """Number of equally spaced views; view k stands 360 k / number degrees after view 0."""
    elevation_deg: float = 20.0
    """How far above the horizon the cameras stand, in degrees."""
    azimuth_deg: float = 0.0
    """Where view 0 stands, in degrees from the object's front, counter-clockwise seen from above."""
    radius: float = ORBIT_RADIUS
    """Distance of the cameras from the object's centre."""
    fov_deg: float = ORBIT_FOV_DEG
    """Field of view, in degrees."""
    size: int = 512
    """Width and height of the pictures in pixels."""
    light: Literal["soft", "unlit"] = "soft"
    """soft: a bright sky and two lamps; unlit: the base colour as it is."""

    def run(self) -> None:
        prepare_output(self.output, resume=False, source=self.mesh)
        from hi3d_jax.data import example_mesh, load_object, render_orbit, write_orbit
        from hi3d_jax.data.sources import Asset, opened_asset

        if self.num_views < 1 or not 8 <= self.size <= 8192:
            raise OutputError(f"{self.num_views} views of {self.size} pixels: need 1 or more views of 8 to 8192 pixels")
        if self.mesh == EXAMPLE:
            mesh = example_mesh()
        else:
            with opened_asset(Asset(self.mesh.stem, str(self.mesh))) as file:
                mesh = load_object(file)
        renders, cameras = render_orbit(
            mesh,
            azimuths_deg=[self.azimuth_deg + 360 * view / self.num_views for view in range(self.num_views)],
            elevation_deg=self.elevation_deg,
            radius=self.radius,
            fov_deg=self.fov_deg,
            width=self.size,
            light=self.light,
        )
        write_orbit(self.output, renders, cameras)
        print(f"{self.output}")
