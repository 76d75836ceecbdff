"""Where 3D objects come from: every layout of files that can be rendered, as one list of assets.

Known layouts: a folder of GLB, glTF, OBJ, PLY or zip files at any depth; a folder with `manifest.jsonl` (one object a
line: `file`, and optionally `id`, `split`, `category`, `licence`, ...); Google Scanned Objects
(`NAME/meshes/model.obj` with `NAME/materials/textures/*`, unpacked or as zip); and the cache that the `objaverse`
package keeps, of which the LVIS subset is taken (paper section 4.2).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import gzip
import itertools
import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from hi3d_jax.mesh import MeshError

MODEL_SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
OBJAVERSE_LVIS = "objaverse-lvis"
LVIS_FILE, OBJECT_PATHS_FILE = "lvis-annotations.json.gz", "object-paths.json.gz"
MAX_UNPACKED_BYTES = 2 << 30
MAX_UNPACKED_FILES = 10_000
# What a manifest may say of an object and a record repeats.
ABOUT = ("category", "name", "licence", "attribution", "source", "split")


@dataclasses.dataclass(frozen=True)
class Asset:
    """One object: a unique id, its file (or Google Scanned Objects' folder), and what is known about it."""

    id: str
    path: str
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)


def find_assets(source: str | Path, split: str | None = None, limit: int | None = None) -> list[Asset]:
    """All assets of a source, sorted by id; `split` keeps those a manifest gives that split, `limit` the first ones.

    Raises `MeshError` where the folder is missing or holds none.
    """
    if str(source) == OBJAVERSE_LVIS:
        return _fetch_objaverse(limit)
    folder = Path(source)
    if folder.is_file():
        return [Asset(folder.stem, str(folder.resolve()))]
    if not folder.is_dir():
        raise MeshError(f"{folder} is not a folder; give the folder of the objects, or {OBJAVERSE_LVIS!r}")
    caches = [path for path in (folder, folder / "hf-objaverse-v1") if (path / LVIS_FILE).is_file()]
    if (folder / "manifest.jsonl").is_file():
        assets = _from_manifest(folder)
    elif caches:
        assets = _from_objaverse_cache(caches[0])
    else:
        assets = _from_files(folder)
    if split is not None:
        splits = sorted({asset.about.get("split", "none") for asset in assets})
        assets = [asset for asset in assets if asset.about.get("split") == split]
        if not assets:
            raise MeshError(f"no object of {folder} is in split {split!r}; there are {splits}")
    if not assets:
        raise MeshError(f"{folder} holds no {', '.join(MODEL_SUFFIXES)} or .zip file; give the folder of the objects")
    assets = sorted(assets, key=lambda asset: asset.id)
    twice = [one.id for one, other in itertools.pairwise(assets) if one.id == other.id]
    if twice:
        raise MeshError(f"{folder} has several objects of the name {twice[0]!r}; rename one of them")
    return assets[:limit]


def _from_manifest(folder: Path) -> list[Asset]:
    path = folder / "manifest.jsonl"
    assets = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = folder / row["file"]
            name = str(row.get("id", PurePosixPath(row["file"]).with_suffix("")))
        except (ValueError, KeyError, TypeError) as error:
            raise MeshError(f"line {number} of {path} is not an object with a 'file' ({error}); correct it") from error
        if not file.resolve().is_relative_to(folder.resolve()):
            raise MeshError(f"line {number} of {path} leads out of the folder: {row['file']!r}; correct it")
        assets.append(Asset(name, str(file.resolve()), {key: str(row[key]) for key in ABOUT if row.get(key)}))
    return assets


def _from_files(folder: Path) -> list[Asset]:
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in (*MODEL_SUFFIXES, ".zip") and path.is_file()
    )
    scans = {path.parent.parent for path in files if path.name == "model.obj" and path.parent.name == "meshes"}
    assets = [Asset(str(scan.relative_to(folder)), str(scan.resolve()), _scan_about(scan)) for scan in sorted(scans)]
    loose = [path for path in files if not any(parent in scans for parent in path.parents)]
    stems = [path.relative_to(folder).with_suffix("").as_posix() for path in loose]
    counts = collections.Counter(stems)
    for path, stem in zip(loose, stems, strict=True):
        name = stem if counts[stem] == 1 else path.relative_to(folder).as_posix()
        parents = path.relative_to(folder).parts[:-1]
        assets.append(Asset(name, str(path.resolve()), {"category": parents[0]} if parents else {}))
    return assets


def _scan_about(scan: Path) -> dict[str, str]:
    """Name, category and licence of a scan out of its metadata.pbtxt, where it has one."""
    metadata = scan / "metadata.pbtxt"
    text = metadata.read_text(errors="replace") if metadata.is_file() else ""
    about = {"name": scan.name, "source": "Google Scanned Objects", "licence": "CC-BY-4.0"}
    category = re.search(r'categories\s*\{\s*first:\s*"([^"]*)"', text)
    return about | ({"category": category[1]} if category and category[1] else {"category": "scan"})


def _from_objaverse_cache(cache: Path) -> list[Asset]:
    """The LVIS objects whose files are in the cache; the licences come from its metadata, where that was fetched."""
    categories = _read_gz(cache / LVIS_FILE)
    paths = _read_gz(cache / OBJECT_PATHS_FILE)
    metadata: dict[str, dict] = {}
    assets = []
    for category, uids in categories.items():
        for uid in uids:
            # An object can be in several categories; the first one names it.
            if uid not in paths or uid in metadata or not (cache / paths[uid]).is_file():
                continue
            metadata[uid] = {}
            assets.append(
                Asset(uid, str((cache / paths[uid]).resolve()), {"category": category, "source": "Objaverse"})
            )
    folders = {PurePosixPath(paths[asset.id]).parent.name for asset in assets}
    for name in folders:
        file = cache / "metadata" / f"{name}.json.gz"
        if file.is_file():
            metadata |= {uid: row for uid, row in _read_gz(file).items() if uid in metadata}
    return [_with_metadata(asset, metadata[asset.id]) for asset in assets]


def _with_metadata(asset: Asset, row: dict) -> Asset:
    author = (row.get("user") or {}).get("displayName") or (row.get("user") or {}).get("username")
    known = {"name": row.get("name"), "licence": row.get("license"), "attribution": author}
    return dataclasses.replace(
        asset, about={**asset.about, **{key: str(value) for key, value in known.items() if value}}
    )


def _read_gz(path: Path) -> dict:
    try:
        with gzip.open(path, "rt") as file:
            return json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise MeshError(
            f"{path} of the Objaverse cache cannot be read ({error}); delete it and fetch it again"
        ) from error


def _fetch_objaverse(limit: int | None) -> list[Asset]:
    """Downloads the (first `limit`) LVIS objects with the `objaverse` package and reads its cache."""
    try:
        import objaverse
    except ImportError as error:
        raise MeshError("the Objaverse source needs its package: pip install 'hi3d_jax[objaverse]'") from error
    annotations = objaverse.load_lvis_annotations()
    uids = sorted({uid for members in annotations.values() for uid in members})[:limit]
    objaverse.load_objects(uids)
    objaverse.load_annotations(uids)
    wanted = set(uids)
    cache = Path(objaverse._VERSIONED_PATH)
    return sorted((asset for asset in _from_objaverse_cache(cache) if asset.id in wanted), key=lambda asset: asset.id)


@contextlib.contextmanager
def opened_asset(asset: Asset) -> Iterator[Path]:
    """The file to read an asset from, unpacked or put together in a temporary folder where it has to be.

    Raises `MeshError` for an archive that is damaged, too large, leads out of its folder or holds no object.
    """
    path = Path(asset.path)
    if path.is_dir():
        with tempfile.TemporaryDirectory(prefix="hi3d-asset-") as folder:
            yield _staged_scan(path, Path(folder))
    elif path.suffix.lower() == ".zip":
        with tempfile.TemporaryDirectory(prefix="hi3d-asset-") as folder:
            yield _unpacked(path, Path(folder))
    else:
        yield path


def _staged_scan(scan: Path, folder: Path) -> Path:
    """A Google scan with its textures beside the OBJ, where its material file looks for them. Raises `MeshError`."""
    if not (scan / "meshes" / "model.obj").is_file():
        raise MeshError(f"{scan} has no meshes/model.obj, as a scan does; give the file of one object")
    for file in [*(scan / "meshes").iterdir(), *(scan / "materials" / "textures").glob("*")]:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder / "model.obj"


def _unpacked(archive: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(archive) as content:
            members = [info for info in content.infolist() if not info.is_dir()]
            size = sum(info.file_size for info in members)
            if size > MAX_UNPACKED_BYTES or len(members) > MAX_UNPACKED_FILES:
                raise MeshError(f"{archive} unpacks to {len(members)} files of {size >> 20} MiB; unpack it yourself")
            for info in members:
                if not (folder / info.filename).resolve().is_relative_to(folder.resolve()):
                    raise MeshError(f"{archive} wants to write {info.filename!r} outside its folder; do not use it")
            content.extractall(folder)
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        zlib.error,
    ) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise MeshError(f"{archive} cannot be unpacked ({error}); download it again") from error
    scan = next((path.parent.parent for path in folder.rglob("meshes/model.obj")), None)
    if scan is not None:
        staged = folder / ".staged"
        staged.mkdir()
        return _staged_scan(scan, staged)
    models = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MODEL_SUFFIXES and path.is_file())
    if len(models) != 1:
        raise MeshError(f"{archive} holds {len(models)} object files where one is wanted; unpack it into a folder")
    return models[0]
