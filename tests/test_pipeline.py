"""Stages 1 and 2 from the commands and from Python, with random models of the smallest sizes: what lands on disk."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from hi3d_jax import cameras, images, video
from hi3d_jax.cli import main
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig
from hi3d_jax.pretrained import abstract_network
from hi3d_jax.stages.checks import StageError
from hi3d_jax.stages.inputs import orbit_elevation
from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.pipeline import Hi3DPipeline, Options, open_stage
from hi3d_jax.stages.programs import Chunking, make_programs
from hi3d_jax.stages.random_model import random_networks, write_random_model
from hi3d_jax.stages.recipe import Recipe, RecipeError
from hi3d_jax.stages.sampling import denoise_step

SIZES = {1: 48, 2: 96}
VIEWS = 4
PROGRAMS = {
    "jit_decode",
    "jit_denoise_step",
    "jit_encode_latents",
    "jit_encode_token",
    "jit_estimate_depth",
    "jit_score",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A new cache of compiled programs, and compiling in a hurry: twice as fast, for programs that run once."""
    folder = tmp_path_factory.mktemp("cache")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def models(tmp_path_factory, cache):
    """A folder with stage1/ and stage2/ that follow the official recipe, their programs compiled."""
    folder = tmp_path_factory.mktemp("models")
    for stage, size in SIZES.items():
        recipe = dataclasses.replace(Recipe.official(stage), num_views=VIEWS, image_size=size, num_steps=2)
        write_random_model(folder / f"stage{stage}", recipe, seed=stage)
    assert main(["warmup", "--model", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def generator(models):
    return open_stage(models, 1, keep_loaded=True)


def compiled(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.name.split("-")[0] in PROGRAMS}


def picture() -> Image.Image:
    """A red angle and a blue square, nothing alike from any side, on transparent ground."""
    pixels = np.zeros((60, 80, 4), np.uint8)
    pixels[10:50, 20:30] = pixels[40:50, 20:60] = 200, 40, 30, 255
    pixels[15:25, 45:55] = 20, 60, 220, 255
    return Image.fromarray(pixels)


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def save(path: Path, mode: str) -> Path:
    """The picture as a file of some kind; what the file cannot hold of it (colour, transparency) is lost."""
    image, white = picture(), on_white(picture())
    if mode == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by a quarter clockwise
        white.rotate(90, expand=True).save(path.with_suffix(".jpg"), exif=exif, quality=95)
        return path.with_suffix(".jpg")
    if mode == "CMYK":
        white.convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
        return path.with_suffix(".jpg")
    made = {
        "RGBA": lambda: image,
        "LA": lambda: image.convert("LA"),
        "P": lambda: white.quantize(16),
        "I;16": lambda: Image.fromarray(np.asarray(white.convert("L")).astype(np.uint16) * 257),
    }[mode]()
    made.save(path.with_suffix(".png"))
    return path.with_suffix(".png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "EXIF", "CMYK"])
def test_any_kind_of_picture_becomes_an_orbit(mode, models, cache, tmp_path, capsys):
    path, out, before = save(tmp_path / "photo", mode), tmp_path / "out", compiled(cache)
    assert main(["views", str(path), "-o", str(out), "--model", str(models), "--elevation-deg", "10"]) == 0
    assert "an orbit of 4 views, 48 x 48 pixels" in capsys.readouterr().out
    made = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    views = {f"views/{view:03d}.png" for view in range(VIEWS)}
    assert made == views | {"cameras.json", "orbit.mp4", "contact_sheet.png", "input.png", "run.json"}
    orbit, frames = video.read_views(out)[1], video.read_frames(out / "orbit.mp4")
    np.testing.assert_allclose(cameras.elevations_deg(orbit), 10, atol=1e-3)
    np.testing.assert_allclose(cameras.azimuths_deg(orbit), [0, 90, 180, 270], atol=1e-3)
    assert frames.shape == (VIEWS, 48, 48, 4)
    assert np.std([np.asarray(Image.open(out / name), float) for name in sorted(views)]) > 5
    # The model saw the picture upright, on white, its middle, in the colours that the file can hold.
    expected = on_white(picture()).resize((128, 96)).crop((16, 0, 112, 96))
    grey = mode in ("LA", "I;16")
    expected, seen = (i.convert("L" if grey else "RGB") for i in (expected, Image.open(out / "input.png")))
    assert np.abs(np.asarray(expected, float) - np.asarray(seen, float)).mean() < 8
    run = json.loads((out / "run.json").read_text())
    assert run["steps"]["stage 1"]["finished"]
    assert Recipe.from_dict(run["models"]["stage1"]["recipe"]) == Recipe.of(models / "stage1")
    # All that a run needs was compiled by `hi3d warmup`.
    assert compiled(cache) == before


def test_an_orbit_is_refined(models, cache, tmp_path, capsys):
    views, out, before = tmp_path / "views", tmp_path / "out", compiled(cache)
    photo = save(tmp_path / "photo", "RGBA")
    assert main(["views", str(photo), "-o", str(views), "-m", str(models), "--elevation-deg", "10"]) == 0
    # Without the folder's stage2/ too: the folder of the stage itself.
    arguments = [str(views), "-m", str(models / "stage2"), "--preview-every", "1"]
    assert main(["refine", *arguments, "-o", str(out)]) == 0
    assert "an orbit of 4 views, 96 x 96 pixels" in capsys.readouterr().out
    made = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    pictures = {f"views/{view:03d}.png" for view in range(VIEWS)} | {
        f"previews/stage_2_step_{done:02d}.png" for done in (1, 2)
    }
    assert made == pictures | {"cameras.json", "orbit.mp4", "contact_sheet.png", "run.json"}
    frames, orbit = video.read_views(out)
    assert frames.shape == (VIEWS, 96, 96, 4)
    assert (orbit.width, orbit.height) == (96, 96)
    np.testing.assert_allclose(cameras.elevations_deg(orbit), 10, atol=1e-3)
    run = json.loads((out / "run.json").read_text())
    assert run["elevation_deg"] == 10
    assert compiled(cache) == before
    # One call in Python does the same, with any number of variants.
    variants = Hi3DPipeline.from_pretrained(models)(
        photo, tmp_path / "both", elevation_deg=10.0, num_variants=2, options=Options(progress=False)
    )
    for folder in ("variant_0", "variant_1", "variant_0/coarse", "variant_1/coarse"):
        assert (tmp_path / "both" / folder / "orbit.mp4").exists()
    np.testing.assert_array_equal(images.to_bytes(variants[0].refined.views), images.to_bytes(frames[..., :3]))
    coarse = video.read_views(views)[0]
    np.testing.assert_array_equal(images.to_bytes(variants[0].coarse.views), images.to_bytes(coarse[..., :3]))


def test_a_variant_does_not_depend_on_its_company(generator):
    pipeline, image = Hi3DPipeline(generator), images.to_array(picture(), "picture")
    options = Options(progress=False)
    (alone,) = pipeline(image, seed=3, options=options)
    programs = denoise_step._cache_size()
    first, second = pipeline(image, seed=3, num_variants=2, options=options)
    np.testing.assert_array_equal(first.orbit.views, alone.orbit.views)
    assert np.abs(second.orbit.views - alone.orbit.views).max() > 0.05
    (other,) = pipeline(image, seed=4, num_steps=3, elevation_deg=30.0, options=options)
    assert np.abs(other.orbit.views - alone.orbit.views).max() > 0.05
    # Other seeds, elevations and numbers of steps run the program that is there.
    assert denoise_step._cache_size() == programs


def test_an_interrupted_run_goes_on_where_it_stopped(models, tmp_path, monkeypatch, capsys):
    photo, out = save(tmp_path / "photo", "RGBA"), tmp_path / "out"
    command = ["views", str(photo), "-o", str(out), "-m", str(models), "--num-steps", "3", "--seed", "5"]
    whole = [*command[:3], str(tmp_path / "whole"), *command[4:]]
    assert main(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(StageModel, "preview", interrupt)
        assert main([*command, "--preview-every", "2"]) == 130
    assert "continue with --resume" in capsys.readouterr().err
    with np.load(out / "sampling.npz") as kept:
        assert kept["done"] == 2
    assert main(command) == 2
    assert main([*command, "--resume", "--elevation-deg", "10"]) == 2
    assert "was begun with elevation_deg = 0.0, not 10.0" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    for view in range(VIEWS):
        name = f"views/{view:03d}.png"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "sampling.npz").exists()
    # The folder is not continued with other weights.
    shutil.copytree(models / "stage1", tmp_path / "other")
    with (tmp_path / "other/unet/model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"ab")
    assert main([*command, "--resume", "--model", str(tmp_path / "other")]) == 2
    assert "was begun with models.stage1.weights = " in capsys.readouterr().err


def interrupt(*_):
    raise KeyboardInterrupt


def test_numbers_that_are_none_stop_the_stage_by_its_name(models, tmp_path):
    generator = open_stage(models, 1, keep_loaded=True)
    Hi3DPipeline(generator)(images.to_array(picture(), "picture"), options=Options(progress=False))
    sound = generator._kept["unet"]
    generator._kept["unet"] = jax.tree.map(lambda x: x * np.nan, sound)
    photo = save(tmp_path / "photo", "RGBA")
    with pytest.raises(StageError, match=r"stage 1: NaN or infinite .* at step 1 of 2; all that came before"):
        Hi3DPipeline(generator)(photo, tmp_path / "out", options=Options(progress=False))
    generator._kept["unet"] = sound
    generator._kept["vae"] = jax.tree.map(lambda x: x * np.nan, generator._kept["vae"])
    with pytest.raises(StageError, match=r"stage 1: NaN or infinite .* came out of the"):
        Hi3DPipeline(generator)(photo, options=Options(progress=False))
    assert json.loads((tmp_path / "out/run.json").read_text())["steps"]["stage 1"]["finished"] is False


def test_what_models_and_pictures_cannot_do_is_said_in_one_line(models, tmp_path, capsys):
    photo = save(tmp_path / "photo", "RGBA")

    def error(*argv) -> str:
        assert main([*map(str, argv), "-o", str(tmp_path / "out")]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "holds a model of stage 1, and stage 2 is wanted" in error("refine", photo, "-m", models / "stage1")
    assert "is neither a folder nor" in error("views", photo, "-m", tmp_path / "nowhere")
    Image.new("RGBA", (40, 40)).save(tmp_path / "empty.png")
    assert "no object was found" in error("views", tmp_path / "empty.png", "-m", models)
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert "2 frames" in error("views", tmp_path / "moving.gif", "-m", models)
    assert "stage 2 refines orbits of 4 views and got 2" in error("refine", tmp_path / "moving.gif", "-m", models)
    photo.write_bytes(photo.read_bytes()[:100])
    assert "truncated or damaged" in error("views", photo, "-m", models)


def test_doubtful_input_is_warned_of(generator):
    cut = images.to_array(picture(), "picture")[:, 20:]
    trained = r"elevation 60 is outside .* -10 to 40 degrees \(-10, 0, 10, 20, 30, 40\)"
    with pytest.warns(UserWarning, match=trained), pytest.warns(UserWarning, match=r"touches .* border \(left\)"):
        Hi3DPipeline(generator)(cut, elevation_deg=60.0, options=Options(progress=False))
    # Numbers that mean nothing, and orbits that stage 1 would not make, are refused before anything runs.
    for numbers, message in (
        ({"elevation_deg": 100.0}, "outside -90 to 90"),
        ({"seed": -1}, "seed -1"),
        ({"num_steps": 0}, "0 sampling steps"),
        ({"num_variants": 0}, "0 variants"),
    ):
        with pytest.raises(RecipeError, match=message):
            Hi3DPipeline(generator)(cut, **numbers)
    with pytest.raises(RecipeError, match="elevations go from 0 to 20"):
        orbit_elevation(cameras.orbit(elevation_deg=np.linspace(0, 20, 16)))
    with pytest.raises(RecipeError, match=r"azimuths 0, 270, 180, 90; .* 90 degrees apart, counter-clockwise"):
        orbit_elevation(cameras.orbit([0, 270, 180, 90]))
    assert orbit_elevation(cameras.orbit([30, 120, 210, 300], elevation_deg=15.0)) == 15


def test_a_folder_without_a_network_it_needs_is_refused(models, tmp_path):
    config = json.loads((models / "stage2/config.json").read_text())
    del config["networks"]["depth"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="lacks the network depth"):
        StageModel(tmp_path)
    config["recipe"]["concat"] = ["coarse_latents"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"has in_channels 17, .* ask for 8"):
        StageModel(tmp_path)


@pytest.mark.parametrize("stage", [1, 2])
def test_programs_of_any_sizes_fit_together(stage):
    """The paper's recipe, an autoencoder that shrinks fourfold, several views at once, bfloat16: traced, not run."""
    recipe = dataclasses.replace(Recipe.paper(stage), num_views=6, image_size=128)
    sizes = random_networks(recipe) | {"vae": (Autoencoder, AutoencoderConfig(block_channels=(32, 32, 32)))}
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    networks = {name: abstract_network(*described, **dtypes) for name, described in sizes.items()}
    programs = make_programs(recipe, networks, Chunking(encode_views=4, decode_views=2))

    def shapes(name: str):
        program = programs[name]
        made = jax.eval_shape(lambda params, *inputs: program(params, *inputs), program.params, *program.inputs)
        return jax.tree.map(lambda x: x.shape, made)

    noisy, _, _, conditions, blending = programs["denoise_step"].inputs
    assert noisy.shape == (1, 6, 32, 32, 4)
    assert shapes("denoise_step").noisy == noisy.shape
    assert conditions.concat_latents.shape == (2, 6, 32, 32, 4 if stage == 1 else 5)
    assert conditions.image_token.shape == (2, *shapes("image_token"))
    assert blending is None
    assert shapes("conditioning_latents").mean == (1 if stage == 1 else 3, 32, 32, 4)
    assert shapes("decode") == (2, 128, 128, 3)
    assert shapes("preview") == (4, 64, 64, 3)
    if stage == 2:
        assert shapes("depth") == (3, 32, 32, 1)
