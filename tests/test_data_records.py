import dataclasses
import json

import msgpack
import numpy as np
import pytest

from hi3d_jax.data import records
from hi3d_jax.data.record_folder import RecordFolder, RecordList, verify
from hi3d_jax.data.records import OrbitRecord, RecordError, decode, encode
from hi3d_jax.data.shards import write_records


def make_record(number, num_views=3, size=12):
    rng = np.random.default_rng(number)
    return OrbitRecord(
        key=f"thing{number}/0",
        views=rng.integers(0, 256, (num_views, size, size, 4), np.uint8),
        depths=rng.integers(0, 65536, (num_views, size, size), np.uint16),
        elevation_deg=12.5,
        azimuth_deg=-30.0,
        radius=1.5,
        fov_deg=49.1,
        about={"category": "tüten", "object_id": f"thing{number}"},
        arrays={
            "latents": rng.standard_normal((num_views, 2, 2, 4)).astype(np.float16),
            "tokens": rng.standard_normal((num_views, 5)).astype(np.float32),
        },
    )


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "set", [make_record(number) for number in range(5)], {"size": 12}, per_shard=2)
    return tmp_path / "set"


def assert_same(one, other):
    assert one.key == other.key
    assert dict(one.about) == dict(other.about)
    assert [getattr(one, name) for name in records.SCALARS] == [getattr(other, name) for name in records.SCALARS]
    np.testing.assert_array_equal(one.views, other.views)
    np.testing.assert_array_equal(one.depths, other.depths)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype
        np.testing.assert_array_equal(array, other.arrays[name])


def test_records_read_back_bit_for_bit_whole_or_in_part(folder):
    held = RecordFolder(folder)
    assert len(held) == 5
    assert held.lines[3] == {
        "key": "thing3/0",
        "elevation_deg": 12.5,
        "azimuth_deg": -30.0,
        "category": "tüten",
        "object_id": "thing3",
    }
    for index in (4, 0, 3):
        assert_same(held[index], make_record(index))
        assert_same(held.read(index, select=lambda n: [2, 0]), make_record(index).selected([2, 0]))
    part = held.read(1, views=False, depths=False, arrays=("tokens",))
    assert part.views is part.depths is None
    assert list(part.arrays) == ["tokens"]
    in_memory = RecordList([make_record(1)]).read(0, depths=False, arrays=("tokens",), select=lambda n: [n - 1])
    np.testing.assert_array_equal(in_memory.views, held[1].views[2:])
    opaque = dataclasses.replace(make_record(0), views=np.full((2, 9, 9, 4), 255, np.uint8), depths=None, arrays={})
    assert decode(encode(opaque)).views.shape == (2, 9, 9, 4)
    assert verify(folder) == []


def test_depths_keep_four_digits():
    depth = np.float32([[0.73251, 1.5, np.inf]])
    units = records.depth_to_units(depth)
    np.testing.assert_allclose(records.units_to_depth(units), [[0.73251, 1.5, 0]], atol=5.1e-5)


def test_every_flipped_bit_of_a_record_is_noticed():
    data = encode(make_record(0))
    rng = np.random.default_rng(0)
    for position in [*range(20), *rng.integers(0, len(data), 200).tolist()]:
        spoilt = bytearray(data)
        spoilt[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(RecordError, match=r"checksum|not an orbit record"):
            decode(bytes(spoilt))


def test_a_flipped_bit_on_disk_names_shard_and_record_and_spares_the_others(folder):
    path = folder / "shards" / "00001.array_record"
    content = bytearray(path.read_bytes())
    # Some byte of the second record's pictures.
    place = content.rindex(encode(make_record(3))[-3000:-2900])
    content[place + 50] ^= 16
    path.write_bytes(content)
    held = RecordFolder(folder)
    with pytest.raises(RecordError, match=r"record 1 \(thing3/0\) of .*00001\.array_record"):
        held[3]
    assert_same(held[2], make_record(2))
    problems = verify(folder)
    assert len(problems) == 2
    assert "00001.array_record does not have the SHA-256" in problems[0]
    assert "thing3/0" in problems[1]


def test_sets_that_are_not_whole_are_refused(folder, tmp_path):
    shard = folder / "shards" / "00000.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(RecordError, match="cut short"):
        RecordFolder(folder)
    assert "cut short" in verify(folder)[0]
    shard.unlink()
    with pytest.raises(RecordError, match="missing"):
        RecordFolder(folder)
    shard.write_bytes(content)
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    (folder / "manifest.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(RecordError, match="lists 4 records, its shards 5"):
        RecordFolder(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(RecordError, match="format 9"):
        RecordFolder(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RecordError, match="damaged"):
        RecordFolder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="not a finished data set"):
        RecordFolder(tmp_path / "empty")


def test_what_is_not_stored_or_not_there_is_refused(folder):
    with pytest.raises(RecordError, match="'x' is object"):
        encode(OrbitRecord("k", arrays={"x": np.array([{}])}))
    with pytest.raises(RecordError, match=r"no arrays \['clip'\]"):
        RecordFolder(folder).read(0, arrays=("clip",))
    with pytest.raises(RecordError, match="no arrays"):
        RecordList([make_record(0)]).read(0, arrays=("clip",))
    # A record whose checksum is right but whose content is not ours.
    payload = msgpack.packb({"key": "k", "about": {}, "arrays": {"x": ["object", [1], b"12345678"]}})
    forged = records.MAGIC + records.zlib.crc32(payload).to_bytes(4, "little") + payload
    with pytest.raises(RecordError, match="array of 'object'"):
        decode(forged)
