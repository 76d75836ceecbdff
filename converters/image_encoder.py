"""CLIP's visual tower in transformers' names: the folder image_encoder/ of SVD, a CLIPVisionModelWithProjection."""

from converters.rules import Rule, conv2d, linear

_EMBEDDINGS = r"vision_model\.embeddings"
_LAYER = r"vision_model\.encoder\.layers\.(\d+)"
_ATTENTION = _LAYER + r"\.self_attn"

RULES = [
    Rule(_EMBEDDINGS + r"\.patch_embedding\.weight", "patch_embedding.kernel", conv2d),
    Rule(_EMBEDDINGS + r"\.class_embedding", "class_embedding"),
    Rule(_EMBEDDINGS + r"\.position_embedding\.weight", "position_embedding"),
    # The missing letter is transformers' own.
    Rule(r"vision_model\.pre_layrnorm\.weight", "pre_norm.scale"),
    Rule(r"vision_model\.pre_layrnorm\.bias", "pre_norm.bias"),
    Rule(_LAYER + r"\.layer_norm(\d)\.weight", r"layers[\1].norm\2.scale"),
    Rule(_LAYER + r"\.layer_norm(\d)\.bias", r"layers[\1].norm\2.bias"),
    Rule(_ATTENTION + r"\.q_proj\.weight", r"layers[\1].attention.query.kernel", linear),
    Rule(_ATTENTION + r"\.q_proj\.bias", r"layers[\1].attention.query.bias"),
    Rule(_ATTENTION + r"\.k_proj\.weight", r"layers[\1].attention.key.kernel", linear),
    Rule(_ATTENTION + r"\.k_proj\.bias", r"layers[\1].attention.key.bias"),
    Rule(_ATTENTION + r"\.v_proj\.weight", r"layers[\1].attention.value.kernel", linear),
    Rule(_ATTENTION + r"\.v_proj\.bias", r"layers[\1].attention.value.bias"),
    Rule(_ATTENTION + r"\.out_proj\.weight", r"layers[\1].attention.out.kernel", linear),
    Rule(_ATTENTION + r"\.out_proj\.bias", r"layers[\1].attention.out.bias"),
    Rule(_LAYER + r"\.mlp\.(fc\d)\.weight", r"layers[\1].\2.kernel", linear),
    Rule(_LAYER + r"\.mlp\.(fc\d)\.bias", r"layers[\1].\2.bias"),
    Rule(r"vision_model\.post_layernorm\.weight", "post_norm.scale"),
    Rule(r"vision_model\.post_layernorm\.bias", "post_norm.bias"),
    Rule(r"visual_projection\.weight", "projection.kernel", linear),
]

IGNORE = [(_EMBEDDINGS + r"\.position_ids", "0, 1, 2 ...: an index that older transformers saved")]
