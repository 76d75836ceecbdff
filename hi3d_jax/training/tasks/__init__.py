"""What can be learnt: each task is a config that knows its networks, its loss and how to show what it makes."""

from hi3d_jax.training.tasks.autoencoder import AutoencoderTask

Task = AutoencoderTask

__all__ = ["AutoencoderTask", "Task"]
