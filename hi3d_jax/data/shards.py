"""The files of a data set, made shard by shard, so that whoever is interrupted loses one shard at most.

The folder holds `shards/NNNNN.array_record` (array_record files), `manifest.json` (the settings the set was made with,
size and SHA-256 of every shard), `manifest.jsonl` (one line per record, in the order of the shards) and
`skipped.jsonl` (what could not be made, and why). `plan.json` and a note beside each shard say what is done already.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from array_record.python import array_record_module

from hi3d_jax.atomic import written_aside
from hi3d_jax.data.records import OrbitRecord, RecordError, encode, manifest_line

FORMAT = 1
# Views and depths are compressed already, and every record is read alone.
WRITER_OPTIONS = "group_size:1,uncompressed"


def shard_path(folder: str | Path, shard: int, suffix: str = ".array_record") -> Path:
    """A shard's file, or with another suffix one beside it."""
    return Path(folder) / "shards" / f"{shard:05d}{suffix}"


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joint_sha256(entries: list[dict]) -> str:
    """One hash over all shards of a manifest."""
    return hashlib.sha256("".join(entry["sha256"] for entry in entries).encode()).hexdigest()


def begin(folder: str | Path, plan: dict) -> dict | None:
    """Makes the folder of a new data set and writes its plan; returns the plan of one that was begun before.

    Raises `RecordError` where the folder holds other files.
    """
    folder = Path(folder)
    path = folder / "plan.json"
    if path.is_file():
        return json.loads(path.read_text())
    if folder.is_dir() and any(folder.iterdir()):
        raise RecordError(f"{folder} holds other files; give a new or empty folder")
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(json.dumps(plan, indent=1))
    return None


def check_settings(folder: str | Path, before: dict, now: dict) -> None:
    """Raises `RecordError`, saying what differs, unless a data set goes on with the settings it was begun with."""
    changed = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    if changed:
        was, is_now = ({name: settings.get(name) for name in changed} for settings in (before, now))
        raise RecordError(f"{folder} was begun with {was}, not {is_now}; use the same settings, or a new folder")


def write_shard(folder: str | Path, shard: int, records: Iterable[OrbitRecord], skipped: list[dict]) -> dict:
    """Writes one shard, whole or not at all, and its note; returns the note.

    `skipped` may grow while `records` are drawn. A shard without records has a note, but no file.
    """
    lines: list[dict] = []
    entry = _write_records(shard_path(folder, shard), _encoded(records, lines))
    note = {"shard": entry if lines else None, "lines": lines, "skipped": skipped}
    if not lines:
        shard_path(folder, shard).unlink()
    with written_aside(shard_path(folder, shard, ".json")) as aside:
        aside.write_text(json.dumps(note, ensure_ascii=False))
    return note


def _encoded(records: Iterable[OrbitRecord], lines: list[dict]) -> Iterator[bytes]:
    for record in records:
        lines.append(manifest_line(record))
        yield encode(record)


def _write_records(path: Path, encoded: Iterator[bytes]) -> dict:
    count = 0
    with written_aside(path) as aside:
        writer = array_record_module.ArrayRecordWriter(str(aside), WRITER_OPTIONS)
        with contextlib.closing(writer):
            for data in encoded:
                writer.write(data)
                count += 1
        return {"file": path.name, "records": count, "bytes": aside.stat().st_size, "sha256": sha256(aside)}


def read_note(folder: str | Path, shard: int) -> dict | None:
    """The note of a shard that is there and has the size it should have; otherwise None."""
    try:
        note = json.loads(shard_path(folder, shard, ".json").read_text())
        whole = note["shard"] is None or shard_path(folder, shard).stat().st_size == note["shard"]["bytes"]
    except (OSError, ValueError):
        return None
    return note if whole else None


def finish(folder: str | Path, settings: dict, num_shards: int) -> dict:
    """Makes the shards a data set; returns counts and one hash over all shards. manifest.json is written last.

    Raises `RecordError` where shards are missing or none has a record.
    """
    folder = Path(folder)
    notes = [read_note(folder, shard) for shard in range(num_shards)]
    missing = [shard_path(folder, shard).name for shard, note in enumerate(notes) if note is None]
    if missing:
        raise RecordError(f"{folder} lacks {len(missing)} shards ({missing[0]}, ...); run the same command again")
    lines = [line for note in notes for line in note["lines"]]
    skipped = [line for note in notes for line in note["skipped"]]
    entries = [note["shard"] for note in notes if note["shard"] is not None]
    _write_lines(folder / "skipped.jsonl", skipped)
    if not entries:
        raise RecordError(f"none of {len(skipped)} could be made; {folder / 'skipped.jsonl'} says why")
    _write_lines(folder / "manifest.jsonl", lines)
    with written_aside(folder / "manifest.json") as aside:
        aside.write_text(json.dumps({"format": FORMAT, "settings": settings, "shards": entries}, indent=1) + "\n")
    for left_over in (folder / "shards").glob(".*.part.*"):
        left_over.unlink()
    counts = {"records": len(lines), "shards": len(entries), "skipped": len(skipped)}
    return {**counts, "sha256": joint_sha256(entries)}


def _write_lines(path: Path, lines: list[dict]) -> None:
    with written_aside(path) as aside:
        aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_records(folder: str | Path, records: Iterable[OrbitRecord], settings: dict, per_shard: int = 64) -> None:
    """Writes a whole new data set from records in hand, `per_shard` in a shard."""
    if begin(folder, {"settings": settings}) is not None:
        raise RecordError(f"{folder} holds a data set already; give a new or empty folder")
    batch, count = [], 0
    for record in records:
        batch.append(record)
        if len(batch) == per_shard:
            write_shard(folder, count, batch, [])
            batch, count = [], count + 1
    if batch:
        write_shard(folder, count, batch, [])
        count += 1
    finish(folder, settings, count)
