"""What can be learnt: each task is a config that knows its networks, its loss and how to show what it makes."""

from hi3d_jax.training.tasks.autoencoder import AutoencoderTask
from hi3d_jax.training.tasks.depth import DepthTask
from hi3d_jax.training.tasks.stage import StageTask

Task = AutoencoderTask | DepthTask | StageTask

__all__ = ["AutoencoderTask", "DepthTask", "StageTask", "Task"]
