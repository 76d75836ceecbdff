"""The aesthetic head: sac+logos+ava1-l14-linearMSE.pth, and its copy in first_stage.pt."""

from converters.rules import Rule, linear

# Where first_stage.pt keeps it.
SGM_PREFIX = "conditioner.embedders.1.aesthetic_mlp."

# The dropouts in between count in torch's numbering.
_LAYERS = (0, 2, 4, 6, 7)

RULES = [
    *(Rule(rf"layers\.{theirs}\.weight", f"layers.{ours}.kernel", linear) for ours, theirs in enumerate(_LAYERS)),
    *(Rule(rf"layers\.{theirs}\.bias", f"layers.{ours}.bias") for ours, theirs in enumerate(_LAYERS)),
]
IGNORE: list[tuple[str, str]] = []
