"""Data: pictures rendered from 3D objects."""

from hi3d_jax.data.render import load_object, normalise, render_orbit, write_orbit

__all__ = ["load_object", "normalise", "render_orbit", "write_orbit"]
