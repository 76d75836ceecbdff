"""Renders a training set: assets become shards of orbits (paper section 4.2; cameras of HI3D.md section 7).

The plan fixes everything before the first ray: which assets belong to which shard, and a seed. Shards are the unit of
work and of safety: each is rendered by one process, depends on nothing but the plan, and appears whole or not at all.
So the files do not depend on the number of workers or on their order, a killed worker costs at most its own shard,
and running the same command again makes what is missing. An asset that cannot be rendered is listed with its reason in
`skipped.jsonl`; one that kills its process is given up after three deaths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from hi3d_jax import images
from hi3d_jax.atomic import written_aside
from hi3d_jax.cameras import ORBIT_FOV_DEG, ORBIT_NUM_VIEWS, ORBIT_RADIUS, CameraError
from hi3d_jax.data import shards
from hi3d_jax.data.records import OrbitRecord, RecordError, depth_to_units
from hi3d_jax.data.render import load_object, render_orbit
from hi3d_jax.data.sources import Asset, find_assets, opened_asset
from hi3d_jax.mesh import Mesh, MeshError

# An asset in whose rendering so many processes died is at fault.
MAX_DEATHS = 3
# The smallest share of the views' pixels that must show something.
MIN_COVERAGE = 1e-4


@dataclasses.dataclass(frozen=True)
class RenderSettings:
    """How every asset is rendered; what the files depend on."""

    size: int = 512
    """Width and height of a view in pixels."""
    orbits: int = 1
    """Orbits of each object."""
    elevation_range_deg: tuple[float, float] = (-10.0, 40.0)
    """Elevations are drawn uniformly from it, one for each orbit (paper section 4.2)."""
    elevations_deg: tuple[float, ...] = ()
    """Given elevations in place of random ones: one orbit of each object for each of them (the released data set's
    are -10 0 10 20 30 40); replaces --orbits."""
    azimuth_deg: float | None = None
    """Azimuth of view 0 in the object's own frame; drawn at random for each orbit if not given."""
    num_views: int = ORBIT_NUM_VIEWS
    """Views of an orbit, evenly spaced over 360 degrees, counter-clockwise seen from above."""
    radius: float = ORBIT_RADIUS
    """Distance of the cameras in longest sides of the object."""
    fov_deg: float = ORBIT_FOV_DEG
    """Field of view in degrees."""
    light: Literal["soft", "unlit"] = "soft"
    """Sky and two lamps that stand still around the object, or base colours as they are."""
    supersample: int = 2
    """Rays in a pixel along each axis."""
    depths: bool = True
    """Store depths beside the views."""
    seed: int = 0
    """Of elevations, azimuths and the order of the objects."""
    assets_per_shard: int = 16
    """Objects in one shard: what a killed worker can lose."""

    def check(self) -> RenderSettings:
        """Returns itself, or raises `ValueError` naming what cannot be rendered and the remedy."""
        low, high = self.elevation_range_deg
        elevations = (low, high, *self.elevations_deg)
        if not all(-90 < value < 90 for value in elevations) or low > high:
            raise ValueError(f"elevations {elevations} must lie within (-90, 90) degrees, the lower one first")
        for name, least in (("size", 8), ("orbits", 1), ("num_views", 1), ("supersample", 1), ("assets_per_shard", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is too small; use at least {least}")
        return self


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole work: settings and the assets of every shard. It lives in `plan.json` of the data set's folder."""

    settings: RenderSettings
    shards: tuple[tuple[Asset, ...], ...]

    def to_json(self) -> dict:
        """As plain values; what two equal plans have in common."""
        assets = [[dataclasses.asdict(asset) for asset in shard] for shard in self.shards]
        return json.loads(json.dumps({"settings": dataclasses.asdict(self.settings), "shards": assets}))


def make_plan(
    folder: str | Path, source: str, settings: RenderSettings, *, split: str | None = None, limit: int | None = None
) -> Plan:
    """Plans the rendering of `source` into `folder`, or takes up the plan that is there.

    Raises `RecordError` where the folder holds another plan, saying what differs, and `MeshError` without assets.
    """
    folder = Path(folder)
    assets = find_assets(source, split, limit)
    # Shuffled, so that every shard has a bit of everything and takes about as long.
    order = np.random.default_rng(settings.seed).permutation(len(assets))
    step = settings.check().assets_per_shard
    parts = tuple(tuple(assets[i] for i in order[start : start + step]) for start in range(0, len(assets), step))
    plan = Plan(settings, parts)
    before = shards.begin(folder, plan.to_json())
    if before is not None:
        _check_same(before, plan.to_json(), folder)
    return plan


def _check_same(before: dict, now: dict, folder: Path) -> None:
    shards.check_settings(folder, before["settings"], now["settings"])
    if before["shards"] != now["shards"]:
        counts = [sum(map(len, plan["shards"])) for plan in (before, now)]
        raise RecordError(
            f"{folder} was begun with other objects ({counts[0]} then, {counts[1]} now); restore the source, or use a "
            "new folder"
        )


def missing_shards(folder: str | Path, plan: Plan) -> list[int]:
    """The shards that are still to be rendered."""
    return [shard for shard in range(len(plan.shards)) if shards.read_note(folder, shard) is None]


def render_shard(folder: str | Path, shard: int, assets: tuple[Asset, ...], settings: RenderSettings) -> dict:
    """Renders one shard, `assets` of a plan; returns its note: file, records and what was skipped."""
    deaths = shards.shard_path(folder, shard, ".deaths")
    skipped: list[dict] = []

    def rendered() -> Iterator[OrbitRecord]:
        for asset in assets:
            try:
                with _blame(deaths, asset):
                    orbits = list(render_asset(asset, settings))
            except (MeshError, CameraError, images.ImageError, MemoryError, OSError) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise  # the disk is full, which is not the object's fault
                reason = str(error) or "not enough memory to render it"
                skipped.append({"id": asset.id, "file": asset.path, "reason": reason})
                continue
            yield from orbits

    note = shards.write_shard(folder, shard, rendered(), skipped)
    deaths.unlink(missing_ok=True)
    return note


@contextlib.contextmanager
def _blame(path: Path, asset: Asset) -> Iterator[None]:
    """Counts, in a file, the processes that died while they rendered `asset`. Raises `MeshError` after too many."""
    try:
        deaths = json.loads(path.read_text())
    except (OSError, ValueError):
        deaths = {}
    count = deaths.get(asset.id, 0)
    if count >= MAX_DEATHS:
        raise MeshError(f"rendering it ended {count} processes (out of memory, or a crash in the ray caster)")
    _write_deaths(path, {**deaths, asset.id: count + 1})
    _accused[path] = deaths
    try:
        yield
    finally:
        acquit()


# The files that accuse what this process is rendering, and what they said before.
_accused: dict[Path, dict] = {}


def acquit() -> None:
    """Takes back the accusation: for processes that end because they were asked to."""
    while _accused:
        _write_deaths(*_accused.popitem())


def _write_deaths(path: Path, deaths: dict) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(deaths))


def render_asset(asset: Asset, settings: RenderSettings) -> Iterator[OrbitRecord]:
    """The orbits of one asset. Raises `MeshError` for what cannot be read or shows nothing."""
    with opened_asset(asset) as path:
        mesh = load_object(path)
        digest = shards.sha256(path)
    about = {**asset.about, "object_id": asset.id, "object_sha256": digest}
    elevations = settings.elevations_deg or (None,) * settings.orbits
    for orbit, given in enumerate(elevations):
        # Draws depend on the asset's name, not on its place: adding objects leaves the others as they were.
        rng = np.random.default_rng([settings.seed, zlib.crc32(asset.id.encode()), orbit])
        elevation = round(float(rng.uniform(*settings.elevation_range_deg)), 3) if given is None else given
        azimuth = round(float(rng.uniform(0, 360)), 3) if settings.azimuth_deg is None else settings.azimuth_deg
        yield _orbit_record(f"{asset.id}/{orbit}", mesh, elevation, azimuth, settings, about)


def _orbit_record(
    key: str, mesh: Mesh, elevation_deg: float, azimuth_deg: float, settings: RenderSettings, about: dict
) -> OrbitRecord:
    steps = np.arange(settings.num_views) * (360 / settings.num_views)
    renders, _ = render_orbit(
        mesh,
        azimuths_deg=(azimuth_deg + steps).tolist(),
        elevation_deg=elevation_deg,
        radius=settings.radius,
        fov_deg=settings.fov_deg,
        width=settings.size,
        light=settings.light,
        supersample=settings.supersample,
    )
    coverage = float(renders.alphas.mean())
    if coverage < MIN_COVERAGE:
        raise MeshError(f"its orbit at elevation {elevation_deg} covers {coverage:.1e} of the views: nothing to learn")
    straight = [images.straight_alpha(*pair) for pair in zip(renders.views, renders.alphas, strict=True)]
    return OrbitRecord(
        key,
        views=images.to_bytes(np.stack(straight)),
        depths=depth_to_units(renders.depths) if settings.depths else None,
        elevation_deg=float(elevation_deg),
        azimuth_deg=float(azimuth_deg),
        radius=settings.radius,
        fov_deg=settings.fov_deg,
        about=about,
    )


def finish(folder: str | Path, plan: Plan) -> dict:
    """Writes manifest and report of a completely rendered data set; returns counts and one hash over all shards.

    Raises `RecordError` where shards are missing or nothing could be rendered.
    """
    return shards.finish(folder, plan.to_json()["settings"], len(plan.shards))
