"""OpenAI's ViT-L/14 under the aesthetic predictor: its copy in first_stage.pt, and a state dict of ViT-L-14.pt."""

from converters import open_clip

# Where first_stage.pt keeps the whole model.
SGM_PREFIX = "conditioner.embedders.1.aesthetic_model."

RULES = open_clip.RULES
IGNORE = [
    *open_clip.IGNORE,
    (r"input_resolution|context_length|vocab_size", "numbers that OpenAI's archive keeps beside the weights"),
]
