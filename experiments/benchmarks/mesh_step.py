"""Takes a training step of both stages on several device meshes: python experiments/benchmarks/mesh_step.py

Eight simulated devices, networks of the smallest sizes with random weights, a batch of eight orbits. Whole stage steps
(encoding, condition dropping, U-Net, loss, clipping, AdamW, average) must give the same loss and the same parameters
within 1e-5 however the devices are arranged; what they differ by is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from hi3d_jax.data.loader import CoarseConfig
from hi3d_jax.stages.random_model import random_networks, write_random_model
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training.batches import training_batches
from hi3d_jax.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.program import TrainProgram
from hi3d_jax.training.sharding import make_mesh
from hi3d_jax.training.tasks import StageTask

MESHES = (MeshConfig(8), MeshConfig(1, 8), MeshConfig(2, 2, 2), MeshConfig(2, 1, 2, 2))
VIEWS, SIZE, TOLERANCE = 2, 96, 1e-5
# A quarter of the compile time; the kernels are the same, less optimised.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def stage_config(stage: int, folder: Path) -> TrainConfig:
    """A run of a stage whose random networks are written into `folder`."""
    recipe = dataclasses.replace(Recipe.paper(stage), num_views=VIEWS, image_size=SIZE)
    write_random_model(folder, recipe)
    coarse = CoarseConfig() if stage == 2 else None
    return TrainConfig(
        StageTask(recipe, random_networks(recipe)["unet"][1], (str(folder),), views_at_a_time=VIEWS),
        data=DataConfig(batch_size=8, num_views=VIEWS, image_size=SIZE, coarse=coarse),
        # Adam divides by the gradient's size: with a larger epsilon, rounding in gradients of nothing stays small.
        optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-3, ema_decay=0.9),
        # A new network's last layers are zero, and nothing before them would have a gradient.
        start=str(folder),
    )


def one_step(config: TrainConfig, mesh: MeshConfig) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and parameters after a step."""
    program = TrainProgram(dataclasses.replace(config, mesh=mesh), make_mesh(mesh))
    state, frozen = program.initial_state()
    batch = program.place_batch(next(training_batches(config)))
    state, metrics = program.step.lower(state, frozen, batch).compile(FAST_COMPILE)(state, frozen, batch)
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.ema))
    numbers = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {name: float(metrics[name]) for name in ("loss", "gradient_norm")}, numbers


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 if all meshes agree."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2], choices=(1, 2))
    options = parser.parse_args(arguments)
    agree = True
    for stage in options.stages:
        with tempfile.TemporaryDirectory() as scratch:
            config = stage_config(stage, Path(scratch) / "networks")
            (expected, parameters), *others = [one_step(config, mesh) for mesh in MESHES]
        for mesh, (metrics, other) in zip(MESHES[1:], others, strict=True):
            loss, norm = (abs(metrics[name] / expected[name] - 1) for name in ("loss", "gradient_norm"))
            furthest = max(float(np.abs(other[name] - value).max()) for name, value in parameters.items())
            named = f"({mesh.data}, {mesh.fsdp}, {mesh.tensor}, {mesh.views})"
            print(
                f"stage {stage}, mesh {named} beside (8, 1, 1, 1): loss {expected['loss']:.6f} differs by {loss:.1e} "
                f"of it, gradient's length by {norm:.1e}; {len(parameters)} arrays by {furthest:.1e} at most",
                flush=True,
            )
            agree &= loss <= TOLERANCE and furthest <= TOLERANCE
    print("the meshes agree" if agree else f"the meshes do NOT agree within {TOLERANCE:g}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
