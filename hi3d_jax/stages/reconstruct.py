"""Stage 3 (paper section 4.4): from an orbit of views to a textured mesh.

Gaussians are fitted to the N views and drawn from M cameras between them; NeuS is fitted to all N + M and to points of
a plane sweep, starting at the visual hull of the masks less what the Gaussians and the sweep find empty; its zero level
becomes a smoothed mesh, whose texture comes from the N views at their full resolution.
With an output folder every step leaves a file to look at, and what the next step uses is what that file holds, so a run
that is interrupted and resumed gives what it would have given.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from tqdm import tqdm

from hi3d_jax import mesh as meshes
from hi3d_jax import neus, splatting, stereo, visual_hull
from hi3d_jax.atomic import written_aside
from hi3d_jax.cameras import Cameras, between_neighbours, read_transforms
from hi3d_jax.images import over_white, read_image, resize, write_png
from hi3d_jax.mesh import Mesh, MeshReport
from hi3d_jax.neus import FittedSurface
from hi3d_jax.splatting import Gaussians
from hi3d_jax.stages.checks import StageError, check_hull, check_orbit
from hi3d_jax.stages.pictures import TURNTABLE_FPS, Pictures, Scores, compare, draw_pictures
from hi3d_jax.stages.presets import ReconstructConfig
from hi3d_jax.stages.run_record import RunRecord
from hi3d_jax.stages.steps import Steps
from hi3d_jax.stereo import SweepConfig
from hi3d_jax.video import Orbit, write_mp4, write_orbit

Made = TypeVar("Made")

# World units. Light that stops over a longer stretch shows several surfaces through each other, or none. On 5 objects
# mean - spread lay more than .02 behind the surface for up to 2.7 % of all pixels, enough to dig pits; with this limit
# for up to 0.2 %.
MOST_SPREAD = 0.03
# The plane sweep's passes: the views' longer side in pixels, how far before the surface at hand it begins, and its
# settings. First, roughly, all that the hull may bulge (a chair's start has a Chamfer distance of .0192 so, of .0211
# with a reach of .288); then what is left of it; then windows that lie better (F-score at .01 of the starts of a
# firetruck, a toy airplane and a chair without this pass .690, .716, .552, with it .699, .723, .569).
STEREO_PASSES = (
    (128, 0.0, SweepConfig(reach=0.384, step=0.006, bend=0.05, jump=0.3)),
    (256, 0.05, SweepConfig(reach=0.1)),
    (256, 0.015, SweepConfig(reach=0.03, step=0.001)),
)
# Share of the object's pixels of whose depth a window is sure and both neighbours do not confirm it: with more, the
# views contradict one another and nothing is carved. Measured in the first pass: .23 to .42 of true views of five
# objects, .41 of the released model's views of a monster; .66 of hi3d-tiny's views of a taxi; of a textured ball's
# whose cameras are off by up to 0, 1, 2 and 6 degrees .31, .47, .65 and .80.
MOST_CONTRADICTED = 0.5
# Faces, at least, of the mesh that is smoothed. On 4 objects normals then agree by .009 better and silhouettes by .0008
# worse (.003 if edges on the outlines are not held).
SMOOTHED_FACES = 20_000


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The textured `mesh`, what it was made from (`gaussians`: None without interpolated views), and how good it is."""

    mesh: Mesh
    gaussians: Gaussians | None
    surface: FittedSurface
    scores: Scores
    report: MeshReport
    seconds: dict[str, float]


def reconstruct(
    orbit: Orbit,
    output: str | Path | None = None,
    config: ReconstructConfig | None = None,
    resume: bool = False,
    progress: bool = True,
    gaussians: Gaussians | None = None,
) -> Reconstruction:
    """Turns the views of an object of size 1 at the origin into a textured mesh; the same seed gives the same mesh.

    Without `config`, standard quality. `gaussians` that were fitted to these views before spare their fit. Writes files
    only into the folder `output`, which must hold no run unless `resume` continues it. Raises `StageError` (its text
    begins with the step's name), `RunError`, `CameraError`, and `OSError` for the disk.
    """
    config = ReconstructConfig() if config is None else config
    check_orbit(orbit)
    record = RunRecord.begin(None if output is None else Path(output), _request(orbit, config, gaussians), resume)
    steps, fits = Steps(record, progress), _Fits(orbit, config, progress)
    steps.take("views", "orbit.mp4", lambda: orbit, _write_views, lambda path: orbit)
    splats, between = None, None
    if config.num_interpolated:
        fit_splats = fits.splats if gaussians is None else lambda: gaussians
        splats = steps.take("splats", "splats.ply", fit_splats, splatting.write_ply, splatting.read_ply)
        draw = functools.partial(fits.draw_between, splats)
        between = steps.take("interpolated", "interpolated/cameras.json", draw, _write_between, _read_between)
    fit_surface = functools.partial(fits.surface, splats, between)
    surface = steps.take("surface", "surface.npz", fit_surface, write_surface, functools.partial(read_surface, config))
    extract = functools.partial(_extract, surface, fits, config)
    body = steps.take("mesh", "geometry.ply", extract, meshes.write_mesh, meshes.read_mesh)
    paint = functools.partial(_paint, body, orbit, config)
    mesh = steps.take("texture", "mesh.glb", paint, meshes.write_mesh, meshes.read_mesh)
    with steps.timed("scores"):
        scores, redrawn = compare(mesh, orbit)
        report = meshes.mesh_report(mesh)
    record.results = {**dataclasses.asdict(scores), "mesh": dataclasses.asdict(report)}
    if output is not None:
        draw = functools.partial(draw_pictures, mesh, orbit, redrawn)
        steps.take("pictures", "contact_sheet.png", draw, _write_pictures, lambda path: None)
    record.write()
    seconds = {name: step["seconds"] for name, step in record.steps.items()}
    return Reconstruction(mesh, splats, surface, scores, report, seconds)


def _request(orbit: Orbit, config: ReconstructConfig, gaussians: Gaussians | None) -> dict[str, Any]:
    """What decides the result, as JSON."""
    digest = _digest((orbit.views, orbit.alphas, orbit.cameras.c2w, orbit.cameras.K))
    given = {"views": len(orbit), "width": orbit.cameras.width, "height": orbit.cameras.height, "sha256": digest}
    if gaussians is not None:
        given["splats_sha256"] = _digest(jax.tree.leaves(gaussians))
    recipe = dataclasses.asdict(config)
    return {"seed": recipe.pop("seed"), "recipe": recipe, "input": given}


def _digest(arrays: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


class _Fits:
    """The two fits, on the views at a size that they can afford."""

    def __init__(self, orbit: Orbit, config: ReconstructConfig, progress: bool):
        self.orbit, self.config, self.progress = orbit, config, progress

    @functools.cached_property
    def small(self) -> Orbit:
        """The views at most `image_size` pixels long."""
        return _at_most(self.orbit, self.config.image_size)

    @functools.cached_property
    def hull(self) -> visual_hull.VisualHull:
        half_side = self.config.neus.fields.half_side
        hull = visual_hull.carve(self.small.alphas, self.small.cameras, self.config.hull_resolution, half_side)
        return check_hull(hull)

    def splats(self) -> Gaussians:
        """Gaussians that look like the views."""
        small, config = self.small, dataclasses.replace(self.config.splats, seed=self.config.seed)
        points = visual_hull.surface_points(self.hull, self.config.num_gaussians, self.config.seed)
        colours = visual_hull.colours_at(points, small.views, small.alphas, small.cameras)
        return splatting.fit(small.views, small.alphas, small.cameras, config, points, colours, self.progress)

    def draw_between(self, gaussians: Gaussians) -> Orbit:
        """The Gaussians as seen from halfway between the views."""
        cameras = between_neighbours(self.small.cameras, self.config.num_interpolated)
        drawn = list(_drawn(splatting.render, gaussians, cameras))
        views = np.stack([np.clip(picture.colour, 0, 1) for picture in drawn])
        alphas = np.stack([np.clip(picture.alpha, 0, 1) for picture in drawn])
        return Orbit(views, alphas, cameras)

    def surface(self, gaussians: Gaussians | None, between: Orbit | None) -> FittedSurface:
        """NeuS on the views, those `between` them and stereo's points, started at what all of these leave of space."""
        parts = [self.small] if between is None else [self.small, between]
        alphas = np.concatenate([part.alphas for part in parts])
        cameras = Cameras.concatenate([part.cameras for part in parts])
        start = self.hull
        if gaussians is not None:
            start = visual_hull.carve_by_depths(start, _fronts(gaussians, cameras), alphas, cameras)
        start, known = self.carve_by_stereo(start)
        return neus.fit(
            np.concatenate([part.views for part in parts]),
            alphas,
            cameras,
            dataclasses.replace(self.config.neus, seed=self.config.seed),
            initial_sdf=start.sdf,
            surface_points=known,
            progress=self.progress,
        )

    def carve_by_stereo(
        self, start: visual_hull.VisualHull
    ) -> tuple[visual_hull.VisualHull, Float[np.ndarray, "n 3"] | None]:
        """`start` without what lies before the surface that neighbouring views agree on, and points of that surface:
        the certain ones, and where colours are plain those of the carved body, which nothing else would keep in place.
        Where views contradict one another or tell nothing, `start` as it is and None."""
        carved, outside = self.hull, None
        for number, (size, lead, config) in enumerate(STEREO_PASSES):
            small = _at_most(self.small, size)
            fronts = meshes.depth_maps(self._body(carved, outside), small.cameras) - lead
            depths, told = stereo.sweep(small.views, small.alphas, small.cameras, fronts, config)
            certain = told & stereo.confirmed(depths, small.cameras)
            contradicted = (told & ~certain).sum() / max(np.isfinite(depths).sum(), 1)
            if contradicted > MOST_CONTRADICTED or not certain.any():
                if self.progress:
                    tqdm.write(f"surface: no plane sweep, {contradicted:.0%} of the views' pixels contradict others")
                return start, None
            carved, outside = visual_hull.carve_by_stereo(start, depths, small.cameras), self.outside
            if number == 0:  # in finer passes a pixel or two is missing here and there, of which nothing need come back
                uncovered = _uncovered(self._body(carved, outside), small)
                carved = visual_hull.give_back(carved, start, uncovered, small.cameras)
        plain = ~told & (small.alphas > 0.5)
        carved_depths = meshes.depth_maps(self._body(carved, outside), small.cameras)
        known = np.where(certain, depths, np.where(plain, carved_depths, np.nan))
        return carved, stereo.points(known, small.cameras)

    def _body(self, hull: visual_hull.VisualHull, outside: Callable[[np.ndarray], np.ndarray] | None) -> Mesh:
        return meshes.extract_surface(hull.sample, hull.lower, hull.upper, self.config.hull_resolution, outside)

    def outside(self, points: np.ndarray) -> np.ndarray:
        """Signed distances to the space that the masks allow, half a cell of doubt granted."""
        return self.hull.sample(points) - 0.5 * self.hull.spacing

    def held(self, points: np.ndarray) -> np.ndarray:
        """Which points lie where the masks put the surface: moved, they would change an outline."""
        return self.hull.sample(points) > -0.3 * self.hull.spacing


def _uncovered(body: Mesh, orbit: Orbit) -> Bool[np.ndarray, "t h w"]:
    """Pixels of the masks, two by two at least, that show nothing of the body."""
    missing = (orbit.alphas > 0.9) & ~np.isfinite(meshes.depth_maps(body, orbit.cameras))
    return ndimage.binary_opening(missing, np.ones((1, 2, 2)))


def _at_most(orbit: Orbit, size: int) -> Orbit:
    """The views with their longer side at most `size` pixels."""
    cameras = orbit.cameras
    scale = min(1.0, size / max(cameras.width, cameras.height))
    width, height = max(round(cameras.width * scale), 1), max(round(cameras.height * scale), 1)
    # Over white and alpha are both linear in the pixels, so they can be averaged as they are.
    views = np.stack([resize(view, width, height) for view in orbit.views])
    alphas = np.stack([resize(alpha[..., None], width, height)[..., 0] for alpha in orbit.alphas])
    return Orbit(views, alphas, cameras.resized(width, height))


def _fronts(gaussians: Gaussians, cameras: Cameras) -> Float[np.ndarray, "t h w"]:
    """Depths up to which the Gaussians certainly leave space empty; -inf where they do not say."""
    stops = list(_drawn(splatting.light_stops, gaussians, cameras))
    mean, spread = (np.stack([np.asarray(part) for part in parts]) for parts in zip(*stops, strict=True))
    return np.where(spread < MOST_SPREAD, mean - spread, -np.inf)


def _drawn(draw: Callable[..., Made], gaussians: Gaussians, cameras: Cameras) -> Iterator[Made]:
    """What `draw` (of splatting/) gives for each camera."""
    size = cameras.width, cameras.height
    capacity = splatting.capacity_for_all(gaussians, cameras.w2c, cameras.K, *size)
    for w2c, K in zip(cameras.w2c, cameras.K, strict=True):
        yield draw(gaussians, w2c, K, *size, capacity=capacity)


def _write_views(path: Path, orbit: Orbit) -> None:
    write_orbit(path.parent, orbit)
    write_mp4(path, orbit.views)


def _write_between(path: Path, orbit: Orbit) -> None:
    write_orbit(path.parent, orbit)


def _read_between(path: Path) -> Orbit:
    cameras, names = read_transforms(path)
    pictures = [read_image(path.parent / name) for name in names]
    return Orbit(np.stack([over_white(p) for p in pictures]), np.stack([p[..., 3] for p in pictures]), cameras)


def write_surface(path: Path, surface: FittedSurface) -> None:
    """The fields' numbers, one array each under its name; no pickle."""
    named, _ = jax.tree.flatten_with_path(surface.fields)
    with written_aside(path) as aside:
        np.savez(aside, **{jax.tree_util.keystr(name): np.asarray(values) for name, values in named})


def read_surface(config: ReconstructConfig, path: Path) -> FittedSurface:
    """What `write_surface` wrote for a run of this `config`. Raises `StageError` for anything else."""
    dense = jnp.zeros((config.hull_resolution,) * 3)
    expected = neus.init_fields(config.neus.fields, jax.random.key(0), dense)
    named, structure = jax.tree.flatten_with_path(expected)
    try:
        with np.load(path, allow_pickle=False) as file:
            leaves = [file[jax.tree_util.keystr(name)] for name, _ in named]
    except (ValueError, KeyError, EOFError) as error:
        raise StageError(f"surface: {path} is damaged ({error}); delete it and continue with --resume") from error
    if any(leaf.shape != like.shape for leaf, (_, like) in zip(leaves, named, strict=True)):
        raise StageError(f"surface: {path} belongs to other settings; delete it and continue with --resume")
    return FittedSurface(jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves]), config.neus.fields)


def _extract(surface: FittedSurface, fits: _Fits, config: ReconstructConfig) -> Mesh:
    bound = np.full(3, surface.config.half_side)
    body = meshes.extract_surface(surface.sdf, -bound, bound, config.resolution, fits.outside)
    body = meshes.flatten_unseen(body, fits.small.cameras, fits.outside)
    # What is a few edges wide is noise in a mesh of so many faces, and shape in one of fewer.
    body = meshes.decimate(body, max(config.num_faces, SMOOTHED_FACES))
    return meshes.decimate(meshes.smooth(body, fits.held(body.vertices)), config.num_faces)


def _paint(body: Mesh, orbit: Orbit, config: ReconstructConfig) -> Mesh:
    unwrapped = meshes.unwrap(body, config.texture_size)
    return meshes.bake_texture(unwrapped, orbit.views, orbit.alphas, orbit.cameras, config.texture_size)


def _write_pictures(path: Path, pictures: Pictures) -> None:
    write_mp4(path.with_name("turntable.mp4"), pictures.turntable, TURNTABLE_FPS)
    write_png(path, pictures.sheet)
