"""Recipes: what a config.json may say, and that the two named ones differ where paper and code do."""

import dataclasses
import json

import pytest

from hi3d_jax.pretrained import PretrainedError
from hi3d_jax.stages.recipe import Recipe, RecipeError


def differences(stage: int) -> dict[str, tuple]:
    official, paper = (dataclasses.asdict(make(stage)) for make in (Recipe.official, Recipe.paper))
    return {key: (official[key], paper[key]) for key in official if official[key] != paper[key]}


def test_paper_and_code_differ_where_hi3d_md_says():
    both = {"name", "foreground_ratio", "resampling", "elevations_deg", "dropping"}
    assert differences(1).keys() == both | {"vector"}
    assert differences(1)["vector"] == (("aesthetic", "elevation", "cond_aug"), ("elevation", "cond_aug"))
    assert differences(2).keys() == both | {"depth_unfold", "blend_exponent"}
    assert differences(2)["depth_unfold"] == (3, 1)
    assert differences(2)["blend_exponent"] == (40.0, None)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("make", [Recipe.official, Recipe.paper])
def test_a_recipe_survives_json(make, stage):
    recipe = dataclasses.replace(make(stage), num_views=8, image_size=128)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_what_the_converters_write_is_the_whole_official_recipe(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": {"name": "official", "stage": 2}, "networks": {}}))
    assert Recipe.of(tmp_path) == Recipe.official(2)
    with pytest.raises(RecipeError, match="holds a model of stage 2, and stage 1 is wanted"):
        Recipe.of(tmp_path, stage=1)


def test_nonsense_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(PretrainedError, match="must say name"):
        Recipe.from_dict({})
    with pytest.raises(PretrainedError, match="unknown field guidence"):
        Recipe.from_dict({"name": "paper", "stage": 1, "guidence": [1, 2]})
    with pytest.raises(PretrainedError, match="concat"):
        Recipe.from_dict({"name": "paper", "stage": 1, "concat": ["depth", "coarse_latents"]})
    with pytest.raises(PretrainedError, match="coarse_latents"):
        Recipe.from_dict({"name": "paper", "stage": 2, "concat": ["depth"]})
    with pytest.raises(PretrainedError, match="no coarse views to blend with"):
        Recipe.from_dict({"name": "paper", "stage": 1, "blend_exponent": 40.0})
    with pytest.raises(PretrainedError, match="no coarse views to change"):
        Recipe.from_dict({"name": "paper", "stage": 1, "residual": 1.0})
    with pytest.raises(PretrainedError, match="num_views 0"):
        Recipe.from_dict({"name": "paper", "stage": 1, "num_views": 0})
