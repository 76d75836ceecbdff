import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cache_latents, generate_coarse
from hi3d_jax.data.derived import derive
from hi3d_jax.data.loader import CoarseConfig, LoaderConfig, open_batches, resized_views
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.data.records import OrbitRecord, RecordError
from hi3d_jax.data.shards import write_records
from hi3d_jax.pretrained import from_pretrained
from hi3d_jax.stages.random_model import write_random_model
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training.batches import training_batches, validation_batches
from hi3d_jax.training.config import DataConfig, TrainConfig
from hi3d_jax.training.tasks import AutoencoderTask

NUM_VIEWS, SIZE = 4, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "stage1"
    recipe = dataclasses.replace(Recipe.paper(1), image_size=SIZE, num_views=NUM_VIEWS)
    write_random_model(folder, recipe)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset") / "set"
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (3, NUM_VIEWS, 2 * SIZE, 2 * SIZE, 4), np.uint8)
    views[..., 3] = 255
    write_records(folder, [OrbitRecord(f"o{n}/0", views[n], elevation_deg=10.0 * n) for n in range(3)], {}, per_shard=2)
    return folder


def test_a_derived_set_goes_on_with_the_shard_that_lacks(dataset, tmp_path):
    source, made = RecordFolder(dataset), []

    def double(record):
        made.append(record.key)
        return [dataclasses.replace(record, key=f"{record.key}@{copy}") for copy in range(2)]

    work = derive(source, tmp_path / "made", {"copies": 2}, double)
    # Interrupted in the second shard.
    assert [next(work) for _ in range(3)] == [1, 2, 3]
    work.close()
    with pytest.raises(RecordError, match="not finished"):
        RecordFolder(tmp_path / "made")
    assert list(derive(source, tmp_path / "made", {"copies": 2}, double)) == [2, 3]
    assert made == ["o0/0", "o1/0", "o2/0", "o2/0"]
    assert [line["key"] for line in RecordFolder(tmp_path / "made").lines] == [
        f"o{n}/0@{copy}" for n in range(3) for copy in range(2)
    ]
    with pytest.raises(RecordError, match=r"begun with \{'copies': 2\}, not \{'copies': 3\}"):
        next(derive(source, tmp_path / "made", {"copies": 3}, double))


def test_cached_latents_and_tokens_are_what_the_networks_make_of_the_views(dataset, model, tmp_path):
    # Three views at a time: the last part has to be filled up.
    arguments = cache_latents.Arguments(dataset, tmp_path / "cache", str(model), size=SIZE, batch=3)
    cache_latents.cache(arguments)
    config = LoaderConfig(1, NUM_VIEWS, SIZE, read_threads=0, arrays=cache_latents.NAMES)
    batch = next(open_batches(RecordFolder(dataset), config, seed=0, cache=RecordFolder(tmp_path / "cache")))
    images = jnp.asarray(batch["views"][0, ..., :3].astype(np.float32) / 127.5 - 1)
    latents = from_pretrained(model, "vae").encode(images).mean
    assert batch["latents"].dtype == np.float16
    # float16 keeps 11 bits.
    np.testing.assert_allclose(batch["latents"][0], latents, rtol=1e-3, atol=1e-3)
    assert batch["image_tokens"].shape == (1, NUM_VIEWS, 16)
    assert np.abs(np.diff(batch["image_tokens"][0], axis=0)).max() > 1e-3
    held, larger = RecordFolder(tmp_path / "cache"), dataclasses.replace(config, image_size=2 * SIZE)
    with pytest.raises(RecordError, match="made for views of 32 pixels, not 64"):
        open_batches(RecordFolder(dataset), larger, seed=0, cache=held)
    write_records(tmp_path / "other", [RecordFolder(dataset)[0]], {})
    with pytest.raises(RecordError, match=r"was not made from .*other"):
        open_batches(RecordFolder(tmp_path / "other"), config, seed=0, cache=held)
    # A run whose records are cached validates on others, which are not.
    folders = {"folder": dataset, "validation_folder": tmp_path / "other", "cache_folder": tmp_path / "cache"}
    data = DataConfig(1, NUM_VIEWS, SIZE, arrays=cache_latents.NAMES, **{n: str(f) for n, f in folders.items()})
    run = TrainConfig(task=AutoencoderTask(), data=data)
    assert set(next(training_batches(run))) == set(next(validation_batches(run))) | set(cache_latents.NAMES)


def test_stage_ones_orbits_become_stage_twos_input(dataset, model, tmp_path, monkeypatch):
    asked = []

    def multiview(model, image, *, elevation_deg, seed, **rest):
        """In place of the sampler, whose compilation takes long and which has tests of its own."""
        asked.append((elevation_deg, seed))
        return np.stack([image, *(np.full_like(image, 60 * view) for view in range(1, NUM_VIEWS))])

    monkeypatch.setattr(generate_coarse, "multiview", multiview)
    generate_coarse.generate(generate_coarse.Arguments(dataset, tmp_path / "coarse", str(model), starts=2))
    coarse = RecordFolder(tmp_path / "coarse")
    assert len(coarse) == len({seed for _, seed in asked}) == 6
    assert [elevation for elevation, _ in asked] == [0.0, 0.0, 10.0, 10.0, 20.0, 20.0]
    source = RecordFolder(dataset)
    for line in coarse.lines:
        key, _, start = line["key"].rpartition("@")
        input_view = resized_views(source[source.index_of_key[key]].views, SIZE)[int(start)]
        np.testing.assert_array_equal(coarse[coarse.index_of_key[line["key"]]].views[0], input_view)
    config = LoaderConfig(3, NUM_VIEWS, SIZE, read_threads=0, coarse=CoarseConfig(stage1_share=1.0))
    batch = next(open_batches(source, config, seed=0, stage1=coarse))
    np.testing.assert_array_equal(batch["coarse"][:, 0], batch["views"][:, 0, ..., :3])
    assert (batch["coarse"][:, 1:] == np.array([60, 120, 180])[:, None, None, None]).all()
