"""All stages in one call and one command: what goes from one to the next, and what many images do to each other."""

import dataclasses
import json
import types

import numpy as np
import pytest

from hi3d_jax import cameras, images
from hi3d_jax.cli import generate, main
from hi3d_jax.cli.models import open_pipeline
from hi3d_jax.stages import image_to_3d
from hi3d_jax.stages.background import without_background
from hi3d_jax.stages.checks import StageError
from hi3d_jax.stages.image_to_3d import ImageTo3D
from hi3d_jax.stages.pipeline import Hi3DPipeline, Options, Variant
from hi3d_jax.stages.presets import ReconstructConfig
from hi3d_jax.stages.random_model import write_random_model
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.stages.reconstruct import Reconstruction
from hi3d_jax.video import Orbit, OrbitError


def drawn(brightness: float) -> Orbit:
    """Four views of a square on white, as stages 1 and 2 leave them."""
    views = np.ones((4, 32, 32, 3), np.float32)
    views[:, 8:24, 8:24] = brightness
    return Orbit(views, np.ones((4, 32, 32), np.float32), cameras.orbit(np.arange(4) * 90.0, width=32))


@pytest.fixture
def calls(monkeypatch):
    """A pipeline that draws squares and a reconstruction that takes notes; pictures named bad fail in stage 1."""
    notes = types.SimpleNamespace(drawn=[], reconstructed=[])

    class Pipeline(Hi3DPipeline):
        @classmethod
        def from_pretrained(cls, *sources, **settings):
            notes.sources, notes.settings = sources, settings
            return cls()

        def __call__(self, image, output, *, num_variants, **options):
            if "bad" in str(image):
                raise StageError("stage 1: this picture shows nothing")
            notes.drawn.append((image, output, options))
            return [Variant(drawn(0.9), drawn(0.1 * number)) for number in range(num_variants)]

    def reconstruct(orbit, output, config, resume, progress):
        notes.reconstructed.append((orbit, output, config, resume))
        made = object.__new__(Reconstruction)
        object.__setattr__(made, "scores", types.SimpleNamespace(silhouette_iou=0.9, psnr=30.0))
        object.__setattr__(made, "report", types.SimpleNamespace(watertight=True, faces=12))
        return made

    monkeypatch.setattr(image_to_3d, "Hi3DPipeline", Pipeline)
    monkeypatch.setattr(image_to_3d, "reconstruct", reconstruct)
    monkeypatch.setattr(generate, "open_pipeline", lambda source, *settings: Pipeline.from_pretrained(source))
    monkeypatch.setenv("HI3D_CACHE", "off")
    return notes


def picture(path):
    """A file with a dark square on white."""
    image = np.ones((32, 32, 3), np.float32)
    image[8:24, 8:24] = 0.2
    images.write_png(path, image)
    return path


def test_the_refined_views_are_cut_out_and_reconstructed(calls, tmp_path):
    config = ReconstructConfig.preset("draft", seed=7)
    generator = ImageTo3D.from_pretrained("somewhere", dtype="float32")
    made = generator("a.png", tmp_path, elevation_deg=20.0, num_variants=2, config=config, options=Options(resume=True))
    assert calls.sources == ("somewhere",)
    ((image, folder, options),) = calls.drawn
    assert (image, folder) == ("a.png", tmp_path / "generated")
    assert (options["seed"], options["elevation_deg"], options["options"].resume) == (7, 20.0, True)
    assert [output for _, output, _, _ in calls.reconstructed] == [tmp_path / "variant_0", tmp_path / "variant_1"]
    for number, (orbit, _, used, resume) in enumerate(calls.reconstructed):
        assert (used, resume) == (config, True)
        np.testing.assert_allclose(orbit.views[:, 16, 16], 0.1 * number, atol=0.02)
        assert (orbit.alphas[:, 16, 16] == 1).all()
        assert (orbit.alphas[:, 0, 0] == 0).all()
    assert len(made) == 2


def test_generated_views_lose_their_white_and_keep_their_cameras():
    orbit = drawn(0.3)
    cut = without_background(orbit)
    assert cut.alphas.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(cut.cameras.c2w, orbit.cameras.c2w)


def test_smudges_along_the_border_do_not_hide_the_object():
    """What a small model may draw: a grey haze in front of which nothing can be keyed."""
    orbit = drawn(0.3)
    haze = np.random.default_rng(0).uniform(0.86, 1.0, orbit.views.shape).astype(np.float32)
    orbit = dataclasses.replace(orbit, views=np.minimum(orbit.views, haze))
    orbit.views[:, 1, 1] = 0.2
    np.testing.assert_array_equal(without_background(orbit).alphas, drawn(0.3).views[..., 0] < 0.5)
    for nothing in (haze, 0.3 * haze):
        with pytest.raises(OrbitError, match="view 0: no object on white was drawn; try another --seed"):
            without_background(dataclasses.replace(orbit, views=nothing))


def test_one_image_fills_the_output_folder_itself(calls, tmp_path, capsys):
    picture(tmp_path / "cup.png")
    assert main(["generate", str(tmp_path / "cup.png"), "-o", str(tmp_path / "out"), "-m", "model", "--seed", "3"]) == 0
    ((_, folder, options),) = calls.drawn
    assert (folder, options["seed"]) == (tmp_path / "out/generated", 3)
    assert f"{tmp_path / 'out/mesh.glb'}: 12 faces, watertight" in capsys.readouterr().out


def test_a_failing_image_does_not_stop_the_others(calls, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a", "bad", "c", ".hidden", "._c"):
        picture(tmp_path / f"in/{name}.png")
    assert main(["generate", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", "model"]) == 2
    assert [folder for _, folder, _ in calls.drawn] == [tmp_path / f"out/{name}/generated" for name in ("a", "c")]
    rows = json.loads((tmp_path / "out/report.json").read_text())
    assert [row.get("error") for row in rows] == [None, "stage 1: this picture shows nothing", None]
    (mesh,) = rows[2]["meshes"]
    assert (mesh["file"], mesh["watertight"], mesh["psnr"]) == (str(tmp_path / "out/c/mesh.glb"), True, 30.0)
    assert "1 of 3 images failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["https://example.org/cup.png"], "https://example.org/cup.png is an address; download the picture first"),
        (["a/cup.png", "b/cup.jpg"], "would both be written to cup/"),
        (["a/cup.png", "b/Cup.png"], "would both be written to Cup/"),
        (["empty"], "holds no pictures"),
        ([], "give an IMAGE, or --prompt TEXT"),
        (["cup.png", "--prompt", "a cup"], "an image and a prompt were given"),
        (["--prompt", "a cup"], "--prompt needs --text-model"),
        (["cup.png", "--text-model", "somewhere"], "there are none; give --prompt TEXT"),
    ],
)
def test_images_that_cannot_be_taken_are_named(calls, names, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["generate", *names, "-o", "out", "-m", "model"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_begun_runs_asks_for_resume(calls, tmp_path, capsys):
    picture(tmp_path / "cup.png")
    (tmp_path / "out/generated").mkdir(parents=True)
    (tmp_path / "out/generated/run.json").write_text("{}")
    assert main(["generate", str(tmp_path / "cup.png"), "-o", str(tmp_path / "out"), "-m", "model"]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("stages", [(1,), (1, 2)])
def test_the_refiner_is_used_where_the_model_has_one(stages, tmp_path):
    for stage in stages:
        recipe = dataclasses.replace(Recipe.paper(stage), image_size=96)
        write_random_model(tmp_path / f"model/stage{stage}", recipe)
    pipeline = open_pipeline(str(tmp_path / "model"), "float32", None, 1)
    assert pipeline.generator.recipe.stage == 1
    assert (pipeline.refiner is not None) == (2 in stages)
