"""Conditions: in the recipe's order, left out as often as it says, and made by the stages of the right pictures."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hi3d_jax.models.embeddings import aesthetic_vector, scalar_vector
from hi3d_jax.models.vae import Posterior
from hi3d_jax.stages import conditioning, multiview, refine
from hi3d_jax.stages.conditioning import ConditionParts, Encoders
from hi3d_jax.stages.framing import to_network
from hi3d_jax.stages.model import StageModel, random_key
from hi3d_jax.stages.recipe import Dropping, Recipe, RecipeError

VIEWS, SIDE, LATENT = 3, 16, 4


def recipe_of(stage: int, make=Recipe.official, **changes) -> Recipe:
    return dataclasses.replace(make(stage), num_views=VIEWS, image_size=SIDE, **changes)


def parts_of(recipe: Recipe, videos: int = 2) -> ConditionParts:
    """Parts of which every number is different from zero."""
    rng = np.random.default_rng(0)

    def numbers(*shape):
        return jnp.asarray(rng.uniform(1, 2, size=shape), jnp.float32)

    views = 1 if recipe.stage == 1 else VIEWS
    return ConditionParts(
        numbers(videos, 5),
        numbers(videos, views, LATENT, LATENT, 4),
        numbers(videos),
        numbers(videos),
        numbers(videos, VIEWS, LATENT, LATENT, recipe.depth_unfold**2) if "depth" in recipe.concat else None,
        numbers(videos) if "aesthetic" in recipe.vector else None,
    )


def test_the_recipe_decides_the_order():
    recipe = recipe_of(2, vector=("cond_aug", "aesthetic", "elevation"), concat=("coarse_latents", "depth"))
    parts = parts_of(recipe)
    made = conditioning.assemble(recipe, parts)
    np.testing.assert_array_equal(made.concat_latents, jnp.concatenate([parts.latents, parts.depth], -1))
    expected = [
        scalar_vector(parts.cond_aug[:, None]),
        aesthetic_vector(parts.aesthetic),
        scalar_vector(parts.elevation_deg[:, None]),
    ]
    np.testing.assert_array_equal(made.vector, jnp.concatenate(expected, -1))
    np.testing.assert_array_equal(made.image_token[:, 0], parts.image_token)


def test_one_latent_stands_for_all_views_of_stage_1():
    recipe = recipe_of(1)
    parts = parts_of(recipe)
    both = conditioning.for_guidance(recipe, parts)
    assert both.concat_latents.shape == (4, VIEWS, LATENT, LATENT, 4)
    assert not both.concat_latents[:2].any()
    assert not both.image_token[:2].any()
    np.testing.assert_array_equal(
        both.concat_latents[2:], jnp.broadcast_to(parts.latents, both.concat_latents[2:].shape)
    )
    np.testing.assert_array_equal(both.vector[:2], both.vector[2:])


@pytest.mark.parametrize("per_view", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_training_leaves_conditions_out_as_often_as_the_recipe_says(stage, per_view):
    rates = Dropping(image_token=0.1, latents=0.3, depth=0.6, per_view=per_view)
    recipe = recipe_of(stage, dropping=rates)
    videos = 2000
    parts = parts_of(recipe, videos)
    kept = conditioning.drop(recipe, parts, jax.random.key(0))
    np.testing.assert_array_equal(kept.elevation_deg, parts.elevation_deg)
    for name, rate in (("image_token", 0.1), ("latents", 0.3), ("depth", 0.6)):
        before, after = getattr(parts, name), getattr(kept, name)
        if before is None:
            continue
        # A part is there whole or not at all: in each video, or in each of its views.
        rows = (videos, after.shape[1]) if name != "image_token" else (videos,)
        there = np.asarray(after != 0).reshape(*rows, -1)
        assert (there.all(-1) == there.any(-1)).all()
        there = there.all(-1)
        np.testing.assert_array_equal(after, jnp.where(after != 0, jnp.broadcast_to(before, after.shape), 0))
        assert abs(there.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / videos) ** 0.5
        if name != "image_token" and there.shape[1] > 1:
            together = (there == there[:, :1]).all()
            assert together != per_view


def test_coarse_views_belong_to_stage_2():
    encoders = Encoders(lambda x: x, lambda x: x)
    image, noise = jnp.zeros((1, SIDE, SIDE, 3)), jnp.zeros((1, VIEWS, SIDE, SIDE, 3))
    with pytest.raises(RecipeError, match="stage 1 takes no coarse views"):
        conditioning.encode(recipe_of(1), encoders, image, jnp.zeros(1), noise, noise)
    with pytest.raises(RecipeError, match="stage 2 takes the coarse views"):
        conditioning.encode(recipe_of(2), encoders, image, jnp.zeros(1), noise)


class Networks(StageModel):
    """A model without networks that remembers what it was given. A picture's latents are its means over cells."""

    scaling_factor = 0.5

    def __init__(self, recipe: Recipe):
        self.recipe, self.seen = recipe, {}
        noisy = jax.ShapeDtypeStruct((1, VIEWS, LATENT, LATENT, 3), np.float32)
        self.programs = {"denoise_step": types.SimpleNamespace(inputs=(noisy,))}

    def latents(self, images):
        self.seen["encoded"] = np.asarray(images)
        return images.reshape(-1, LATENT, SIDE // LATENT, LATENT, SIDE // LATENT, 3).mean((2, 4))

    def token(self, images):
        self.seen["token"] = np.asarray(images)
        return images.mean((1, 2))

    def encoders(self, progress=False) -> Encoders:
        return Encoders(self.token, self.latents, self.latents, lambda images: images.mean((1, 2, 3)))

    def run(self, name, images, progress=False):
        self.seen[name] = np.asarray(images)
        return Posterior(self.latents(images), jnp.full((VIEWS, LATENT, LATENT, 3), 0.25))

    def sample(self, parts, noise, coarse=None, **options):
        self.seen |= {"parts": parts, "noise": noise, "coarse": coarse, "options": options}
        return noise[0]

    def decode(self, latents, progress=False):
        return np.zeros((VIEWS, SIDE, SIDE, 3), np.uint8)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)


def test_stage_1_sees_the_picture_under_a_little_noise_and_the_encoder_sees_it_clean():
    model, image = Networks(recipe_of(1)), pictures(1)[0]
    views = multiview.multiview(model, image, elevation_deg=20.0, seed=7, variant=2, num_steps=3, progress=False)
    np.testing.assert_array_equal(views, [image, *np.zeros((VIEWS - 1, SIDE, SIDE, 3))])
    clean = to_network(image)[None]
    np.testing.assert_array_equal(model.seen["token"], clean)
    noise = model.seen["encoded"] - clean
    assert abs(noise.std() - 0.02) < 0.002
    assert model.seen["parts"].elevation_deg == 20
    assert model.seen["parts"].cond_aug == np.float32(0.02)
    assert model.seen["options"] == {"num_steps": 3, "progress": False, "kept": None, "watch": None}
    again = Networks(recipe_of(1))
    multiview.multiview(again, image, seed=7, variant=2)
    np.testing.assert_array_equal(again.seen["noise"], model.seen["noise"])
    multiview.multiview(again, image, seed=7, variant=3)
    assert (again.seen["noise"] != model.seen["noise"]).all()
    with pytest.raises(RecipeError, match="takes an image of 16 x 16 pixels"):
        multiview.multiview(model, image[:8, :8])


@pytest.mark.parametrize("first_view_is_image", [True, False])
def test_stage_2_sees_the_coarse_views_with_the_input_in_the_first_ones_place(first_view_is_image):
    model = Networks(recipe_of(2, first_view_is_image=first_view_is_image))
    coarse, image = pictures(VIEWS), 255 - pictures(1)[0]
    refine.refine(model, coarse, image, elevation_deg=-10.0)
    shown = to_network(coarse)
    if first_view_is_image:
        shown[0] = to_network(image)
    np.testing.assert_array_equal(model.seen["token"], to_network(image)[None])
    # Conditions come from noised pictures, what the steps are blended with from clean ones, drawn and scaled.
    np.testing.assert_array_equal(model.seen["coarse_latents"], shown)
    means = shown.reshape(-1, LATENT, SIDE // LATENT, LATENT, SIDE // LATENT, 3).mean((2, 4))
    drawn = model.seen["coarse"][0] / 0.5 - means
    assert 0.15 < drawn.std() < 0.35
    assert 0 < np.abs(model.seen["parts"].latents[0] - means).max() < 0.1
    assert model.seen["parts"].elevation_deg == -10
    # Without a picture of its own, view 0 stands for it; without blending nothing is encoded twice.
    model = Networks(recipe_of(2, blend_exponent=None))
    refine.refine(model, coarse)
    np.testing.assert_array_equal(model.seen["token"], to_network(coarse[:1]))
    assert model.seen["coarse"] is None
    assert "coarse_latents" not in model.seen
    with pytest.raises(RecipeError, match="orbits of 3 views and got 2"):
        refine.refine(model, coarse[:2])


@pytest.mark.parametrize("keeps_image", [True, False])
def test_stage_2_draws_the_first_view_again_unless_the_recipe_keeps_it(keeps_image):
    model = Networks(recipe_of(2, refined_first_view_is_image=keeps_image))
    image = 1 + pictures(1)[0] // 2
    views = refine.refine(model, pictures(VIEWS), image)
    assert (views[0] == image).all() == keeps_image
    assert not views[1:].any()
    # Enlarged coarse views are not the picture.
    assert not refine.refine(model, pictures(VIEWS))[0].any()


@pytest.mark.parametrize("residual", [None, 0.5, 1.0])
def test_a_residual_recipe_puts_a_share_of_the_change_onto_the_coarse_views(residual):
    class Decoder(Networks):
        def decode(self, latents, progress=False):
            decoded.append(np.asarray(latents))
            return np.full((VIEWS, SIDE, SIDE, 3), 100 * len(decoded), np.uint8)

    model, decoded = Decoder(recipe_of(2, blend_exponent=None, residual=residual)), []
    views = refine.refine(model, pictures(VIEWS), progress=False)
    np.testing.assert_array_equal(decoded[0], model.seen["noise"][0])
    if residual is None:
        assert len(decoded) == 1
        np.testing.assert_array_equal(views, np.full_like(views, 100))
    else:
        # Decoded are 100, and 200 for the coarse latents: within what bytes hold, that is taken from the coarse views.
        np.testing.assert_array_equal(decoded[1], model.seen["parts"].latents[0] * model.scaling_factor)
        np.testing.assert_array_equal(views, np.maximum(pictures(VIEWS) - 100 * residual, 0))


def test_keys_differ_between_seeds_variants_and_stages():
    keys = {
        tuple(np.asarray(jax.random.key_data(random_key(seed, variant, stage))))
        for seed in (0, 1)
        for variant in (0, 1)
        for stage in (1, 2)
    }
    assert len(keys) == 8
