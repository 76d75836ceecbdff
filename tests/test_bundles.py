"""Stages in one folder: what is equal is stored once, found from anywhere, and counted where models are told apart."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from flax import nnx

import hi3d_jax
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.pretrained import (
    PretrainedError,
    bundles,
    check_weights,
    from_pretrained,
    parameters,
    save_bundle,
    stage_folders,
    weights_folder,
)
from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.pipeline import Hi3DPipeline
from hi3d_jax.stages.random_model import random_networks, write_random_model
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training import export
from hi3d_jax.training.tasks import StageTask

SMALL = CLIPVisionConfig(
    image_size=28, patch_size=14, width=16, mlp_width=32, num_layers=1, num_heads=2, projection_dim=8
)


@functools.cache
def network(seed: int, **changes) -> CLIPVision:
    return CLIPVision(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(seed))


@pytest.fixture
def bundle(tmp_path):
    """Two models with an equal network, one that only differs in its numbers, and one only in its config."""
    one = {"equal": network(0), "other_numbers": network(1), "other_config": network(2)}
    two = {
        "also_equal": network(0),
        "other_numbers": network(3),
        "other_config": network(2, num_heads=1),
    }
    made = save_bundle(tmp_path / "both", {"stage1": (one, {"name": "a"}), "stage2": (two, {"name": "b"})})
    assert made == {"stage1": {}, "stage2": {"also_equal": "../stage1/equal"}}
    return tmp_path / "both", one, two


def same(network: nnx.Module, other: nnx.Module) -> bool:
    return all(np.array_equal(value, parameters(other)[path]) for path, value in parameters(network).items())


def test_what_stages_share_is_stored_once_and_read_from_both(bundle, monkeypatch):
    folder, one, two = bundle
    stored = sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    named = [f"stage1/{name}" for name in ("equal", "other_config", "other_numbers")]
    assert stored == [*named, "stage2/other_config", "stage2/other_numbers"]
    for stage, networks in (("stage1", one), ("stage2", two)):
        for name, expected in networks.items():
            assert same(from_pretrained(folder / stage, name), expected)
    # From within, too, where the model folder's path has no parent to speak of.
    monkeypatch.chdir(folder / "stage2")
    assert same(from_pretrained(".", "also_equal"), one["equal"])


def test_a_hub_repository_can_hold_a_bundle(bundle, hub_downloads):
    folder, one, _ = bundle
    asked = hub_downloads(folder)
    assert stage_folders("somebody/hi3d") == ["somebody/hi3d/stage1", "somebody/hi3d/stage2"]
    assert same(from_pretrained("somebody/hi3d/stage2", "also_equal"), one["equal"])
    assert asked[-1] == ("somebody/hi3d", ["stage1/config.json", "stage1/equal/*"])
    assert not any("stage2/*" in pattern for _, patterns in asked for pattern in patterns)


@pytest.mark.parametrize("reference", ["/etc/vae", "../../elsewhere/vae", "../stage1", "..\\stage1\\vae", 3, "../../x"])
def test_a_reference_leads_nowhere_else(bundle, reference):
    folder, _, _ = bundle
    config = json.loads((folder / "stage2/config.json").read_text())
    config["networks"]["also_equal"]["weights"] = reference
    (folder / "stage2/config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match="which is no folder of a model beside it"):
        from_pretrained(folder / "stage2", "also_equal")


def test_half_a_download_is_noticed_before_anything_runs(bundle):
    folder, _, _ = bundle
    check_weights(folder / "stage2", ["also_equal", "other_numbers"])
    path = folder / "stage1/equal/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PretrainedError, match=r"stage1/equal/model.safetensors cannot be read .* download"):
        check_weights(folder / "stage2", ["also_equal"])
    shutil.rmtree(folder / "stage1")
    with pytest.raises(PretrainedError, match=r"stage1 is missing, which holds weights of .*stage2"):
        check_weights(folder / "stage2", ["also_equal"])


def test_models_are_told_apart_by_weights_that_lie_elsewhere(tmp_path):
    recipes = [dataclasses.replace(Recipe.paper(stage), num_views=2, image_size=96) for stage in (1, 2)]
    for recipe in recipes:
        write_random_model(tmp_path / f"alone/stage{recipe.stage}", recipe)
    models = {}
    for recipe in recipes:
        source = tmp_path / f"alone/stage{recipe.stage}"
        names = random_networks(recipe)
        models[f"stage{recipe.stage}"] = {name: from_pretrained(source, name) for name in names}, recipe.to_dict()
    # Both stages of one model have one autoencoder.
    models["stage2"][0]["vae"] = models["stage1"][0]["vae"]
    assert save_bundle(tmp_path / "both", models)["stage2"]["vae"] == "../stage1/vae"
    pipeline = Hi3DPipeline.from_pretrained(tmp_path / "both")
    pipeline.refiner.check_weights()
    before = pipeline.refiner.fingerprint()
    assert before == StageModel(tmp_path / "both/stage2").fingerprint()
    with (weights_folder(tmp_path / "both/stage2", "vae") / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"ab")
    assert pipeline.refiner.fingerprint() != before


def test_the_models_in_the_package_have_names(bundle, monkeypatch, tmp_path):
    folder, _, _ = bundle
    monkeypatch.setattr(bundles, "PACKAGED_FOLDER", tmp_path)
    with pytest.raises(PretrainedError, match=r"'tiny' belongs into .*tiny, and is not there; install hi3d_jax again"):
        stage_folders("tiny")
    folder.rename(tmp_path / "tiny")
    assert stage_folders("tiny") == [tmp_path / "tiny/stage1", tmp_path / "tiny/stage2"]
    # A folder of that name is meant where the path says so.
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in stage_folders("./tiny")] == ["tiny/stage1", "tiny/stage2"]


def test_runs_of_both_stages_leave_as_one_folder(monkeypatch, tmp_path):
    stages = {name: Recipe.paper(stage) for name, stage in (("a", 2), ("b", 1), ("c", 1))}
    networks = {name: {"vae": network(0), "unet": network(number)} for number, name in enumerate(stages, 1)}
    config = type("Config", (), {})
    monkeypatch.setattr(export, "load_config", lambda run: _with(config(), task=_task(stages[run])))
    monkeypatch.setattr(
        export.Export, "contents", lambda how, run: (networks[run], stages[run].to_dict(), "vae, unet; averaged")
    )
    with pytest.raises(ValueError, match="c trains stage1, as does another"):
        export.export_stages(["b", "c"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = export.export_stages(["a", "b"], tmp_path / "out").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"wrote {tmp_path / 'out' / name}" for name in ("stage1", "stage2")
    ]
    assert lines[1].endswith("averaged; vae is ../stage1/vae")
    assert Recipe.of(tmp_path / "out/stage2", 2).name == "paper"
    assert same(from_pretrained(tmp_path / "out/stage2", "unet"), networks["a"]["unet"])


def _with(thing, **attributes):
    vars(thing).update(attributes)
    return thing


def _task(recipe: Recipe) -> StageTask:
    return StageTask(recipe, random_networks(recipe)["unet"][1])


def test_the_packages_names_are_there_when_asked_for():
    assert hi3d_jax.ImageTo3D.__name__ == "ImageTo3D"
    assert all(getattr(hi3d_jax, name).__name__ == name for name in hi3d_jax.__all__)
    assert set(hi3d_jax.__all__) <= set(dir(hi3d_jax))
    with pytest.raises(AttributeError, match="no attribute 'ImageTo4D'"):
        hi3d_jax.ImageTo4D  # noqa: B018
