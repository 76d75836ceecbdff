"""How thoroughly an orbit is reconstructed, in one place: sizes, steps and the fits' own settings."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from hi3d_jax.mesh.simplify import MIN_FACES
from hi3d_jax.mesh.surface import MAX_RESOLUTION
from hi3d_jax.mesh.unwrap import TEXTURE_SIZES
from hi3d_jax.neus import NeuSConfig
from hi3d_jax.splatting import FitConfig
from hi3d_jax.stages.run_record import RunError

Quality = Literal["draft", "standard", "full"]


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """One reconstruction. `seed` also seeds the fits, in place of the seeds in `splats` and `neus`.

    `num_interpolated`: views rendered from the Gaussians for the surface fit (M in paper section 4.4); 0: no Gaussians
    are fitted. `image_size`: the longer side, in pixels, to which larger views are reduced for the fits; the texture
    comes from the views as they are. `hull_resolution`: samples along each side of the visual hull, which is also the
    dense part of the signed distance. `num_gaussians`: how many start on the hull. `resolution`: cells along each side
    when the surface is extracted. `num_faces`: of the mesh, about. `texture_size`: pixels each way.
    """

    num_interpolated: int = 16
    image_size: int = 384
    hull_resolution: int = 128
    num_gaussians: int = 10_000
    splats: FitConfig = dataclasses.field(default_factory=FitConfig)
    neus: NeuSConfig = dataclasses.field(
        default_factory=lambda: NeuSConfig(iterations=400, rays=2048, sdf_learning_rate=2e-5)
    )
    resolution: int = 256
    num_faces: int = 40_000
    texture_size: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `RunError` for a value out of its range: better now than after minutes."""
        limits = {
            "num_interpolated": (0, 256),
            "image_size": (16, 4096),
            "hull_resolution": (16, 512),
            "num_gaussians": (16, 10_000_000),
            "resolution": (8, MAX_RESOLUTION),
            "num_faces": (MIN_FACES, 10_000_000),
            "texture_size": TEXTURE_SIZES,
            "seed": (0, 2**31 - 1),
        }
        for name, (lowest, highest) in limits.items():
            value = getattr(self, name)
            if not lowest <= value <= highest:
                raise RunError(f"{name} {value} is outside [{lowest}, {highest}]; choose one within")

    @classmethod
    def preset(cls, quality: Quality, **overrides: Any) -> ReconstructConfig:
        """draft: a first look on a laptop; standard: minutes on a CPU; full: for a GPU. `overrides` replace fields."""
        return dataclasses.replace(PRESETS[quality], **overrides)


PRESETS: dict[Quality, ReconstructConfig] = {
    "draft": ReconstructConfig(
        image_size=256,
        hull_resolution=96,
        num_gaussians=5_000,
        splats=FitConfig(steps=300),
        neus=NeuSConfig(iterations=300, sdf_learning_rate=2e-5),
        resolution=192,
        num_faces=20_000,
        texture_size=1024,
    ),
    "standard": ReconstructConfig(),
    "full": ReconstructConfig(
        image_size=1024,
        hull_resolution=160,
        num_gaussians=100_000,
        splats=FitConfig(steps=7_000, sh_degree=3),
        neus=NeuSConfig(iterations=10_000, rays=8192, sdf_learning_rate=2e-5),
        resolution=512,
        num_faces=200_000,
        texture_size=4096,
    ),
}
