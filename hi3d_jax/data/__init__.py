"""Data: pictures rendered from 3D objects, and an object to begin with."""

from hi3d_jax.data.example import example_mesh
from hi3d_jax.data.render import load_object, normalise, render_orbit, write_orbit

__all__ = ["example_mesh", "load_object", "normalise", "render_orbit", "write_orbit"]
