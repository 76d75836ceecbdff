"""CLIP's visual towers and their preprocessing, against the official modules, open_clip and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from filled import FIXTURES, filled, import_or_skip, jitted, manifest, nchw, nhwc, random_network, randomised
from flax import nnx
from recorded import TOWER, recorded_tower, tower_shapes

from converters import image_encoder, open_clip, openai_clip
from converters.rules import plan
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig, clip_input
from hi3d_jax.pretrained import abstract_network, parameters

TINY = CLIPVisionConfig(
    image_size=28, patch_size=7, width=32, mlp_width=64, num_layers=3, num_heads=4, projection_dim=24
)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def fixture_tower():
    return jitted(recorded_tower())


@pytest.mark.parametrize("name", ["96x64", "300x448", "1024x1024"])
def test_preprocessing_and_tower_agree_with_the_official_ones(name, fixture_tower):
    stored = np.load(FIXTURES / "clip_image.npz")
    pixels = stored[f"u8_{name}"]
    if name == "1024x1024":
        pixels = pixels.repeat(16, 2).repeat(16, 3)
    seen = jax.jit(clip_input)(nhwc(pixels).astype(np.float32) / 255 * 2 - 1)
    # Measured 2e-6 in values of +-2.
    np.testing.assert_allclose(nchw(seen)[:, :, ::4, ::4], stored[f"pre_{name}"], atol=1e-5)
    embedding, expected = fixture_tower(seen), stored[f"emb_{name}"]
    np.testing.assert_allclose(embedding, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_tower_agrees_with_open_clip(images, activation):
    transformer = import_or_skip("open_clip.transformer")
    layer = {"gelu": torch.nn.GELU, "quick_gelu": transformer.QuickGELU}[activation]
    theirs = transformer.VisionTransformer(28, 7, 32, 3, 4, 2.0, output_dim=24, act_layer=layer)
    weights = {f"visual.{key}": value for key, value in randomised(theirs, seed=1).items()}
    config = CLIPVisionConfig(28, 7, 32, 64, 3, 4, 24, activation)
    ours = jitted(filled(CLIPVision, config, weights, open_clip.RULES, open_clip.IGNORE))(images)
    with torch.no_grad():
        expected = theirs(torch.tensor(nchw(images))).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_tower_agrees_with_transformers(images):
    transformers = import_or_skip("transformers")
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
            hidden_act="gelu",
        )
    )
    weights = randomised(theirs, seed=2)
    ours = jitted(filled(CLIPVision, TINY, weights, image_encoder.RULES, image_encoder.IGNORE))(images)
    with torch.no_grad():
        expected = theirs(torch.tensor(nchw(images))).image_embeds.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("config", "table"),
    [(CLIPVisionConfig.vit_h_14(), open_clip), (CLIPVisionConfig.vit_l_14(), openai_clip)],
    ids=["ViT-H/14", "ViT-L/14"],
)
def test_tables_cover_the_released_checkpoints(config, table):
    shapes = manifest(table.SGM_PREFIX)
    weights = {key: jax.ShapeDtypeStruct(shape, np.float16) for key, shape in shapes.items()}
    expected = parameters(abstract_network(CLIPVision, config))
    made = plan(weights, expected, table.RULES, table.IGNORE)
    used = [shape for key, shape in shapes.items() if key.startswith("visual.")]
    assert sum(spec.size for spec in made.specs.values()) == sum(int(np.prod(shape)) for shape in used)


def test_table_covers_a_whole_open_clip_file():
    weights = {
        **{key: np.zeros((), np.float32) for key in ("logit_scale", "positional_embedding", "text_projection")},
        "token_embedding.weight": np.zeros(1),
        "ln_final.bias": np.zeros(1),
        "transformer.resblocks.3.attn.in_proj_weight": np.zeros(1),
        "attn_mask": np.zeros(1),
    }
    shapes = tower_shapes()
    weights |= {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    plan(weights, parameters(abstract_network(CLIPVision, TOWER)), open_clip.RULES, open_clip.IGNORE)


def test_half_precision_keeps_the_embedding(images):
    full = random_network(CLIPVision, TINY, seed=3)
    half = random_network(CLIPVision, TINY, seed=3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {param.dtype for param in parameters(half).values()} == {jnp.dtype(jnp.bfloat16)}
    exact, rough = jitted(full)(images), jitted(half)(images)
    assert rough.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: measured 2 % of the largest number after three blocks.
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_wrong_sizes_are_refused_with_a_remedy():
    tower = random_network(CLIPVision, TINY, seed=0)
    with pytest.raises(ValueError, match="use clip_input"):
        tower(jnp.zeros((1, 32, 28, 3)))
    with pytest.raises(ValueError, match="multiple of patch_size"):
        CLIPVision(CLIPVisionConfig(image_size=30), rngs=nnx.Rngs(0))
