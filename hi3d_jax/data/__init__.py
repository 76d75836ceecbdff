"""Data: pictures rendered from 3D objects, as files to look at and as records to train on; an object to begin with.

The way of a training set: `sources` finds objects, `dataset` plans and renders them, `runners` share the work out,
`shards` and `records` are what comes to lie on disk, `derived` makes caches of it; `record_folder` reads, `loader`
batches, and `degrade` spoils views for stage 2. Those are imported by their modules' names: the libraries of training
take seconds to load, for which a picture need not wait.
"""

from hi3d_jax.data.example import example_mesh
from hi3d_jax.data.render import load_object, normalise, render_orbit, write_orbit

__all__ = ["example_mesh", "load_object", "normalise", "render_orbit", "write_orbit"]
