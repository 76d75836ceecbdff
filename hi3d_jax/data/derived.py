"""Data sets made of other ones, record by record: cached latents, stage 1's outputs.

Shard n holds what was made of the source's shard n, so an interrupted run goes on with the first shard that lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hi3d_jax.data import shards
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.data.records import OrbitRecord, RecordError

# The setting that says what a data set was made of: `shards.joint_sha256` of the source.
SOURCE = "source_sha256"
Make = Callable[[OrbitRecord], Iterable[OrbitRecord]]


def check_derived(made: RecordFolder, source: RecordFolder) -> None:
    """Raises `RecordError` unless `made` was derived from `source` as it is now."""
    if made.settings.get(SOURCE) != shards.joint_sha256(source.shards):
        raise RecordError(f"{made.folder} was not made from {source.folder} as it is now; make it again")


def derive(source: RecordFolder, folder: str | Path, settings: dict, make: Make, **wanted) -> Iterator[int]:
    """Makes a data set in `folder` of what `make` gives for every record of `source`, of which `wanted` is read.

    Yields after each record of the source how many are done; nothing happens unless it is drawn from. `settings`
    say what was done, and have to be the same when the work is taken up again. Raises `RecordError`.
    """
    settings = {**settings, SOURCE: shards.joint_sha256(source.shards)}
    before = shards.begin(folder, {"settings": settings})
    if before is not None:
        shards.check_settings(folder, before["settings"], settings)
    start = 0
    for number, shard in enumerate(source.shards):
        indices = range(start, start + shard["records"])
        start = indices.stop
        if shards.read_note(folder, number) is None:
            made = []
            for index in indices:
                made += make(source.read(index, **wanted))
                yield index + 1
            shards.write_shard(folder, number, made, [])
        else:
            yield start
    shards.finish(folder, settings, len(source.shards))
