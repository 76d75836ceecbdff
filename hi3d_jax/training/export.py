"""From a run's checkpoint to a model folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hi3d_jax.pretrained import PretrainedError, parameters, save_pretrained, with_parameters
from hi3d_jax.training import batches, sharding
from hi3d_jax.training.checkpoint import CheckpointError, read_checkpoint, steps_in
from hi3d_jax.training.loop import load_config
from hi3d_jax.training.networks import sizes
from hi3d_jax.training.program import TrainProgram
from hi3d_jax.training.state import TrainState
from hi3d_jax.training.tasks import AutoencoderTask, StageTask
from hi3d_jax.training.tasks.pictures import over_white

DTYPES = ("float32", "float16", "bfloat16")


def export(
    run: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    dtype: str = "float32",
    num_batches: int = 16,
) -> str:
    """Writes the model folder and returns a line about it.

    `step` is that of the checkpoint (None: the newest readable). `ema` takes the averaged weights, where the run kept
    an average. Raises `ValueError` where there is no such checkpoint, `PretrainedError` where the folder exists.
    """
    if Path(output).exists():
        raise PretrainedError(f"{output} exists already; choose another name or delete it")
    config = load_config(run)
    # One device is enough: the values are only copied.
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1), jax.devices()[:1])
    program = TrainProgram(config, mesh)
    state = _read(Path(run) / "checkpoints", step, program)
    averaged = bool(ema and state.ema)
    networks = program.networks(state.ema if averaged else state.params, program.frozen_values())
    networks, recipe = _as_released(config.task, networks, config, num_batches)
    save_pretrained(output, {name: _cast(network, dtype) for name, network in networks.items()}, recipe)
    kind = "averaged" if averaged else "raw"
    return f"wrote {output}: {', '.join(networks)}; the {kind} weights of step {int(state.step)} in {dtype}"


def _read(folder: Path, step: int | None, program: TrainProgram) -> TrainState:
    """The state of one step, or the newest that can be read; nothing in the folder is touched."""
    steps, problem = steps_in(folder), ""
    for each in [step] if step in steps else [] if step is not None else reversed(steps):
        try:
            return read_checkpoint(folder / str(each), program.state, program.state_shardings)[0]
        except CheckpointError as error:
            problem = f"; that of step {each} is damaged: {error}"
    wanted = "" if step is None else f" of step {step}"
    raise ValueError(f"{folder} has no readable checkpoint{wanted} (it has {', '.join(map(str, steps))}{problem})")


def _as_released(
    task: Any, networks: dict[str, nnx.Module], config: Any, count: int
) -> tuple[dict[str, nnx.Module], dict[str, Any]]:
    """The networks that belong in the folder, and its recipe."""
    if isinstance(task, StageTask):
        networks["unet"].config = sizes(networks["unet"].config)
        return networks, task.recipe.to_dict()
    if not isinstance(task, AutoencoderTask):
        return {name: networks[name] for name in task.trained()}, {}
    vae = networks["vae"]
    factor = 1 / latent_std(vae, config, count)
    vae.config = dataclasses.replace(vae.config, scaling_factor=factor)
    return {"vae": vae}, {}


def latent_std(vae: nnx.Module, config: Any, count: int) -> float:
    """The standard deviation of the latents' means over `count` batches of the run's data."""
    encode = jax.jit(lambda views: vae.encode(over_white(views.reshape(-1, *views.shape[2:]))).mean)
    iterator = batches.training_batches(config)
    latents = np.concatenate([np.asarray(encode(next(iterator)["views"])) for _ in range(count)])
    return float(latents.std())


def _cast(network: nnx.Module, dtype: str) -> nnx.Module:
    """A copy whose parameters are stored in `dtype`. Raises `ValueError` where one does not fit into it."""
    values = {path: value.astype(jnp.dtype(dtype)) for path, value in parameters(network).items()}
    if bad := [path for path, value in values.items() if not bool(jnp.isfinite(value).all())]:
        raise ValueError(f"{', '.join(bad)} has numbers that {dtype} cannot hold; use --dtype float32 or bfloat16")
    return with_parameters(network, lambda path, _: values[path])
