"""3D Gaussian splatting in plain JAX: draw, fit, save. Runs on CPU, GPU and TPU; no extension is compiled."""

from hi3d_jax.splatting.fit import FitConfig, fit
from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.initialise import from_points
from hi3d_jax.splatting.ply import SplatFileError, read_ply, write_ply
from hi3d_jax.splatting.rasterize import LightStops, Rendering, capacity_for, capacity_for_all, light_stops, render

__all__ = [
    "FitConfig",
    "Gaussians",
    "LightStops",
    "Rendering",
    "SplatFileError",
    "capacity_for",
    "capacity_for_all",
    "fit",
    "from_points",
    "light_stops",
    "read_ply",
    "render",
    "write_ply",
]
