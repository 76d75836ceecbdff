"""DPT-hybrid's tables: MiDaS's dpt_hybrid_384.pt, its copy inside second_stage.pt, and transformers' DPT folder."""

import numpy as np

from converters.rules import Rule, Transform, conv1x1_as_linear, conv2d, linear

# Where second_stage.pt keeps the whole of dpt_hybrid_384.pt.
SGM_PREFIX = "conditioner.embedders.2.model.model."

_class_token = Transform("(1, 1, c) -> (c,)", lambda x: np.squeeze(x, (0, 1)), lambda x: x[None, None])
_positions = Transform("(1, n, c) -> (n, c)", lambda x: np.squeeze(x, 0), lambda x: x[None])


def _affine(source: str, target: str) -> list[Rule]:
    return [Rule(source + r"\.weight", target + ".scale"), Rule(source + r"\.bias", target + ".bias")]


def _linear(source: str, target: str, transform: Transform = linear) -> list[Rule]:
    return [Rule(source + r"\.weight", target + ".kernel", transform), Rule(source + r"\.bias", target + ".bias")]


def _conv(source: str, target: str) -> list[Rule]:
    return _linear(source, target, conv2d)


def _fusion(index: int, finer_unit: str, unit: str, out: str) -> list[Rule]:
    """The rules of fusion block `index`; the coarsest (3) has no use for its unit on a finer map."""
    rules = _conv(unit, rf"fusions.{index}.unit.conv\1") + _linear(out, f"fusions.{index}.out", conv1x1_as_linear)
    return rules if index == 3 else rules + _conv(finer_unit, rf"fusions.{index}.finer_unit.conv\1")


def _midas_fusion(index: int) -> list[Rule]:
    block = rf"scratch\.refinenet{index + 1}"
    unit = block + r"\.resConfUnit{}\.conv(\d)"
    return _fusion(index, unit.format(1), unit.format(2), block + r"\.out_conv")


def _transformers_fusion(index: int) -> list[Rule]:
    # Its layers run from coarse to fine.
    block = rf"neck\.fusion_stage\.layers\.{3 - index}"
    unit = block + r"\.residual_layer{}\.convolution(\d)"
    return _fusion(index, unit.format(1), unit.format(2), block + r"\.projection")


_VIT = r"pretrained\.model"
_RESNET = _VIT + r"\.patch_embed\.backbone"
_BLOCK = _RESNET + r"\.stages\.(\d+)\.blocks\.(\d+)"
_LAYER = _VIT + r"\.blocks\.(\d+)"
_QKV = tuple(rf"encoder.layers.\1.attention.{part}" for part in ("query", "key", "value"))

RULES = [
    Rule(_VIT + r"\.cls_token", "encoder.class_embedding", _class_token),
    Rule(_VIT + r"\.pos_embed", "encoder.position_embedding", _positions),
    Rule(_RESNET + r"\.stem\.conv\.weight", "encoder.resnet.stem.kernel", conv2d),
    *_affine(_RESNET + r"\.stem\.norm", "encoder.resnet.stem_norm"),
    Rule(_BLOCK + r"\.conv(\d)\.weight", r"encoder.resnet.stages.\1.\2.conv\3.kernel", conv2d),
    *_affine(_BLOCK + r"\.norm(\d)", r"encoder.resnet.stages.\1.\2.norm\3"),
    Rule(_BLOCK + r"\.downsample\.conv\.weight", r"encoder.resnet.stages.\1.\2.shortcut.kernel", conv2d),
    *_affine(_BLOCK + r"\.downsample\.norm", r"encoder.resnet.stages.\1.\2.shortcut_norm"),
    *_linear(_VIT + r"\.patch_embed\.proj", "encoder.patch_embedding", conv1x1_as_linear),
    *_affine(_LAYER + r"\.norm(\d)", r"encoder.layers.\1.norm\2"),
    Rule(_LAYER + r"\.attn\.qkv\.weight", tuple(path + ".kernel" for path in _QKV), linear),
    Rule(_LAYER + r"\.attn\.qkv\.bias", tuple(path + ".bias" for path in _QKV)),
    *_linear(_LAYER + r"\.attn\.proj", r"encoder.layers.\1.attention.out"),
    *_linear(_LAYER + r"\.mlp\.(fc\d)", r"encoder.layers.\1.\2"),
    *_linear(r"pretrained\.act_postprocess3\.0\.project\.0", "readouts.0.readout"),
    *_linear(r"pretrained\.act_postprocess3\.3", "readouts.0.projection", conv1x1_as_linear),
    *_linear(r"pretrained\.act_postprocess4\.0\.project\.0", "readouts.1.readout"),
    *_linear(r"pretrained\.act_postprocess4\.3", "readouts.1.projection", conv1x1_as_linear),
    *_conv(r"pretrained\.act_postprocess4\.4", "readouts.1.downsample"),
    # MiDaS counts its maps from 1.
    *(Rule(rf"scratch\.layer{index + 1}_rn\.weight", f"convs.{index}.kernel", conv2d) for index in range(4)),
    *(rule for index in range(4) for rule in _midas_fusion(index)),
    *_conv(r"scratch\.output_conv\.0", "head_conv1"),
    *_conv(r"scratch\.output_conv\.2", "head_conv2"),
    *_linear(r"scratch\.output_conv\.4", "head_out", conv1x1_as_linear),
]

IGNORE = [
    (_VIT + r"\.(norm|head)\..*", "the ViT's ImageNet classifier, which no depth is computed from"),
    (r"scratch\.refinenet4\.resConfUnit1\..*", "the coarsest fusion has no second input, so this unit never runs"),
    (r"auxlayer\..*", "an auxiliary head of training"),
]

_HF = r"dpt\.embeddings"
_HF_BLOCK = _HF + r"\.backbone\.bit\.encoder\.stages\.(\d+)\.layers\.(\d+)"
_HF_LAYER = r"dpt\.encoder\.layer\.(\d+)"
_NECK = r"neck\.reassemble_stage"

TRANSFORMERS_RULES = [
    Rule(_HF + r"\.cls_token", "encoder.class_embedding", _class_token),
    Rule(_HF + r"\.position_embeddings", "encoder.position_embedding", _positions),
    Rule(_HF + r"\.backbone\.bit\.embedder\.convolution\.weight", "encoder.resnet.stem.kernel", conv2d),
    *_affine(_HF + r"\.backbone\.bit\.embedder\.norm", "encoder.resnet.stem_norm"),
    Rule(_HF_BLOCK + r"\.conv(\d)\.weight", r"encoder.resnet.stages.\1.\2.conv\3.kernel", conv2d),
    *_affine(_HF_BLOCK + r"\.norm(\d)", r"encoder.resnet.stages.\1.\2.norm\3"),
    Rule(_HF_BLOCK + r"\.downsample\.conv\.weight", r"encoder.resnet.stages.\1.\2.shortcut.kernel", conv2d),
    *_affine(_HF_BLOCK + r"\.downsample\.norm", r"encoder.resnet.stages.\1.\2.shortcut_norm"),
    *_linear(_HF + r"\.projection", "encoder.patch_embedding", conv1x1_as_linear),
    *_affine(_HF_LAYER + r"\.layernorm_before", r"encoder.layers.\1.norm1"),
    *_affine(_HF_LAYER + r"\.layernorm_after", r"encoder.layers.\1.norm2"),
    *_linear(_HF_LAYER + r"\.attention\.attention\.(query|key|value)", r"encoder.layers.\1.attention.\2"),
    *_linear(_HF_LAYER + r"\.attention\.output\.dense", r"encoder.layers.\1.attention.out"),
    *_linear(_HF_LAYER + r"\.intermediate\.dense", r"encoder.layers.\1.fc1"),
    *_linear(_HF_LAYER + r"\.output\.dense", r"encoder.layers.\1.fc2"),
    # The folder numbers all four maps; the first two come from the ResNet and have no readout.
    *_linear(_NECK + r"\.readout_projects\.2\.0", "readouts.0.readout"),
    *_linear(_NECK + r"\.readout_projects\.3\.0", "readouts.1.readout"),
    *_linear(_NECK + r"\.layers\.2\.projection", "readouts.0.projection", conv1x1_as_linear),
    *_linear(_NECK + r"\.layers\.3\.projection", "readouts.1.projection", conv1x1_as_linear),
    *_conv(_NECK + r"\.layers\.3\.resize", "readouts.1.downsample"),
    Rule(r"neck\.convs\.(\d)\.weight", r"convs.\1.kernel", conv2d),
    *(rule for index in range(4) for rule in _transformers_fusion(index)),
    *_conv(r"head\.head\.0", "head_conv1"),
    *_conv(r"head\.head\.2", "head_conv2"),
    *_linear(r"head\.head\.4", "head_out", conv1x1_as_linear),
]

TRANSFORMERS_IGNORE = [
    (r"dpt\.(layernorm|pooler)\..*", "what follows the last tapped layer, which no depth is computed from"),
    (r"neck\.fusion_stage\.layers\.0\.residual_layer1\..*", "the coarsest fusion has no second input"),
]
