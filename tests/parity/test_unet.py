"""The spatio-temporal U-Net against sgm's (recorded) and diffusers' (live), block by block, and its gradients."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from filled import FIXTURES, filled, import_or_skip, nhwc, randomised
from flax import nnx
from recorded import FAST_COMPILE, UNETS, recorded_unet, relative_error

from converters.rules import convert, plan, plan_export
from converters.svd_unet import config_from_diffusers, diffusers_rules, sgm_rules, stage_of
from hi3d_jax.models.embeddings import sinusoidal_embedding
from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.pretrained import abstract_network, parameters


class Tapped(nnx.Module):
    """A module whose output is kept in `taps` when it is called."""

    def __init__(self, module: nnx.Module, keep):
        self.module = module
        self.keep = nnx.static(keep)

    def __call__(self, *args):
        out = self.module(*args)
        self.keep(out)
        return out


def tap(unet: UNet) -> dict[str, jax.Array]:
    """Has every block of `unet` write its output, under the fixtures' names, into the dictionary returned."""
    taps: dict[str, jax.Array] = {}

    def wrap(parent, name, key):
        module = parent[name] if isinstance(name, int) else getattr(parent, name)
        wrapped = Tapped(module, lambda out: taps.__setitem__(f"tap_{key}", out))
        if isinstance(name, int):
            parent[name] = wrapped
        else:
            setattr(parent, name, wrapped)

    first = unet.down_blocks[0]
    wrap(first.resnets[0], "temporal_res_block", "in1_res_time_stack")
    wrap(first.attentions[0].transformer_blocks, 0, "in1_attn_spatial")
    wrap(first.attentions[0].temporal_transformer_blocks, 0, "in1_attn_temporal")
    wrap(unet, "time_embedding", "time_embed")
    wrap(unet, "add_embedding", "label_emb")
    wrap(unet, "conv_in", "in0")
    wrap(unet, "mid_block", "middle")
    ends = [
        end
        for block in unet.down_blocks
        for end in [
            *((block.attentions or block.resnets, i) for i in range(len(block.resnets))),
            *((block.downsamplers, i) for i in range(len(block.downsamplers))),
        ]
    ]
    for count, (parent, i) in enumerate(ends, 1):
        wrap(parent, i, f"in{count}")
    count = 0
    for block in unet.up_blocks:
        layers = len(block.resnets)
        for i in range(layers):
            last = i == layers - 1 and len(block.upsamplers)
            wrap(*((block.upsamplers, 0) if last else (block.attentions or block.resnets, i)), f"out{count}")
            count += 1
    return taps


def as_recorded(key: str, tapped: np.ndarray) -> np.ndarray:
    """A tap with views and videos in one axis and channels where the fixtures have them, every fourth channel."""
    if key in ("tap_time_embed", "tap_label_emb"):
        return tapped.reshape(-1, tapped.shape[-1])
    tapped = tapped[..., ::4]
    if key == "tap_in1_attn_temporal":
        tapped = tapped.swapaxes(1, 2)
    if "attn" in key:
        return tapped.reshape(-1, *tapped.shape[2:])
    if key == "tap_in1_res_time_stack":
        return np.moveaxis(tapped, -1, 1)
    return np.moveaxis(tapped.reshape(-1, *tapped.shape[2:]), -1, 1)


@pytest.mark.parametrize("name", UNETS)
def test_every_block_agrees_with_the_official_network(name):
    stored = np.load(FIXTURES / f"{name}.npz")
    graphdef, params = nnx.split(recorded_unet(name))
    videos, views = stored["image_only_indicator"].shape

    def forward(params, *inputs):
        unet = nnx.merge(graphdef, params)
        taps = tap(unet)
        return unet(*inputs), taps

    forward = jax.jit(forward, compiler_options=FAST_COMPILE)

    def per_view(array, repeat=False):
        array = np.repeat(array, views, axis=0) if repeat else array
        return array.reshape(videos, views, *array.shape[1:])

    def run(vector, context, image_only):
        x = per_view(nhwc(stored["x"]))
        out, taps = forward(params, x, per_view(stored["timesteps"]), vector, context, image_only)
        return out, jax.tree.map(np.asarray, taps)

    def error(out, key):
        return relative_error(out, per_view(nhwc(stored[key])))

    per_video = per_view(stored["y"], repeat=True), per_view(stored["context"], repeat=True)
    # Measured: at most 2e-6, outputs and blocks alike.
    out, taps = run(*per_video, stored["image_only_indicator"])
    assert error(out, "out") < 1e-5
    recorded = {key for key in stored if key.startswith("tap_")}
    assert set(taps) == recorded
    errors = {key: relative_error(as_recorded(key, taps[key]), stored[key]) for key in recorded}
    assert max(errors.values()) < 1e-5, errors
    out, _ = run(*per_video, stored["image_only_indicator_img"])
    assert error(out, "out_img") < 1e-5
    out, _ = run(per_view(stored["y_frames"]), per_view(stored["context_frames"]), stored["image_only_indicator"])
    assert error(out, "out_frames") < 1e-5


@pytest.mark.parametrize(
    ("stage", "config", "count"),
    [("stage1", UNetConfig.hi3d_stage1(), 1_524_623_082), ("stage2", UNetConfig.hi3d_stage2(), 1_524_321_322)],
)
def test_every_key_of_the_published_checkpoints_has_its_place(stage, config, count):
    manifest = json.loads((FIXTURES / "network_manifest.json").read_text())
    prefix = "model.diffusion_model."
    shapes = {key: tuple(shape) for key, shape in (manifest["stage1"] | manifest[stage]).items()}
    shapes = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    assert stage_of(shapes, "") == config
    weights = {key: jax.ShapeDtypeStruct(shape, np.dtype(np.float16)) for key, shape in shapes.items()}
    expected = parameters(abstract_network(UNet, config))
    assert sum(int(np.prod(spec.shape)) for spec in expected.values()) == count
    assert len(plan(weights, expected, sgm_rules(config)).specs) == 1428
    back = plan_export(expected, sgm_rules(config)).specs
    assert {key: spec.shape for key, spec in back.items()} == shapes


def test_a_checkpoint_of_another_network_is_refused():
    with pytest.raises(ValueError, match="9 channels and a vector of 768"):
        stage_of({"input_blocks.0.0.weight": (320, 9, 3, 3), "label_emb.0.0.weight": (1280, 768)}, "")
    with pytest.raises(ValueError, match=r"label_emb\.0\.0\.weight is missing"):
        stage_of({"input_blocks.0.0.weight": (320, 8, 3, 3)}, "")


def test_the_full_network_is_traced_without_allocating():
    config = UNetConfig.hi3d_stage2()
    graphdef, params = nnx.split(abstract_network(UNet, config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    spec = jax.ShapeDtypeStruct
    inputs = ((2, 16, 128, 128, 17), (2,), (2, 512), (2, 1, 1024))
    out = jax.eval_shape(
        lambda params, *inputs: nnx.merge(graphdef, params)(*inputs), params, *(spec(s, jnp.float32) for s in inputs)
    )
    assert (out.shape, out.dtype) == ((2, 16, 128, 128, 4), jnp.float32)


@pytest.fixture(scope="module")
def diffusers_unet() -> torch.nn.Module:
    """A small UNetSpatioTemporalConditionModel. Its groups have 2 and 3 channels: with one, a bias would do nothing."""
    diffusers = import_or_skip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNetSpatioTemporalConditionModel(
        in_channels=5,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48,
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=(2, 4),
        transformer_layers_per_block=2,
    )


def test_output_and_gradients_agree_with_diffusers(diffusers_unet):
    """Two context tokens here, so that the attention to the context is more than a sum."""
    weights = randomised(diffusers_unet, seed=1, scale=0.03)
    config = config_from_diffusers({**diffusers_unet.config, "_class_name": type(diffusers_unet).__name__})
    rules = diffusers_rules(config)
    unet = filled(UNet, config, weights, rules)
    rng = np.random.default_rng(2)
    x, probe = (rng.normal(size=(2, 3, 8, 4, channels)).astype(np.float32) for channels in (5, 4))
    c_noise, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2,), (2, 2, 24)))
    ids = rng.uniform(0, 30, size=(2, 3)).astype(np.float32)

    tensors = [torch.from_numpy(np.moveaxis(x, -1, 2).copy()), torch.from_numpy(c_noise), torch.from_numpy(context)]
    expected = diffusers_unet(*tensors, added_time_ids=torch.from_numpy(ids)).sample
    named = dict(diffusers_unet.named_parameters())
    loss = (expected * torch.from_numpy(np.moveaxis(probe, -1, 2).copy())).sum()
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    graphdef, params = nnx.split(unet)
    vector = sinusoidal_embedding(jnp.asarray(ids), 16).reshape(2, 48)

    def objective(params):
        out = nnx.merge(graphdef, params)(jnp.asarray(x), jnp.asarray(c_noise), vector, jnp.asarray(context))
        return (out * probe).sum(), out

    compiled = jax.jit(jax.value_and_grad(objective, has_aux=True), compiler_options=FAST_COMPILE)
    (_, out), ours = compiled(params)
    assert relative_error(np.moveaxis(np.asarray(out), -1, 2), expected.detach().numpy()) < 1e-5
    ours = parameters(nnx.merge(graphdef, ours))
    theirs = convert({key: g.numpy() for key, g in gradients.items()}, ours, rules)
    largest = max(np.abs(g).max() for g in theirs.values())
    # Relative to each parameter's gradient, down to where float32 sums of the largest one lose their digits.
    errors = {path: np.abs(ours[path] - g).max() / (np.abs(g).max() + 1e-4 * largest) for path, g in theirs.items()}
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_diffusers_configs_that_we_cannot_run_are_refused(diffusers_unet):
    config = {**diffusers_unet.config, "_class_name": "UNetSpatioTemporalConditionModel"}
    assert config_from_diffusers(config) == dataclasses.replace(
        UNetConfig.tiny(in_channels=5, vector_dim=48, context_dim=24),
        block_channels=(64, 96),
        transformer_layers=2,
        attention_down_and_up_epsilon=1e-6,
    )
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        config_from_diffusers(config | {"_class_name": "UNet2DConditionModel"})
    with pytest.raises(ValueError, match="layers_per_block"):
        config_from_diffusers(config | {"layers_per_block": (1, 2)})
    with pytest.raises(ValueError, match="do not mirror"):
        config_from_diffusers(config | {"up_block_types": config["up_block_types"][::-1]})
    with pytest.raises(ValueError, match="in_channels"):
        config_from_diffusers({key: value for key, value in config.items() if key != "in_channels"})
