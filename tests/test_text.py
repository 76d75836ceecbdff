"""Words become a picture by a tiny pipeline of diffusers with random weights; nothing that it brings is executed."""

import json
import sys

import numpy as np
import pytest

from hi3d_jax import images
from hi3d_jax.cli import generate, main
from hi3d_jax.stages import text
from hi3d_jax.stages.checks import StageError
from hi3d_jax.stages.run_record import RunError
from hi3d_jax.stages.text import TextError, picture_of

# torch warns of itself while its numbers become numpy's.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def write_tokenizer(folder):
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}{end}" for letter in "abcde" for end in ("", "</w>"))]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt"), len(vocabulary)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Stable Diffusion of the smallest sizes, saved as diffusers saves it."""
    for package in text.PACKAGES:
        pytest.importorskip(package, reason="needs the extra text")
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("text")
    vocabulary, merges, size = write_tokenizer(folder / "words")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokens = {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, **tokens)),
        tokenizer=CLIPTokenizer(vocabulary, merges, model_max_length=77),
        unet=UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            **blocks,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def test_words_become_a_picture_that_is_kept(source, tmp_path):
    file = picture_of("a bad cab", str(source), tmp_path / "one", seed=3, progress=False)
    picture = images.read_image(file)
    assert picture.shape == (32, 32, 4)
    assert picture[..., :3].std() > 0.02
    run = json.loads((tmp_path / "one/run.json").read_text())
    assert (run["prompt"], run["seed"], run["text_model"]) == ("a bad cab", 3, str(source))
    assert "plain white background" in run["addition"]
    assert run["steps"]["text"]["finished"]
    again = picture_of("a bad cab", str(source), tmp_path / "two", seed=3, progress=False)
    np.testing.assert_array_equal(images.read_image(again), picture)
    other = picture_of("a bad cab", str(source), tmp_path / "three", seed=4, progress=False)
    assert np.abs(images.read_image(other) - picture).max() > 0.02
    # What is there is not drawn again, and not taken for something else.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "draw_text", lambda *_: pytest.fail("it was drawn again"))
        assert picture_of("a bad cab", str(source), tmp_path / "one", seed=3, resume=True, progress=False) == file
    with pytest.raises(RunError, match="was begun with prompt = a bad cab, not a dead bee"):
        picture_of("a dead bee", str(source), tmp_path / "one", seed=3, resume=True)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_refused_unread(source, tmp_path):
    import shutil

    import torch

    shutil.copytree(source, tmp_path / "pipeline")
    for name, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        folder = tmp_path / "pipeline" / name
        (folder / f"{file}.safetensors").unlink()
        torch.save(Bomb(tmp_path / "exploded"), folder / ("pytorch_model.bin" if file == "model" else f"{file}.bin"))
        with pytest.raises(StageError, match=f"no text-to-image pipeline of diffusers .*{file}"):
            picture_of("a cab", str(tmp_path / "pipeline"), tmp_path / name, progress=False)
        shutil.copy(source / name / f"{file}.safetensors", folder)
    assert not (tmp_path / "exploded").exists()


def test_code_that_comes_with_a_model_is_not_run(source, tmp_path):
    import shutil

    shutil.copytree(source, tmp_path / "pipeline")
    index = json.loads((source / "model_index.json").read_text())
    (tmp_path / "pipeline/own.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps({**index, "_class_name": ["own", "Own"]}))
    with pytest.raises(StageError, match="no text-to-image pipeline"):
        picture_of("a cab", str(tmp_path / "pipeline"), tmp_path / "out", progress=False)
    assert not (tmp_path / "exploded").exists()


def test_the_command_makes_a_mesh_of_the_picture(source, tmp_path, monkeypatch):
    made = []
    monkeypatch.setenv("HI3D_CACHE", "off")
    monkeypatch.setattr(generate.Generate, "open", lambda command: None)
    monkeypatch.setattr(generate.Generate, "one", lambda *arguments: made.append(arguments[2:]))
    out = tmp_path / "out"
    assert main(["generate", "--prompt", "a cab", "--text-model", str(source), "-o", str(out)]) == 0
    assert made == [(out / "text/picture.png", out)]
    assert (out / "text/picture.png").exists()


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    with pytest.raises(TextError, match="the prompt is empty"):
        picture_of(" ", "somewhere", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = {"diffusers": None}
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda package: found.get(package, package))
    with pytest.raises(TextError, match=r'and diffusers is not installed: pip install "hi3d_jax\[text\]"'):
        picture_of("a cab", "somewhere", tmp_path / "out", progress=False)
