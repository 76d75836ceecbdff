"""From runs' checkpoints to model folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hi3d_jax.pretrained import PretrainedError, parameters, save_bundle, save_pretrained, with_parameters
from hi3d_jax.training import batches, sharding
from hi3d_jax.training.checkpoint import CheckpointError, read_checkpoint, steps_in
from hi3d_jax.training.config import MeshConfig
from hi3d_jax.training.loop import load_config
from hi3d_jax.training.networks import sizes
from hi3d_jax.training.program import TrainProgram
from hi3d_jax.training.state import TrainState
from hi3d_jax.training.tasks import AutoencoderTask, StageTask
from hi3d_jax.training.tasks.pictures import over_white

DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Export:
    """What becomes of a run. `step` is that of the checkpoint (None: the newest readable).

    `ema` takes the averaged weights, where the run kept an average; `dtype` is what they are stored in. The scaling
    factor of an autoencoder is measured on `num_batches` of the run's data.
    """

    step: int | None = None
    ema: bool = True
    dtype: str = "float32"
    num_batches: int = 16

    def contents(self, run: str | Path) -> tuple[dict[str, nnx.Module], dict[str, Any], str]:
        """The networks that belong in the run's model folder, its recipe, and a line about the weights."""
        config = load_config(run)
        # One device is enough: the values are only copied.
        mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        program = TrainProgram(config, mesh)
        state = _read(Path(run) / "checkpoints", self.step, program)
        averaged = bool(self.ema and state.ema)
        networks = program.networks(state.ema if averaged else state.params, program.frozen_values())
        networks, recipe = _as_released(config.task, networks, config, self.num_batches)
        kind = "averaged" if averaged else "raw"
        line = f"{', '.join(networks)}; the {kind} weights of step {int(state.step)} in {self.dtype}"
        return {name: _cast(network, self.dtype) for name, network in networks.items()}, recipe, line


def export(run: str | Path, output: str | Path, how: Export | None = None) -> str:
    """Writes the model folder of a run and returns a line about it.

    Raises `ValueError` where there is no such checkpoint, `PretrainedError` where the folder exists.
    """
    _refuse_existing(output)
    networks, recipe, line = (how or Export()).contents(run)
    save_pretrained(output, networks, recipe)
    return f"wrote {output}: {line}"


def export_stages(runs: Sequence[str | Path], output: str | Path, how: Export | None = None) -> str:
    """Writes the stages that `runs` trained into one folder, as stage1/ and stage2/; what is equal is stored once.

    Returns a line for each. Raises as `export`, and `ValueError` where runs do not train different stages.
    """
    _refuse_existing(output)
    models: dict[str, tuple[dict[str, nnx.Module], dict[str, Any]]] = {}
    lines: dict[str, str] = {}
    for run in runs:
        task = load_config(run).task
        if not isinstance(task, StageTask):
            raise ValueError(f"{run} trains no stage; export it by itself")
        name = f"stage{task.recipe.stage}"
        if name in models:
            raise ValueError(f"{run} trains {name}, as does another of the runs; name one of them")
        networks, recipe, lines[name] = (how or Export()).contents(run)
        models[name] = networks, recipe
    references = save_bundle(output, dict(sorted(models.items())))
    written = []
    for name, shared in references.items():
        also = "".join(f"; {network} is {where}" for network, where in shared.items())
        written.append(f"wrote {Path(output) / name}: {lines[name]}{also}")
    return "\n".join(written)


def _refuse_existing(output: str | Path) -> None:
    if Path(output).exists():
        raise PretrainedError(f"{output} exists already; choose another name or delete it")


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
        released = {name: network for name, network in networks.items() if name != task.decoded.lpips_network}
        return released, task.recipe.to_dict()
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
