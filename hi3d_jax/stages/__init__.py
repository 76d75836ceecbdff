"""The stages of Hi3D, each a function from arrays to arrays; files only where an output folder is given."""

from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.pipeline import Hi3DPipeline, Options, Variant
from hi3d_jax.stages.presets import ReconstructConfig
from hi3d_jax.stages.recipe import Recipe, RecipeError
from hi3d_jax.stages.reconstruct import Reconstruction, StageError, reconstruct
from hi3d_jax.stages.run_record import RunError

__all__ = [
    "Hi3DPipeline",
    "Options",
    "Recipe",
    "RecipeError",
    "ReconstructConfig",
    "Reconstruction",
    "RunError",
    "StageError",
    "StageModel",
    "Variant",
    "reconstruct",
]
