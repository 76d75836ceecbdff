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


FIXTURES = Path(__file__).parent / "fixtures"
COPY = "conditioner.embedders.3.encoder."


def released(stage: int) -> dict[str, np.ndarray]:
    """The released file of a stage, with its names and shapes, as zeros that take no memory."""
    networks = json.loads((FIXTURES / "network_manifest.json").read_text())
    shapes = networks["stage1"] | (networks["stage2"] if stage == 2 else {})
    shapes |= {COPY + key.removeprefix("first_stage_model."): shapes[key] for key in shapes if key.startswith("first")}
    shapes |= json.loads((FIXTURES / "conditioner_manifest.json").read_text())
    # The aesthetic score is stage 1's, the depth stage 2's.
    other = f"conditioner.embedders.{3 - stage}."
    zero = np.zeros((), np.float16)
    return {key: np.broadcast_to(zero, shape) for key, shape in shapes.items() if not key.startswith(other)}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_official_manifests_are_these(shared, stage):
    manifest = json.loads((shared / f"fixtures/official/state_dict_stage{stage}.json").read_text())["shapes"]
    assert {key: list(array.shape) for key, array in released(stage).items()} == manifest


@pytest.mark.parametrize(("stage", "unet"), [(1, 1_524_623_082), (2, 1_524_321_322)])
def test_the_official_checkpoints_are_covered_at_full_size(stage, unet):
    converted = prepare([Opened(Path("released.pt"), released(stage), None)])
    assert converted.recipe == {"name": "official", "stage": stage}
    counts = {
        name: sum(int(np.prod(spec.shape)) for spec in network.tensors.specs.values())
        for name, network in converted.networks.items()
    }
    assert (counts["unet"], counts["vae"]) == (unet, 83_653_863)
    # The text tower of 52 M parameters' leftovers stays behind, the visual tower of ViT-H/14 is whole.
    assert counts["image_encoder"] == 632_076_800
    assert set(counts) == {"unet", "vae", "image_encoder"} | (
        {"aesthetic_encoder", "aesthetic_predictor"} if stage == 1 else {"depth"}
    )
