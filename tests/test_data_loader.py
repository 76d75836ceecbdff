import numpy as np
import pytest

from hi3d_jax import images
from hi3d_jax.data.degrade import Degradation
from hi3d_jax.data.loader import (
    CoarseConfig,
    LoaderConfig,
    open_batches,
    over_white_bytes,
    resized_depths,
    resized_views,
)
from hi3d_jax.data.record_folder import RecordFolder, RecordList
from hi3d_jax.data.records import OrbitRecord, RecordError
from hi3d_jax.data.shards import write_records

NUM_VIEWS, SIZE = 6, 16
# Nine of one kind, two of another, one of a third.
CATEGORIES = ["many"] * 9 + ["few"] * 2 + ["one"]


def make_record(number):
    """Everything in it tells the record and the view."""
    views = np.full((NUM_VIEWS, SIZE, SIZE, 4), 255, np.uint8)
    views[..., 0], views[..., 1] = 10 * number, 20 * np.arange(NUM_VIEWS)[:, None, None]
    views[:, :4, :, 3] = 0
    views[:, :4, :, :3] = 255
    depths = np.broadcast_to(1000 * np.arange(NUM_VIEWS, dtype=np.uint16)[:, None, None], (NUM_VIEWS, SIZE, SIZE))
    tokens = np.stack([np.full(3, 100 * number + view, np.float32) for view in range(NUM_VIEWS)])
    about = {"category": CATEGORIES[number]}
    return OrbitRecord(f"thing{number}/0", views, depths, float(number), about=about, arrays={"tokens": tokens})


@pytest.fixture(scope="module")
def orbits():
    return RecordList([make_record(number) for number in range(12)])


def small(**changes):
    return LoaderConfig(**{"batch_size": 4, "num_views": NUM_VIEWS, "image_size": SIZE, "read_threads": 0, **changes})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def view_of(batch):
    """Which view of its orbit every view of a batch is."""
    return batch["views"][:, :, SIZE // 2, 0, 1].astype(int) // 20


def test_an_epoch_shows_every_orbit_once_and_the_next_one_in_another_order(orbits):
    batches = open_batches(orbits, small(), seed=0)
    first, second = (np.concatenate([batch["keys"] for batch in take(batches, 3)]) for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(orbits.index_of_key)
    assert list(first) != list(second)
    other = np.concatenate([batch["keys"] for batch in take(open_batches(orbits, small(), seed=1), 3)])
    assert list(first) != list(other)


def test_orbits_start_at_any_view_and_everything_turns_along(orbits):
    batches = take(open_batches(orbits, small(depths=True, arrays=("tokens",)), seed=0), 30)
    starts = []
    for batch in batches:
        assert batch["views"].dtype == np.uint8
        assert batch["elevation_deg"].dtype == batch["depths"].dtype == np.float32
        views = view_of(batch)
        np.testing.assert_array_equal(views, (views[:, :1] + np.arange(NUM_VIEWS)) % NUM_VIEWS)
        numbers = batch["elevation_deg"].astype(int)
        assert batch["keys"].tolist() == [f"thing{number}/0" for number in numbers]
        np.testing.assert_array_equal(batch["views"][:, 0, -1, 0, 0], 10 * numbers)
        np.testing.assert_allclose(batch["depths"][:, :, 0, 0], views / 10, atol=1e-6)
        np.testing.assert_array_equal(batch["tokens"][..., 0], 100 * numbers[:, None] + views)
        starts += views[:, 0].tolist()
    # 120 draws of six: 20 each, standard deviation 4.
    assert np.bincount(starts, minlength=NUM_VIEWS).min() > 4
    fixed = take(open_batches(orbits, small(roll=False), seed=0), 3)
    assert all((view_of(batch) == np.arange(NUM_VIEWS)).all() for batch in fixed)


def test_fewer_views_are_a_random_part_in_order_that_begins_with_the_input_view(orbits):
    views = np.concatenate([view_of(b) for b in take(open_batches(orbits, small(num_views=3), seed=0), 15)])
    assert views.shape == (60, 3)
    steps = (views - views[:, :1]) % NUM_VIEWS
    assert (np.diff(steps) > 0).all()
    assert len({tuple(row) for row in steps}) == 10  # all pairs of the five other views


def test_training_goes_on_where_it_was_left_whoever_reads(orbits, tmp_path):
    config = small(coarse=CoarseConfig(), category_power=0.5)
    whole = take(open_batches(orbits, config, seed=3), 6)
    iterator = open_batches(orbits, small(coarse=CoarseConfig(), category_power=0.5, read_threads=3), seed=3)
    assert_same(take(iterator, 2), whole[:2])
    state = iterator.get_state()
    resumed = open_batches(orbits, config, seed=3)
    resumed.set_state(state)
    assert_same(take(resumed, 4), whole[2:])
    # The same batches by two processes, which see the files.
    write_records(tmp_path / "set", [orbits[index] for index in range(12)], {}, per_shard=5)
    parts = []
    for process in range(2):
        own = open_batches(RecordFolder(tmp_path / "set"), config, seed=3, process_index=process, process_count=2)
        own.set_state(state)
        parts.append(take(own, 4))
    joined = [
        {name: np.concatenate([one[name], other[name]]) for name in one} for one, other in zip(*parts, strict=True)
    ]
    assert_same(joined, whole[2:])


def test_categories_are_drawn_as_their_power_says(orbits):
    for power, shares in ((0.0, (1 / 3, 1 / 3, 1 / 3)), (0.5, (3 / 5.414, 1.414 / 5.414, 1 / 5.414))):
        batches = take(open_batches(orbits, small(category_power=power, batch_size=300, num_views=1), seed=0), 1)
        drawn = [CATEGORIES[int(number)] for number in batches[0]["elevation_deg"]]
        for name, share in zip(("many", "few", "one"), shares, strict=True):
            assert np.mean([one == name for one in drawn]) == pytest.approx(share, abs=0.1)


def test_validation_is_in_order_and_always_the_same(orbits):
    assert next(open_batches(orbits, small(batch_size=1), seed=0, shuffle=False))["keys"].tolist() == ["thing0/0"]
    batches = take(open_batches(orbits, small(coarse=CoarseConfig()), seed=0, shuffle=False), 6)
    assert [key for batch in batches[:3] for key in batch["keys"]] == list(orbits.index_of_key)
    assert_same(batches[:3], batches[3:])
    assert (view_of(batches[0]) == np.arange(NUM_VIEWS)).all()


def test_coarse_views_are_degraded_ones_or_stage_ones_from_the_same_start(orbits):
    generated = []
    for number in range(6):
        for start in (1, 4):
            views = np.roll(make_record(number).views, -start, axis=0)
            views[..., 2] = 77
            generated.append(OrbitRecord(f"thing{number}/0@{start}", views[:, ::2, ::2]))
    config = small(coarse=CoarseConfig(Degradation(), stage1_share=0.5), depths=True)
    batches = take(open_batches(orbits, config, seed=0, stage1=RecordList(generated)), 30)
    from_stage1 = 0
    for batch in batches:
        for row in range(4):
            views, coarse = batch["views"][row], batch["coarse"][row]
            np.testing.assert_array_equal(coarse[0], over_white_bytes(views)[0])
            if (coarse[1:, -1, 0, 2] == 77).all():
                from_stage1 += 1
                assert view_of(batch)[row, 0] in (1, 4)
                np.testing.assert_array_equal(coarse[:, -1, 0, :2], views[:, -1, 0, :2])
    # Half of the six objects that have some: 30 of 120, standard deviation 4.7.
    assert 12 <= from_stage1 <= 48
    for absent in ({"stage1": None}, {"stage1": RecordList(generated[:0])}):
        assert "coarse" in next(open_batches(orbits, config, seed=0, **absent))


def test_cached_arrays_replace_views(orbits):
    cache = RecordList([OrbitRecord(f"thing{n}/0", arrays={"latents": np.arange(6.0) + 10 * n}) for n in range(12)])
    batch = next(open_batches(orbits, small(views=False, arrays=("latents",)), seed=0, cache=cache))
    assert set(batch) == {"elevation_deg", "keys", "latents"}
    expected = (batch["latents"][:, :1] % 10 + np.arange(6)) % 6 + 10 * batch["elevation_deg"][:, None]
    np.testing.assert_array_equal(batch["latents"], expected)
    with pytest.raises(ValueError, match="nothing of the cache is asked for"):
        open_batches(orbits, small(), seed=0, cache=cache)
    partial = RecordList([cache[0]])
    with pytest.raises(RecordError, match="cache has nothing for record thing"):
        take(open_batches(orbits, small(arrays=("latents",)), seed=0, cache=partial), 3)


def test_resizing_takes_exact_means_of_what_is_visible():
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (2, 24, 24, 4), np.uint8)
    views[:, :12, :12, 3] = 0
    for size in (12, 8):
        made = resized_views(views, size)
        exact = np.stack([images.resize(view.astype(np.float32) / 255, size, size) for view in views])
        np.testing.assert_allclose(made[..., 3] / 255, exact[..., 3], atol=0.5 / 255 + 1e-4)
        np.testing.assert_allclose(made[..., :3] / 255, exact[..., :3], atol=0.5 / 255 + 1e-4)
    assert resized_views(views, 36).shape == (2, 36, 36, 4)
    assert (resized_views(views, 12)[:, :6, :6, :3] == 255).all()
    depths = rng.integers(0, 65536, (1, 6, 6), np.uint16)
    np.testing.assert_array_equal(resized_depths(depths, 2)[0] * 10_000, depths[0, 1::3, 1::3].astype(np.float32))


def test_random_backgrounds_are_one_opaque_colour_an_orbit(orbits):
    batch = next(open_batches(orbits, small(background="random"), seed=0))
    assert (batch["views"][..., 3] == 255).all()
    corners = batch["views"][:, :, :4, :, :3].reshape(4, -1, 3)
    assert (corners == corners[:, :1]).all()
    assert len({tuple(corner) for corner in corners[:, 0]}) == 4
    np.testing.assert_array_equal(batch["views"][:, 0, -1, 0, 0], 10 * batch["elevation_deg"])


def test_what_does_not_go_together_is_said(orbits):
    for changes, message in (
        ({"batch_size": 0}, "batch_size 0"),
        ({"views": False, "coarse": CoarseConfig()}, "coarse views are made from views"),
        ({"background": "random", "coarse": CoarseConfig()}, "background 'white'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_batches(orbits, small(**changes), seed=0)
    with pytest.raises(ValueError, match="4 does not divide by 3 processes"):
        open_batches(orbits, small(), seed=0, process_count=3)
    with pytest.raises(RecordError, match="has 6 views where 16 are wanted"):
        next(open_batches(orbits, small(num_views=16), seed=0))
    bare = RecordList([OrbitRecord("x/0", views=make_record(0).views)])
    with pytest.raises(RecordError, match="holds no depths"):
        next(open_batches(bare, small(depths=True), seed=0))
