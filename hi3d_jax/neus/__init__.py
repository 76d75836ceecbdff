"""NeuS: a surface from posed, masked views, as a signed-distance field with colours (paper section 4.4)."""

from hi3d_jax.neus.fields import FieldConfig, Fields, init_fields
from hi3d_jax.neus.fit import FittedSurface, LossWeights, NeuSConfig, NeuSError, fit
from hi3d_jax.neus.hash_grid import HashGridConfig
from hi3d_jax.neus.render import SamplingConfig

__all__ = [
    "FieldConfig",
    "Fields",
    "FittedSurface",
    "HashGridConfig",
    "LossWeights",
    "NeuSConfig",
    "NeuSError",
    "SamplingConfig",
    "fit",
    "init_fields",
]
