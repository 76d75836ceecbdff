"""A config and a device mesh as a compiled program: shapes and placement of all arrays, the first state, the step.

Nothing is allocated until `initial_state`: with a mesh of devices that are only described, the step can be lowered and
compiled for machines that are not there.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from hi3d_jax.models.flops import count_flops
from hi3d_jax.pretrained import read_networks
from hi3d_jax.training import lora, networks, sharding
from hi3d_jax.training.config import TrainConfig
from hi3d_jax.training.networks import Values
from hi3d_jax.training.optimizer import make_optimizer
from hi3d_jax.training.state import TrainState, initial_state
from hi3d_jax.training.step import train_step


class TrainProgram:
    """What a config computes on a mesh.

    `state` and `frozen` are the shapes, `state_shardings` and `frozen_shardings` the places of what `step` takes:
    (state, frozen, batch) -> (state, metrics), jitted, the state donated.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        parts = sharding.rows_parts(mesh)
        if (config.data.batch_size // config.optimizer.accumulate) % parts:
            raise ValueError(
                f"data.batch_size={config.data.batch_size} in optimizer.accumulate={config.optimizer.accumulate} parts "
                f"does not divide by mesh.data x mesh.fsdp = {parts}: make the batch larger, or give fewer devices to "
                "these axes and more to mesh.views"
            )
        self._trained, self._frozen = config.task.trained(), config.task.frozen()
        dtype = jnp.dtype(config.precision)
        self._modules = networks.abstract_modules({**self._trained, **self._frozen}, dtype)
        self.optimizer = make_optimizer(config.optimizer)
        # With LoRA the networks themselves are frozen, and what is trained are their updates.
        whole = networks.abstract_values({name: self._modules[name] for name in self._trained})
        self.frozen = networks.abstract_values({name: self._modules[name] for name in self._frozen})
        self.frozen |= whole if config.lora.rank else {}
        self.state: TrainState = jax.eval_shape(self._state_of, whole)
        self.state_shardings = sharding.tree_shardings(mesh, self.state)
        self.frozen_shardings = sharding.tree_shardings(mesh, self.frozen)

    def _state_of(self, whole: Values) -> TrainState:
        """The first state from the trained networks' values."""
        key, config = jax.random.key(self.config.seed), self.config.lora
        params = whole
        if config.rank:
            params = {
                name: lora.initial_updates(config, whole[name], jax.random.fold_in(key, 1))
                for name, network in whole.items()
                if lora.adapted_paths(config, network)
            }
            if not params:
                raise ValueError(f"lora.paths={config.paths!r} matches no matrix of {', '.join(whole)}")
        return initial_state(params, self.optimizer, ema=self.config.optimizer.ema_decay > 0, key=key)

    def initial_state(self) -> tuple[TrainState, Values]:
        """The first state and the frozen values, on their devices: random, or from the folders that the config names.

        Raises `PretrainedError` where a folder does not have what the config wants.
        """
        whole = self._first_values()
        state = jax.jit(self._state_of, out_shardings=self.state_shardings)(whole)
        return state, self._load_frozen() | (whole if self.config.lora.rank else {})

    def frozen_values(self) -> Values:
        """The values of what is not trained. Raises `PretrainedError`."""
        return self._load_frozen() | (self._first_values() if self.config.lora.rank else {})

    def _first_values(self) -> Values:
        """Values of the trained networks before any step."""
        trained, start = self._trained, self.config.start
        loaded = {name for name in trained if start and name in read_networks(start)}
        if start and not loaded:
            raise ValueError(f"start={start} has none of the networks that are trained: {', '.join(trained)}")
        random = {name: spec for name, spec in trained.items() if name not in loaded}
        abstract = networks.abstract_values({name: self._modules[name] for name in random})
        shardings = sharding.tree_shardings(self.mesh, abstract)
        make = jax.jit(lambda key: networks.initial_values(random, key), out_shardings=shardings)
        values = make(jax.random.key(self.config.seed)) if random else {}
        values |= {name: self._load(trained[name], name, start) for name in loaded}
        return {name: values[name] for name in trained}

    def _load_frozen(self) -> Values:
        return {name: self._load(spec, name, spec.source) for name, spec in self._frozen.items()}

    def _load(self, spec: networks.NetworkSpec, name: str, source: str) -> dict[str, Array]:
        place = lambda path, shape: sharding.parameter_sharding(self.mesh, path, shape.shape)  # noqa: E731
        return networks.pretrained_values(spec, name, source, place)

    def networks(self, params: Values, frozen: Values) -> dict[str, nnx.Module]:
        """The networks of the task whose values are given, low-rank updates added."""
        values = {**frozen, **params}
        if self.config.lora.rank:
            updated = {name: lora.merged(self.config.lora, frozen[name], params[name]) for name in params}
            values = {**frozen, **updated}
        return networks.filled({name: self._modules[name] for name in values}, values)

    def loss(
        self, params: Values, frozen: Values, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The task's loss and metrics as a function of trained and frozen values."""
        return self.config.task.loss(self.networks(params, jax.lax.stop_gradient(frozen)), batch, key)

    @functools.cached_property
    def step(self) -> Any:
        """The jitted step; see the class."""
        step = functools.partial(
            train_step,
            loss=self.loss,
            optimizer=self.optimizer,
            config=self.config.optimizer,
            guard=self.config.guard,
        )
        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings, None))

    @functools.cached_property
    def evaluate(self) -> Any:
        """Jitted (state, frozen, batch, key) -> metrics, with the averaged weights where there are any."""

        def evaluate(state: TrainState, frozen: Values, batch: Mapping[str, Array], key: Array) -> dict[str, Array]:
            value, metrics = self.loss(state.ema or state.params, frozen, batch, key)
            return {"loss": value, **metrics}

        return jax.jit(evaluate)

    @functools.cached_property
    def samples(self) -> Any:
        """Jitted (state, frozen, batch, key) -> (rows of pictures in [-1, 1], scalars), with the averaged weights."""

        def samples(state: TrainState, frozen: Values, batch: Mapping[str, Array], key: Array):
            return self.config.task.samples(self.networks(state.ema or state.params, frozen), batch, key)

        return jax.jit(samples)

    def step_flops(self, batch: Mapping[str, Any]) -> int:
        """FLOPs that one step's loss and gradients need, as if nothing were recomputed."""
        task = self.config.task
        if hasattr(task, "unet"):
            task = dataclasses.replace(task, unet=dataclasses.replace(task.unet, remat="none"))
        program = (
            self if task == self.config.task else TrainProgram(dataclasses.replace(self.config, task=task), self.mesh)
        )
        gradients = jax.grad(program.loss, has_aux=True)
        return count_flops(jax.make_jaxpr(gradients)(self.state.params, self.frozen, batch, jax.random.key(0)))

    def place_batch(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """A batch's arrays on the devices: each process gives the rows of its `reading_part`."""
        arrays = {name: value for name, value in batch.items() if value.dtype.kind in "fiu"}
        _, parts = self.reading_part
        shardings = sharding.batch_shardings(self.mesh, arrays, parts)
        shapes = {name: (parts * len(value), *value.shape[1:]) for name, value in arrays.items()}
        make = jax.make_array_from_process_local_data
        return {name: make(shardings[name], value, shapes[name]) for name, value in arrays.items()}

    @functools.cached_property
    def reading_part(self) -> tuple[int, int]:
        """The part of every batch that this process reads, and the number of parts. Raises `ValueError`."""
        return sharding.reading_part(sharding.processes_of(self.mesh), jax.process_index())


def count_parameters(values: Values, pattern: str = ".*") -> int:
    """Numbers in the parameters whose network.path matches in full."""
    return sum(
        p.size
        for name, network in values.items()
        for path, p in network.items()
        if re.fullmatch(pattern, f"{name}.{path}")
    )
