"""A run from its config to its last step: resume, step, look, save.

    folder/config.json     the resolved config, compared at every resume
    folder/checkpoints/    see checkpoint.py
    folder/metrics.jsonl, tensorboard/, samples/    see metric_writer.py

The same command starts a run and takes it up again, after whatever ended it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from hi3d_jax.atomic import written_aside
from hi3d_jax.pretrained import config_from_dict, config_to_dict
from hi3d_jax.training import batches, sharding
from hi3d_jax.training.checkpoint import VALIDATION_LOSS, Checkpoints
from hi3d_jax.training.config import TrainConfig, differences
from hi3d_jax.training.metric_writer import MetricWriter
from hi3d_jax.training.optimizer import learning_rate
from hi3d_jax.training.pace import Pace
from hi3d_jax.training.program import TrainProgram, count_parameters
from hi3d_jax.training.signals import Signals
from hi3d_jax.training.state import TrainState
from hi3d_jax.training.tasks.pictures import grid


class TrainingStopped(RuntimeError):
    """A run that ended itself; the text says why and what to do."""


class Preempted(SystemExit):
    """SIGTERM or Ctrl-C came, and what was reached is saved."""


def train(config: TrainConfig, *, accept_changes: bool = False) -> TrainState:
    """Trains from the folder's last good checkpoint, or from the start, to `config.steps`; returns the last state.

    Raises `ValueError` for a config that is impossible or is not the folder's (`accept_changes` lets it pass),
    `TrainingStopped` where the guard ends the run, `Preempted` after SIGTERM.
    """
    start_processes(config)
    folder = Path(config.folder)
    store_config(folder, config, accept_changes)
    return Run(config, folder).finish()


def start_processes(config: TrainConfig) -> None:
    """Joins the other processes, where the config says that there are any."""
    mesh = config.mesh
    if mesh.distributed and not jax.distributed.is_initialized():
        told = mesh.coordinator or None, mesh.num_processes or None, mesh.process_id if mesh.num_processes else None
        jax.distributed.initialize(*told)


def say(text: str) -> None:
    """A line of its own above the progress bar, from the first process."""
    if jax.process_index() == 0:
        tqdm.write(text)


def store_config(folder: Path, config: TrainConfig, accept_changes: bool = False) -> None:
    """Writes config.json, or compares the one that is there. Raises `ValueError` saying what differs."""
    path = folder / "config.json"
    if path.exists():
        stored = load_config(folder)
        free, changed = differences(stored, config)
        if changed and not accept_changes:
            raise ValueError(
                f"{folder} holds another run; differing are {'; '.join(changed)}. Give the same values to continue it, "
                "another --folder to start anew, or --accept-changes to continue it differently"
            )
        for line in free + changed:
            say(f"changed since the run began: {line}")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(json.dumps(config_to_dict(config), indent=1) + "\n")


def load_config(folder: str | Path) -> TrainConfig:
    """The config that a run is stored with. Raises `ValueError` if there is none or it is of another version."""
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); is {folder} the folder of a run?") from error
    return config_from_dict(TrainConfig, fields, str(path))


class Run:
    """The state of a run in this process."""

    def __init__(self, config: TrainConfig, folder: Path):
        self.config, self.folder = config, folder
        self.program = TrainProgram(config, sharding.make_mesh(config.mesh))
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint, say)
        self.data = batches.training_batches(config, self.program.reading_part)
        self.state, self.frozen = self._begin()
        self.writer = MetricWriter(folder, tensorboard=config.log.tensorboard, active=jax.process_index() == 0, say=say)
        self.validation_loss: float | None = None

    def _begin(self) -> tuple[TrainState, Any]:
        # First what is stored: making first weights, or reading a start folder, only to throw them away takes memory.
        restored = self.checkpoints.restore(self.program.state, self.program.state_shardings)
        if restored is None:
            state, frozen = self.program.initial_state()
            where = "the start"
        else:
            (state, positions), frozen = restored, self.program.frozen_values()
            # Positions count batches, which are the same however many processes read them.
            self.data.set_state(positions[min(jax.process_index(), len(positions) - 1)])
            where = f"step {int(state.step)}"
        say(f"{self.folder}: {count_parameters(state.params):,} parameters, from {where}")
        return state, frozen

    def finish(self) -> TrainState:
        """All steps that are left."""
        config, step, pace = self.config, int(self.state.step), Pace(self.program)
        bar = tqdm(
            total=config.steps,
            initial=step,
            desc=self.folder.name,
            unit="step",
            disable=_quiet(),
            smoothing=0.05,
            mininterval=1,
        )
        pending, position = None, None
        try:
            with Signals() as signals, bar:
                while step < config.steps:
                    batch = self.program.place_batch(self._read(position))
                    position = self.data.get_state()
                    self.state, metrics = self.program.step(self.state, self.frozen, batch)
                    step += 1
                    bar.update()
                    # The step just taken is still being computed: what is read is the one before.
                    if pending is not None:
                        watch_skipped(*pending, config.guard.max_skipped)
                    pending = step, metrics
                    if step % config.log.every_steps == 0 or step == config.steps:
                        bar.set_postfix(
                            loss=f"{self._log(step, metrics, pace.measure(step, batch)):.4f}", refresh=False
                        )
                    with pace.paused():
                        self._at_intervals(step, batch)
                    self._save(step, position, signals.stopped())
            if pending is not None:
                watch_skipped(*pending, config.guard.max_skipped)
            self._check_last(step)
        finally:
            self.checkpoints.close()
            self.writer.close()
        return self.state

    def _read(self, position: Any) -> Mapping[str, np.ndarray]:
        """The next batch; before data that cannot be read end the run, what was learnt up to `position` is saved."""
        try:
            return next(self.data)
        except (ValueError, OSError):
            # Other processes may read on, and would have no part in it.
            if position is not None and jax.process_count() == 1:
                self.checkpoints.save(self.state, position)
            raise

    def _log(self, step: int, metrics: Mapping[str, Any], pace: Mapping[str, float]) -> float:
        """Writes a step's metrics down and returns its loss."""
        values = {name: float(value) for name, value in metrics.items()}
        values["learning_rate"] = float(learning_rate(self.config.optimizer, step - 1))
        self.writer.scalars(step, "train", {**values, **pace})
        return values["loss"]

    def _at_intervals(self, step: int, batch: Any) -> None:
        """Pictures and validation where they are due."""
        if self._due(step, self.config.log.samples_every_steps):
            self._draw(step, batch)
        if self.config.data.validation_folder and self._due(step, self.config.log.validate_every_steps):
            self._validate(step)

    def _due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def _save(self, step: int, position: Any, stopped: int) -> None:
        """A checkpoint where one is due; ends the run where a signal asks for it."""
        begun = False
        if stopped or self._due(step, self.config.checkpoint.every_steps):
            metrics = {} if self.validation_loss is None else {VALIDATION_LOSS: self.validation_loss}
            begun = self.checkpoints.save(self.state, position, metrics)
            # A loss belongs to the first checkpoint after it: the best one must not be weights that nobody measured.
            self.validation_loss = None
        if stopped and step < self.config.steps:
            saved = begun and self.checkpoints.wait()
            ending = "is saved; the same command continues it" if saved else "could not be saved"
            say(f"{self.folder} was asked to stop: step {step} {ending}")
            raise Preempted(128 + stopped)

    def _check_last(self, step: int) -> None:
        """Raises `TrainingStopped` where the last step is done but not on disk."""
        self.checkpoints.wait()
        if self.config.checkpoint.every_steps and step not in self.checkpoints.steps():
            raise TrainingStopped(
                f"step {step} is reached, but its checkpoint could not be written: free space in {self.folder} and "
                "give the same command, which goes on from the last good one"
            )

    def _draw(self, step: int, batch: Any) -> None:
        """What the model makes of a few examples: held-out ones, where there are some."""
        if self.config.data.validation_folder:
            held_out = batches.validation_batches(self.config, self.program.reading_part)
            batch = self.program.place_batch(next(held_out))
        batch = {name: value[: self.config.log.samples] for name, value in batch.items()}
        key = jax.random.fold_in(self.state.key, 2**31 - 1)
        rows, metrics = self.program.samples(self.state, self.frozen, batch, key)
        if jax.process_count() > 1:
            rows = multihost_utils.process_allgather(rows, tiled=True)
        self.writer.picture(step, grid([np.asarray(row) for row in rows]))
        self.writer.scalars(step, "samples", {name: float(value) for name, value in metrics.items()})

    def _validate(self, step: int) -> None:
        """The loss on the same batches with the same noise, every time."""
        held_out, totals = batches.validation_batches(self.config, self.program.reading_part), {}
        for index in range(self.config.log.validation_batches):
            batch = self.program.place_batch(next(held_out))
            key = jax.random.fold_in(self.state.key, 2**31 - 2 - index)
            for name, value in self.program.evaluate(self.state, self.frozen, batch, key).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        means = {name: total / self.config.log.validation_batches for name, total in totals.items()}
        self.validation_loss = means["loss"]
        self.writer.scalars(step, "validation", means)
        say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in means.items()) + " in validation")


def watch_skipped(step: int, metrics: Mapping[str, Any], most: int) -> None:
    """Says if a step was skipped. Raises `TrainingStopped` where it was the `most`th in a row."""
    skipped = int(metrics["skipped"])
    if skipped:
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        say(f"step {step} is skipped: its loss is {loss:.4g}, its gradient's length {norm:.4g}")
    if skipped >= most:
        raise TrainingStopped(
            f"{skipped} steps in a row were skipped, up to step {step}: the weights or the data are spoilt; lower "
            "optimizer.learning_rate or look at the data, and start from an earlier checkpoint"
        )


def _quiet() -> bool:
    return jax.process_index() > 0
