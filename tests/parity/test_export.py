"""What export.py writes, loaded by diffusers and transformers."""

import json

import numpy as np
import pytest
from filled import import_or_skip
from safetensors.numpy import load_file

from converters import export
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig, TemporalAutoencoder, TemporalDecoderConfig
from hi3d_jax.pretrained import NetworkWeights, abstract_network, parameters, write_model_folder


class Random:
    """Normal numbers as the `Tensors` of a network."""

    def __init__(self, network, config):
        self.specs = parameters(abstract_network(network, config))

    def arrays(self):
        rng = np.random.default_rng(0)
        return ((path, rng.normal(size=spec.shape).astype(spec.dtype)) for path, spec in self.specs.items())


TOWER = CLIPVisionConfig(
    image_size=28, patch_size=14, width=16, mlp_width=32, num_layers=2, num_heads=2, projection_dim=8
)
CASES = {
    "UNetSpatioTemporalConditionModel": ("unet", UNet, UNetConfig.tiny(context_dim=24)),
    "AutoencoderKL": ("vae", Autoencoder, AutoencoderConfig.tiny()),
    "AutoencoderKLTemporalDecoder": ("vae", TemporalAutoencoder, TemporalDecoderConfig(block_channels=(32, 32))),
    "CLIPVisionModelWithProjection": ("image_encoder", CLIPVision, TOWER),
}


@pytest.mark.parametrize("theirs", CASES)
def test_exported_folders_load(tmp_path, theirs):
    name, network, config = CASES[theirs]
    library = import_or_skip("transformers" if name == "image_encoder" else "diffusers")
    write_model_folder(tmp_path / "model", {name: NetworkWeights(network, config, Random(network, config))})
    assert export.main([str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--layout", "diffusers"]) == 0
    loaded = getattr(library, theirs).from_pretrained(tmp_path / "out" / name).state_dict()
    file = load_file(tmp_path / "out" / name / export.DIFFUSERS_FILES[name])
    assert set(file) == {key for key in loaded if not key.endswith("position_ids")}
    for key, array in file.items():
        np.testing.assert_array_equal(loaded[key].numpy(), array, err_msg=key)
    assert json.loads((tmp_path / "out" / name / "config.json").read_text())
