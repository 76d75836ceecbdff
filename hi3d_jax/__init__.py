"""Hi3D in JAX: one image to a textured 3D mesh by video diffusion.

    import hi3d_jax

    (asset,) = hi3d_jax.ImageTo3D.from_pretrained("tiny")("cup.png")
    hi3d_jax.write_mesh("cup.glb", asset.reconstruction.mesh)

The names below are imported when they are first asked for: importing the package itself touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hi3d_jax.mesh import Mesh, write_mesh
    from hi3d_jax.stages.image_to_3d import Asset, ImageTo3D
    from hi3d_jax.stages.pipeline import Hi3DPipeline, Options, Variant
    from hi3d_jax.stages.presets import ReconstructConfig
    from hi3d_jax.stages.reconstruct import Reconstruction, reconstruct
    from hi3d_jax.video import Orbit, read_orbit

_MODULES = {
    "hi3d_jax.mesh": ("Mesh", "write_mesh"),
    "hi3d_jax.stages.image_to_3d": ("Asset", "ImageTo3D"),
    "hi3d_jax.stages.pipeline": ("Hi3DPipeline", "Options", "Variant"),
    "hi3d_jax.stages.presets": ("ReconstructConfig",),
    "hi3d_jax.stages.reconstruct": ("Reconstruction", "reconstruct"),
    "hi3d_jax.video": ("Orbit", "read_orbit"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Asset",
    "Hi3DPipeline",
    "ImageTo3D",
    "Mesh",
    "Options",
    "Orbit",
    "ReconstructConfig",
    "Reconstruction",
    "Variant",
    "read_orbit",
    "reconstruct",
    "write_mesh",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
