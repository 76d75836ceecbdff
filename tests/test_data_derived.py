import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cache_latents, encode_examples, generate_coarse
from hi3d_jax.data.derived import derive
from hi3d_jax.data.loader import CoarseConfig, LoaderConfig, open_batches, resized_views
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.data.records import OrbitRecord, RecordError
from hi3d_jax.data.shards import write_records
from hi3d_jax.pretrained import from_pretrained
from hi3d_jax.stages.conditioning import image_token
from hi3d_jax.stages.random_model import IMAGE_ENCODER, random_networks, write_random_model
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training.batches import training_batches, validation_batches
from hi3d_jax.training.config import DataConfig, LogConfig, TrainConfig
from hi3d_jax.training.tasks import AutoencoderTask, StageTask

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


@pytest.fixture(scope="module")
def encoded(dataset, tmp_path_factory):
    """A run of stage 2 on pictures, the same run on three encoded examples of each orbit, and its networks."""
    folder, recipe = tmp_path_factory.mktemp("encoded"), Recipe.paper(2)
    recipe = dataclasses.replace(recipe, image_size=96, num_views=NUM_VIEWS)
    write_random_model(folder / "model", recipe)
    task = StageTask(recipe, random_networks(recipe)["unet"][1], (str(folder / "model"),))
    data = DataConfig(1, NUM_VIEWS, 96, coarse=CoarseConfig(), read_threads=0, folder=str(dataset))
    run = TrainConfig(task, data=data, log=LogConfig(samples_every_steps=0))
    encode_examples.encode(run, folder / "examples", draws=3)
    on_examples = dataclasses.replace(run, data=dataclasses.replace(data, folder=str(folder / "examples")))
    names = ("vae", "image_encoder", "depth")
    return run, on_examples, {name: from_pretrained(folder / "model", name) for name in names}


def test_encoded_examples_are_draws_of_what_training_would_see(dataset, encoded):
    _, on_examples, networks = encoded
    records = RecordFolder(on_examples.data.folder)
    assert [line["key"] for line in records.lines] == [f"o{n}/0@{draw}" for n in range(3) for draw in range(3)]
    vae, strengths = networks["vae"], []
    for index in range(len(records)):
        record = records[index]
        key = record.key.partition("@")[0]
        assert record.views is None
        assert record.elevation_deg == 10.0 * int(key[1])
        # The true views, from some view on.
        true = RecordFolder(dataset)[int(key[1])]
        views = resized_views(true.views, 96)[..., :3].astype(np.float32) / 127.5 - 1
        latents = np.asarray(vae.encode(jnp.asarray(views)).mean)
        distances = [np.abs(np.roll(latents, -start, axis=0) - record.arrays["latents"]).max() for start in range(4)]
        start = int(np.argmin(distances))
        assert distances[start] < 2e-3
        assert sorted(distances)[1] > 10 * distances[start]
        # View 0 is not degraded, only noisy as cond_aug says; the others are degraded.
        (strength,) = set(record.arrays["cond_aug"].tolist())
        apart = np.abs(record.arrays["coarse_latents"] - record.arrays["latents"]).mean(axis=(1, 2, 3))
        assert apart[0] < apart[1:].min() or strength > 0.1
        token = image_token(networks["image_encoder"], jnp.asarray(views[start : start + 1]))
        np.testing.assert_allclose(record.arrays["image_tokens"], np.tile(token, (NUM_VIEWS, 1)), atol=2e-3)
        strengths.append(strength)
    assert len(set(strengths)) == len(records), "every draw is another"


def test_examples_encoded_with_cached_latents_are_those_encoded_without(dataset, encoded, tmp_path):
    run, on_examples, _ = encoded
    cache_latents.cache(cache_latents.Arguments(dataset, tmp_path / "cache", run.task.networks[0], size=96))
    data = dataclasses.replace(run.data, cache_folder=str(tmp_path / "cache"), arrays=("latents",))
    encode_examples.encode(dataclasses.replace(run, data=data), tmp_path / "examples", draws=3)
    made, wanted = RecordFolder(tmp_path / "examples"), RecordFolder(on_examples.data.folder)
    assert [line["key"] for line in made.lines] == [line["key"] for line in wanted.lines]
    for index in range(len(wanted)):
        arrays = wanted[index].arrays
        for name, values in made[index].arrays.items():
            np.testing.assert_allclose(values, arrays[name], rtol=2e-3, atol=2e-3, err_msg=name)


def test_a_step_on_encoded_examples_has_the_conditions_of_one_on_pictures(encoded):
    run, on_examples, networks = encoded
    pictures = {name: jnp.asarray(value) for name, value in next(training_batches(run)).items() if name != "keys"}
    key, task = jax.random.key(3), run.task
    stored = {name: value.astype(np.float16) for name, value in task.encoded(networks, pictures, key).items()}
    batch = next(training_batches(on_examples))
    assert set(batch) == {"keys", "elevation_deg", *stored}
    assert {name: batch[name].shape for name in stored} == {name: stored[name].shape for name in stored}
    elevation = {"elevation_deg": pictures["elevation_deg"]}
    parts = task._condition_parts(networks, pictures, key)
    for made, wanted in zip(task._condition_parts({}, stored | elevation, key), parts, strict=True):
        if wanted is not None:
            np.testing.assert_allclose(made, wanted, rtol=1e-3, atol=1e-3)


def test_encoded_examples_that_do_not_fit_a_run_are_refused(encoded):
    run, on_examples, _ = encoded
    larger = dataclasses.replace(on_examples.data, image_size=192)
    with pytest.raises(ValueError, match="encoded from views of 96 pixels, not 192"):
        training_batches(dataclasses.replace(on_examples, data=larger))
    with pytest.raises(ValueError, match=r"set data.validation_folder, or log.samples_every_steps=0"):
        training_batches(dataclasses.replace(on_examples, log=LogConfig()))
    with pytest.raises(ValueError, match="encoded examples of stage 2, which this task cannot learn"):
        training_batches(dataclasses.replace(on_examples, task=AutoencoderTask()))
    learns = dataclasses.replace(run.task, image_encoder=IMAGE_ENCODER)
    for task in (learns, StageTask(Recipe.paper(1), run.task.unet)):
        with pytest.raises(ValueError, match=r"only stage 2's examples .* set data.folder to the rendered data set"):
            task.encoded_arrays()
