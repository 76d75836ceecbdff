"""Which networks a checkpoint holds, told from its keys and shapes at full size."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from converters import checkpoints, dpt
from converters.conversion import Opened, prepare
from hi3d_jax.models.depth_backbone import DPTConfig


def test_the_transformers_folder_of_dpt_states_its_sizes():
    transformers = pytest.importorskip("transformers", reason="needs transformers' default config of DPT-hybrid")
    fields = json.loads(transformers.DPTConfig(is_hybrid=True, neck_hidden_sizes=[256, 512, 768, 768]).to_json_string())
    marker = {"dpt.embeddings.cls_token": np.zeros((1, 1, 768), np.float32)}
    (part,) = checkpoints.identify(marker, fields).parts
    assert dataclasses.replace(part.config, layer_norm_epsilon=1e-6) == DPTConfig.dpt_hybrid()
    assert part.rules is dpt.TRANSFORMERS_RULES


@pytest.mark.parametrize(("stage", "unet"), [(1, 1_524_623_082), (2, 1_524_321_322)])
def test_the_official_checkpoints_are_covered_at_full_size(shared, stage, unet):
    """Names and shapes of the released files, as arrays of zeros that take no memory."""
    manifest = json.loads((shared / f"fixtures/official/state_dict_stage{stage}.json").read_text())
    zero = np.zeros((), np.float16)
    weights = {key: np.broadcast_to(zero, shape) for key, shape in manifest["shapes"].items()}
    converted = prepare([Opened(Path("released.pt"), weights, None)])
    assert converted.recipe == {"name": "official", "stage": stage}
    counts = {
        name: sum(int(np.prod(spec.shape)) for spec in network.tensors.specs.values())
        for name, network in converted.networks.items()
    }
    assert counts["unet"] == unet
    assert counts["vae"] == manifest["tensors_and_params"]["first_stage_model"][1]
    assert {"image_encoder", "aesthetic_encoder" if stage == 1 else "depth"} <= set(counts)
    assert "conditioning_vae" not in counts
