"""The `hi3d` command: one subcommand per job, errors in one line, nothing heavy imported before it is needed.

Exit codes: 0 done; 2 something the user can change (named in one line on stderr); 130 interrupted. With HI3D_DEBUG=1
errors show their traceback. JAX's compiled programs are kept in the user's cache folder (HI3D_CACHE names another one,
HI3D_CACHE=off keeps none), so that only the first run pays for compiling.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

# Spelled out, not imported from cameras.py: `hi3d --help` starts without numpy. A test holds them equal.
ORBIT_RADIUS = 1.5
ORBIT_FOV_DEG = 49.13434264120263
ORBIT_NUM_VIEWS = 16

# What `hi3d render` takes in place of a file.
EXAMPLE = Path("example")

REMEDIES = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space and try again",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EPERM: "check the permissions or choose another folder",
    errno.EROFS: "choose a folder that can be written",
}

Output = Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
ByQuality = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: by quality)")]


class OutputError(ValueError):
    """Output that cannot be made, or not where it was asked for; the text names it and the remedy."""


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


@dataclasses.dataclass(frozen=True)
class Render:
    """Render an orbit of an object file: pictures with alpha, depths and cameras that `hi3d reconstruct` accepts.

    The object is centred and scaled so that its longest side is 1. With no object at hand, `example` is a toy rocket.

    examples:
      hi3d render example -o rocket_orbit
      hi3d render chair.glb -o chair_orbit
      hi3d render chair.glb -o chair_orbit --elevation-deg 30 --size 256 --light unlit
    """

    mesh: Annotated[Positional[Path], arg(metavar="MESH")]
    """GLB, glTF, OBJ or PLY file, or the word example."""
    output: Output
    """New folder for views/, depths/ and cameras.json."""
    num_views: int = ORBIT_NUM_VIEWS
    """Number of equally spaced views; view k stands at 360 k / number degrees."""
    elevation_deg: float = 20.0
    """How far above the horizon the cameras stand, in degrees."""
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

        if self.num_views < 1 or not 8 <= self.size <= 8192:
            raise OutputError(f"{self.num_views} views of {self.size} pixels: need 1 or more views of 8 to 8192 pixels")
        renders, cameras = render_orbit(
            example_mesh() if self.mesh == EXAMPLE else load_object(self.mesh),
            azimuths_deg=[360 * view / self.num_views for view in range(self.num_views)],
            elevation_deg=self.elevation_deg,
            radius=self.radius,
            fov_deg=self.fov_deg,
            width=self.size,
            light=self.light,
        )
        write_orbit(self.output, renders, cameras)
        print(f"{self.output}")


COMMANDS = {"reconstruct": Reconstruct, "render": Render}
# For `hi3d --help`; the help of a single command shows all of its docstring.
Command = (
    Annotated[Reconstruct, subcommand("reconstruct", description="Turn views of an object into a textured mesh.")]
    | Annotated[Render, subcommand("render", description="Render an orbit of views of an object file.")]
)

DESCRIPTION = """Hi3D in JAX: from views of one object to a textured mesh.

examples:
  hi3d reconstruct orbit.mp4 -o out
  hi3d render example -o rocket_orbit && hi3d reconstruct rocket_orbit -o rocket

hi3d COMMAND --help tells more; HI3D_DEBUG=1 shows tracebacks.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version"]:
        print(f"hi3d {importlib.metadata.version('hi3d_jax')}")
        return 0
    if argv and argv[0] in COMMANDS:
        command = tyro.cli(COMMANDS[argv[0]], prog=f"hi3d {argv[0]}", args=argv[1:])
    else:
        command = tyro.cli(Command, prog="hi3d", description=DESCRIPTION, args=argv)
    keep_compiled_programs()
    try:
        command.run()
    except KeyboardInterrupt:
        print(f"hi3d: interrupted{way_back(command)}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("HI3D_DEBUG") == "1" or not (text := explained(error)):
            raise
        print(f"hi3d: error: {text}{way_back(command) if isinstance(error, OSError) else ''}", file=sys.stderr)
        return 2
    return 0


def way_back(command: Reconstruct | Render) -> str:
    """How to go on after an interruption, for commands that keep what they finished."""
    return "; what is finished is kept, continue with --resume" if hasattr(command, "resume") else ""


def explained(error: Exception) -> str:
    """What went wrong and what to do, in one line; empty for an error that no user can cause."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; use --quality draft, smaller views or fewer of them"
    if isinstance(error, RuntimeError):
        return ""
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(error.errno, "check the path")
        return f"{error.filename or 'writing'}: {error.strerror}; {remedy}"
    # Our own errors are subclasses; a bare ValueError may come from anywhere.
    hint = " (HI3D_DEBUG=1 shows where)" if type(error) is ValueError else ""
    return " ".join(str(error).split()) + hint


def prepare_output(folder: Path, resume: bool, source: Path) -> None:
    """Makes the output folder, or raises `OutputError` where writing there would fail or destroy something.

    A folder that holds anything is only taken with `resume`; `source`, from which the run reads, is never taken.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder with -o")
    if folder.resolve() == source.resolve():
        raise OutputError(f"{folder} is the input; give another folder with -o")
    if folder.is_dir() and not resume:
        if _holds_run(folder):
            raise OutputError(f"{folder} already holds a run; continue it with --resume, or give a new folder with -o")
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise OutputError(f"{folder} is not empty; give a new folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = REMEDIES.get(error.errno, "choose another folder with -o")
        raise OutputError(f"{folder} cannot be written ({error.strerror}); {remedy}") from error


def _holds_run(folder: Path) -> bool:
    return (folder / "run.json").exists()


def keep_compiled_programs() -> None:
    """Points JAX's persistent compilation cache at the user's cache folder, unless the environment already says where.

    Takes effect through the environment, before JAX is imported. A folder that cannot be written only costs time.
    """
    chosen = os.environ.get("HI3D_CACHE")
    if chosen == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = Path(chosen) if chosen else user_cache_folder() / "hi3d"
    try:
        (folder / "xla").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "xla"):
            pass
    except OSError as error:
        print(f"hi3d: compiled programs are not kept: {folder} cannot be written ({error.strerror})", file=sys.stderr)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
    # Below this, compiling again is as fast as looking the program up.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def user_cache_folder() -> Path:
    """The platform's folder for files that can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


if __name__ == "__main__":
    sys.exit(main())
