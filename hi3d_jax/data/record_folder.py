"""Random access to a data set's records (shards.py tells of its files), for grain and for looking at them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from hi3d_jax.data.records import OrbitRecord, RecordError, Select, decode, manifest_line
from hi3d_jax.data.shards import FORMAT, sha256


class RecordFolder:
    """The records of a data set, in the order of its manifest. Opening it compares the sizes of the shards.

    Raises `RecordError` for a folder that is no data set, is not complete, or whose shards are missing or cut short.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.settings: dict = manifest["settings"]
        self.shards: list[dict] = manifest["shards"]
        with open(self.folder / "manifest.jsonl") as file:
            self.lines: list[dict] = [json.loads(line) for line in file]
        self._ends = np.cumsum([shard["records"] for shard in self.shards], dtype=np.int64)
        for shard in self.shards:
            self._check_size(shard)
        total = int(self._ends[-1]) if len(self._ends) else 0
        if total != len(self.lines) or not total:
            raise RecordError(f"{self.folder} lists {len(self.lines)} records, its shards {total}; render it again")
        self.index_of_key = {line["key"]: index for index, line in enumerate(self.lines)}
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> OrbitRecord:
        return self.read(index)

    def __getstate__(self) -> dict:
        # Readers hold file handles, which do not travel to the loader's worker processes.
        return {**self.__dict__, "_readers": {}}

    def read(self, index: int, **wanted) -> OrbitRecord:
        """Record `index`, of which `wanted` (see `records.decode`) is decompressed. Raises `RecordError`, naming it."""
        shard, place = self._place(int(index))
        name = f"record {place} ({self.lines[int(index)]['key']}) of {self._path(shard)}"
        try:
            data = self._reader(shard).read([place])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            raise RecordError(f"{name} is damaged: {error}; copy or render the shard again") from error
        try:
            return decode(data, **wanted)
        except RecordError as error:
            raise RecordError(f"{name}: {error}") from error

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _path(self, shard: int) -> Path:
        return self.folder / "shards" / self.shards[shard]["file"]

    def _reader(self, shard: int):
        if shard not in self._readers:
            # No read-ahead: the order of reading is random.
            self._readers[shard] = array_record_module.ArrayRecordReader(
                str(self._path(shard)), "readahead_buffer_size:0"
            )
        return self._readers[shard]

    def _check_size(self, shard: dict) -> None:
        path = self.folder / "shards" / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise RecordError(f"{path} is missing; copy it, or run the rendering again: it makes what is absent")
        if size != shard["bytes"]:
            raise RecordError(
                f"{path} has {size} bytes where the manifest says {shard['bytes']}: it is cut short or was changed; "
                "delete it and run the rendering again"
            )


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not path.is_file():
        hint = "its rendering has not finished; run it again" if (folder / "plan.json").is_file() else "give the folder"
        raise RecordError(f"{folder} is not a finished data set (no {path.name}): {hint}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise RecordError(f"{path} is damaged ({error}); render the data set again") from error
    if manifest.get("format") != FORMAT:
        raise RecordError(f"{path} is of format {manifest.get('format')!r}, not {FORMAT}; render it again")
    return manifest


class RecordList:
    """Records in memory with the interface of `RecordFolder`: for tests and for pictures made on the fly."""

    def __init__(self, records: Sequence[OrbitRecord]):
        self._records = list(records)
        self.lines = [manifest_line(record) for record in self._records]
        self.index_of_key = {line["key"]: index for index, line in enumerate(self.lines)}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> OrbitRecord:
        return self._records[index]

    def read(self, index: int, *, views=True, depths=True, arrays=None, select: Select | None = None) -> OrbitRecord:
        """Record `index` with what `records.decode` would give. Raises `RecordError` for arrays it does not have."""
        record = self._records[index]
        absent = sorted(set(arrays or ()) - set(record.arrays))
        if absent:
            raise RecordError(f"record {record.key} has no arrays {absent}, only {sorted(record.arrays)}")
        names = record.arrays if arrays is None else arrays
        record = dataclasses.replace(
            record,
            views=record.views if views else None,
            depths=record.depths if depths else None,
            arrays={name: record.arrays[name] for name in names},
        )
        return record if select is None else record.selected(select(self._records[index].num_views))


def verify(folder: str | Path) -> list[str]:
    """Reads everything: a line for each shard whose SHA-256 differs and for each record that does not decode."""
    try:
        records = RecordFolder(folder)
    except RecordError as error:
        return [str(error)]
    problems = []
    for shard in records.shards:
        path = records.folder / "shards" / shard["file"]
        if sha256(path) != shard["sha256"]:
            problems.append(f"{path} does not have the SHA-256 of the manifest; copy or render it again")
    for index in range(len(records)):
        try:
            records[index]
        except RecordError as error:
            problems.append(str(error))
    return problems
