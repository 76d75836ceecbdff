"""The tasks' losses: shapes for every recipe, dropping and caches, closed forms of their parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hi3d_jax.models.depth import depth_input
from hi3d_jax.models.unet import UNetConfig
from hi3d_jax.models.vae import Posterior
from hi3d_jax.pretrained import from_pretrained, parameters
from hi3d_jax.stages.random_model import IMAGE_ENCODER, random_networks, write_random_model
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training import sharding
from hi3d_jax.training.batches import example_orbit
from hi3d_jax.training.config import DataConfig, LoRAConfig, MeshConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.program import TrainProgram, count_parameters
from hi3d_jax.training.tasks import DepthTask, StageTask
from hi3d_jax.training.tasks.autoencoder import kl, random_crops
from hi3d_jax.training.tasks.decoded_loss import DecodedLossConfig
from hi3d_jax.training.tasks.depth import aligned, gradient_matching, stretched
from hi3d_jax.training.tasks.pictures import grid, over_white, psnr


def shapes(task: StageTask, **changes) -> TrainProgram:
    config = TrainConfig(task, data=DataConfig(batch_size=2), **changes)
    return TrainProgram(config, sharding.make_mesh(MeshConfig(1), jax.devices()[:1]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders with all networks of the four recipes at the smallest size."""
    made = {}
    for stage in (1, 2):
        for recipe in (Recipe.paper(stage), Recipe.official(stage)):
            folder = tmp_path_factory.mktemp("networks") / recipe.name
            small = dataclasses.replace(recipe, num_views=2, image_size=96, num_steps=2)
            write_random_model(folder, small)
            made[stage, recipe.name] = folder, small
    return made


@pytest.mark.parametrize("name", ["paper", "official"])
@pytest.mark.parametrize("stage", [1, 2])
def test_both_stages_learn_under_both_recipes(folders, stage, name):
    folder, recipe = folders[stage, name]
    unet = random_networks(recipe)["unet"][1]
    # The paper's first stage learns its image encoder too; the second passes pictures one at a time and decodes some.
    own = IMAGE_ENCODER if (stage, name) == (1, "paper") else None
    decoded = DecodedLossConfig(views=stage - 1)
    task = StageTask(recipe, unet, (str(folder),), own, views_at_a_time=stage - 1, decoded=decoded)
    program = shapes(task)
    assert set(program.state.params) == ({"unet", "image_encoder"} if own else {"unet"})
    batch = {
        "views": jax.ShapeDtypeStruct((2, 2, 96, 96, 4), np.uint8),
        "elevation_deg": jax.ShapeDtypeStruct((2,), np.float32),
    }
    if stage == 2:
        batch["coarse"] = jax.ShapeDtypeStruct((2, 2, 96, 96, 3), np.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    loss, metrics = jax.eval_shape(program.loss, program.state.params, program.frozen, batch, key)
    assert (loss.shape, loss.dtype) == ((), np.float32)
    assert ({"latent_error", "decoded_error"} <= set(metrics)) == (stage == 2)
    if (stage, name) == (2, "official"):
        rows, metrics = jax.eval_shape(program.samples, program.state, program.frozen, batch, key)
        assert [row.shape for row in rows] == [(2, 96, 96, 3)] * 6, "true, coarse and made views of two videos"
        assert set(metrics) == {"sample_psnr", "coarse_psnr"}


def test_caches_replace_the_networks_that_made_them(folders):
    folder, recipe = folders[1, "paper"]
    task = StageTask(recipe, random_networks(recipe)["unet"][1], (str(folder),))
    vae, tokens = random_networks(recipe)["vae"][1], np.arange(24.0).reshape(2, 2, 6).astype(np.float16)

    class Network(nnx.Module):
        config = vae

        def encode(self, images):
            cells = jnp.broadcast_to(images[:, ::8, ::8, :1], (len(images), 12, 12, 4))
            return Posterior(cells, jnp.ones_like(cells))

    class Never(nnx.Module):
        config = IMAGE_ENCODER

        def __call__(self, images):
            raise AssertionError("the image encoder is asked although its tokens are there")

    orbits = [example_orbit(index, DataConfig(num_views=2, image_size=96)) for index in (0, 1)]
    batch = {
        "views": jnp.stack([jnp.asarray(orbit.views) for orbit in orbits]),
        "elevation_deg": jnp.array([0.0, 30.0]),
        "latents": jnp.full((2, 2, 12, 12, 4), 3, jnp.float16),
        "image_tokens": jnp.asarray(tokens),
    }
    parts = task._condition_parts({"vae": Network(), "image_encoder": Never()}, batch, jax.random.key(0))
    np.testing.assert_array_equal(parts.image_token, tokens[:, 0].astype(np.float32))
    assert 0 < float(parts.cond_aug.min()) < float(parts.cond_aug.max()) < 1
    scaled = task._latents(Network(), batch, jax.random.key(0))
    np.testing.assert_allclose(scaled, 3 * vae.scaling_factor, rtol=1e-6)
    del batch["latents"]
    drawn = task._latents(Network(), batch, jax.random.key(0)) / vae.scaling_factor
    mean = over_white(batch["views"])[:, :, ::8, ::8, :1]
    assert float((drawn - mean).std()) == pytest.approx(1, abs=0.1), "latents are drawn, not their mean"


class Decoder(nnx.Module):
    """Latents' first three channels are the colours."""

    config = random_networks(Recipe.paper(2))["vae"][1]

    def decode(self, latents):
        return jnp.tanh(jnp.repeat(latents[..., :3], 8, axis=1))


def test_decoded_views_are_those_of_the_latents_and_their_error_reaches_the_network(folders):
    networks, config = {"vae": Decoder()}, DecodedLossConfig(views=1, weight=3.0)
    rng = np.random.default_rng(0)
    truth, made = (jnp.asarray(rng.normal(size=(2, 3, 4, 4, 4)), jnp.float32) for _ in range(2))
    score = jax.jit(jax.value_and_grad(lambda x, key: config.loss(networks, x, truth, key), has_aux=True))
    scores, gradients = zip(*[score(made, jax.random.key(seed)) for seed in range(8)], strict=True)
    pictures = [Decoder().decode(x.reshape(-1, 4, 4, 4) / Decoder.config.scaling_factor) for x in (made, truth)]
    each = np.square(pictures[0] - pictures[1]).mean((1, 2, 3)).reshape(2, 3)
    # One view of each video is decoded; which of them hangs on the key.
    expected = np.add.outer(each[0], each[1]) / 2
    for total, metrics in scores:
        assert np.isclose(float(metrics["decoded_error"]), expected, rtol=1e-4).any()
        np.testing.assert_allclose(total, 3 * metrics["decoded_error"], rtol=1e-6)
    assert len({float(total) for total, _ in scores}) > 1
    assert all((np.abs(gradient).max((2, 3, 4)) > 0).sum() == 2 for gradient in gradients), "one view of each of two"
    with pytest.raises(ValueError, match="lpips_alex"):
        dataclasses.replace(config, lpips=str(folders[2, "paper"][0])).frozen()


def test_low_rank_updates_are_all_that_learns(folders):
    folder, recipe = folders[1, "official"]
    task = StageTask(recipe, random_networks(recipe)["unet"][1], (str(folder),))
    program, whole = shapes(task, lora=LoRAConfig(rank=2)), shapes(task)
    assert count_parameters(program.state.params) < 0.1 * count_parameters(whole.state.params)
    assert set(program.frozen) == {*whole.frozen, "unet"}
    networks = jax.eval_shape(program.networks, program.state.params, program.frozen)
    assert set(networks) == {*whole.frozen, "unet"}
    with pytest.raises(ValueError, match=r"matches no matrix of unet"):
        shapes(task, lora=LoRAConfig(rank=2, paths="nothing"))


def test_training_starts_from_a_model_folder_whatever_its_memory_policy(folders):
    folder, recipe = folders[1, "paper"]
    unet = dataclasses.replace(random_networks(recipe)["unet"][1], remat="block")
    task = StageTask(recipe, unet, (str(folder),))
    values = shapes(task, start=str(folder))._first_values()
    stored = parameters(from_pretrained(folder, "unet"))
    jax.tree.map(np.testing.assert_array_equal, values["unet"], dict(stored))
    wider = dataclasses.replace(unet, block_channels=(64, 64))
    with pytest.raises(ValueError, match=r"unet of .* is UNet with .* the run wants"):
        shapes(dataclasses.replace(task, unet=wider), start=str(folder))._first_values()
    with pytest.raises(ValueError, match=r"batch_size=2 in optimizer.accumulate=2 parts does not divide"):
        TrainProgram(
            TrainConfig(task, data=DataConfig(batch_size=2), optimizer=OptimizerConfig(accumulate=2)),
            sharding.make_mesh(MeshConfig(2), jax.devices()[:2]),
        )


def test_networks_that_are_nowhere_are_named(folders):
    folder, recipe = folders[1, "paper"]
    task = StageTask(Recipe.official(1), UNetConfig.tiny(), (str(folder),))
    with pytest.raises(ValueError, match="has 'aesthetic_encoder'"):
        task.frozen()
    task = StageTask(recipe, UNetConfig(vector_dim=512, block_channels=(32,), num_heads=(1,), attention=(False,)))
    with pytest.raises(ValueError, match=r"no folder is given for the network 'vae': set task\.networks"):
        shapes(task).frozen_values()


def test_pictures_between_bytes_and_networks():
    views = np.zeros((1, 2, 2, 4), np.uint8)
    views[0, 0, 0] = 255, 0, 51, 255
    views[0, 0, 1] = 0, 0, 0, 51
    got = over_white(jnp.asarray(views))
    np.testing.assert_allclose(got[0, 0], [[1, -1, -0.6], [0.6, 0.6, 0.6]], atol=1e-6)
    np.testing.assert_allclose(over_white(jnp.asarray(views[..., :3]))[0, 1], -1)
    grey = jnp.zeros((1, 2, 2, 3))
    assert float(psnr(grey + 0.02, grey)[0]) == pytest.approx(40, abs=1e-3), "1/100 of the range"
    picture = grid([np.full((3, 2, 2, 3), 1.0), np.full((3, 2, 2, 3), -2.0)])
    assert picture.shape == (4, 6, 3)
    assert picture[:2].min() == 255
    assert picture[2:].max() == 0
    crops = random_crops(jnp.arange(64.0).reshape(1, 8, 8, 1).repeat(3, -1).repeat(50, 0), 4, jax.random.key(0))
    corners = np.asarray(crops[:, 0, 0, 0]).astype(int)
    assert set(corners // 8) == set(corners % 8) == set(range(5)), "every place, up to the edge"
    np.testing.assert_array_equal(crops[0, :, :, 0] - crops[0, 0, 0, 0], np.arange(4) + 8 * np.arange(4)[:, None])


def test_the_divergence_of_latents():
    mean, std = jnp.array([0.0, 2.0]), jnp.array([1.0, 0.5])
    expected = [0, 0.5 * (4 + 0.25 - 1 - np.log(0.25))]
    np.testing.assert_allclose(
        kl(Posterior(*(x.reshape(1, 1, 1, 2) for x in (mean, std))))[0, 0, 0], expected, rtol=1e-6
    )


def test_disparity_counts_up_to_scale_and_shift():
    rng = np.random.default_rng(0)
    truth = jnp.asarray(rng.normal(size=(2, 16, 16)).astype(np.float32))
    for function in (aligned, stretched):
        np.testing.assert_allclose(function(3 * truth - 7), function(truth), atol=1e-5)
        assert not np.asarray(function(jnp.ones((1, 16, 16)))).any(), "a constant map divides by nothing"
    assert np.isfinite(jax.grad(lambda x: aligned(x).sum())(jnp.ones((1, 16, 16)))).all()
    ramp = jnp.broadcast_to(jnp.arange(16.0).reshape(1, 1, 16), (1, 16, 16))
    assert float(gradient_matching(ramp)) == pytest.approx(1 + 2 + 4 + 8)


def test_depth_is_learnt_from_what_stage_2_shows():
    rng, shown = np.random.default_rng(0), []
    depths = np.zeros((1, 2, 256, 256), np.float32)
    depths[:, 1, :, :128] = 1.25
    batch = {
        "views": jnp.asarray(rng.integers(256, size=(1, 2, 256, 256, 4)), jnp.uint8),
        "coarse": jnp.asarray(rng.integers(256, size=(1, 2, 256, 256, 3)), jnp.uint8),
        "depths": jnp.asarray(depths),
    }
    half = np.where(np.arange(96) < 48, 0.8, 1 / 2.4) * np.ones((96, 1))

    class Knowing(nnx.Module):
        def __call__(self, images):
            shown.append(images)
            return jnp.asarray(np.stack([np.ones((96, 96)), 7 * half - 3]), jnp.float32)

    networks = {"depth": Knowing()}
    task = DepthTask(log_noise=(-20.0, 0.0), anchor_weight=0.0)
    loss, _ = task.loss(networks, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(0, abs=1e-5), "the truth at the network's size, up to scale and shift"
    np.testing.assert_allclose(shown[0], depth_input(over_white(batch["coarse"][0])), atol=1e-4)
    rows, _ = task.samples(networks, {**batch, "depths": jnp.asarray(depths[..., ::-1])}, jax.random.key(0))
    np.testing.assert_allclose(rows[1][1, ..., 0], -rows[2][1, ..., 0], atol=1e-5)
    del batch["coarse"]
    task.loss(networks, batch, jax.random.key(0))
    np.testing.assert_allclose(shown[-1], depth_input(over_white(batch["views"][0])), atol=1e-4)
