"""3D Gaussian splatting in plain JAX: draw, fit, save. Runs on CPU, GPU and TPU; no extension is compiled."""

from hi3d_jax.splatting.fit import FitConfig, fit
from hi3d_jax.splatting.gaussians import Gaussians
from hi3d_jax.splatting.initialise import from_points
from hi3d_jax.splatting.rasterize import Rendering, capacity_for, render

__all__ = ["FitConfig", "Gaussians", "Rendering", "capacity_for", "fit", "from_points", "render"]
