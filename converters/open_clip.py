"""The visual tower in open_clip's names: open_clip_pytorch_model.bin, and its copies inside the Hi3D checkpoints.

OpenAI's ViT-L/14 has the same names, so the table serves both towers; what is not visual is left behind. It also holds
for `visual.*` alone, with or without the text tower that sgm deletes.
"""

from converters.rules import Rule, conv2d, keep, linear

# Where first_stage.pt and second_stage.pt keep the whole model.
SGM_PREFIX = "conditioner.embedders.0.open_clip.model."

_LAYER = r"visual\.transformer\.resblocks\.(\d+)"
_QKV = tuple(rf"layers[\1].attention.{part}" for part in ("query", "key", "value"))

RULES = [
    Rule(r"visual\.conv1\.weight", "patch_embedding.kernel", conv2d),
    Rule(r"visual\.class_embedding", "class_embedding"),
    Rule(r"visual\.positional_embedding", "position_embedding"),
    Rule(r"visual\.ln_(pre|post)\.weight", r"\1_norm.scale"),
    Rule(r"visual\.ln_(pre|post)\.bias", r"\1_norm.bias"),
    Rule(_LAYER + r"\.ln_(\d)\.weight", r"layers[\1].norm\2.scale"),
    Rule(_LAYER + r"\.ln_(\d)\.bias", r"layers[\1].norm\2.bias"),
    Rule(_LAYER + r"\.attn\.in_proj_weight", tuple(path + ".kernel" for path in _QKV), linear),
    Rule(_LAYER + r"\.attn\.in_proj_bias", tuple(path + ".bias" for path in _QKV)),
    Rule(_LAYER + r"\.attn\.out_proj\.weight", r"layers[\1].attention.out.kernel", linear),
    Rule(_LAYER + r"\.attn\.out_proj\.bias", r"layers[\1].attention.out.bias"),
    Rule(_LAYER + r"\.mlp\.c_fc\.weight", r"layers[\1].fc1.kernel", linear),
    Rule(_LAYER + r"\.mlp\.c_fc\.bias", r"layers[\1].fc1.bias"),
    Rule(_LAYER + r"\.mlp\.c_proj\.weight", r"layers[\1].fc2.kernel", linear),
    Rule(_LAYER + r"\.mlp\.c_proj\.bias", r"layers[\1].fc2.bias"),
    # Stored as a plain matrix that multiplies from the right, unlike torch's linear layers.
    Rule(r"visual\.proj", "projection.kernel", keep),
]

_TEXT = "the text tower, which no image passes through"
IGNORE = [
    (r"transformer\..*", _TEXT),
    (r"(token_embedding|ln_final)\..*", _TEXT),
    (r"positional_embedding|text_projection|attn_mask", _TEXT),
    (r"logit_scale|logit_bias", "the temperature of CLIP's contrastive loss"),
]
