"""Checkpoints by orbax: everything an exact resume needs in one commit, written while training goes on.

    checkpoints/1000/state/    step, parameters, optimiser, average, key, guard; each process writes its shards
    checkpoints/1000/data/     where the input stands: the state of each process's iterator
    checkpoints/1000/sha256.json   of all other files, written right after the commit

A step's folder appears whole, by a rename, or not at all. When a run is taken up again, checkpoints whose files do
not match their checksums or cannot be read are passed over, with a message, for the one before.

`orbax.checkpoint.v1` is still `orbax.checkpoint.experimental.v1` in orbax 0.12; the name without `experimental` comes
with 1.0.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.experimental import v1 as ocp

from hi3d_jax.training.config import CheckpointConfig
from hi3d_jax.training.state import TrainState

CHECKSUMS = "sha256.json"
VALIDATION_LOSS = "validation_loss"


class Checkpoints:
    """The checkpoints of a run. `say` gets a line for everything that did not go as wished."""

    def __init__(self, folder: Path, config: CheckpointConfig, say: Callable[[str], None]):
        self._folder, self._say = folder.resolve(), say
        # Orbax deletes them, without a word.
        for half in sorted(self._folder.glob("*.orbax-checkpoint-tmp*")):
            step = half.name.partition(".")[0]
            say(f"the checkpoint of step {step} is passed over: it was half written when the run ended")
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep)]
        if config.keep_best:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics[VALIDATION_LOSS],
                reverse=True,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            keep.append(best)
        context = ocp.Context()
        context.atomicity.mode = type(context.atomicity.mode).ATOMIC_RENAME
        self._saver = ocp.training.Checkpointer(
            self._folder,
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )
        self._summing = concurrent.futures.ThreadPoolExecutor(1)
        self._summed: concurrent.futures.Future | None = None

    def save(self, state: TrainState, data_state: Any, metrics: Mapping[str, float] | None = None) -> bool:
        """Begins to write the state and the input's position; False where that failed, and then training may go on.

        The state may be donated afterwards. `data_state` is JSON, of this process.
        """
        step = int(state.step)
        if step in self.steps():
            return True
        contents = {"state": _named(state), "data": {"processes": _of_all_processes(data_state)}}
        # What became of the one before must not keep this one from being tried.
        self.wait()
        try:
            numbers = dict(metrics or {}) or None
            response = self._saver.save_checkpointables_async(step, contents, force=True, metrics=numbers)
            self._summed = self._summing.submit(self._sum_up, response, self._folder / str(step))
        except Exception as error:
            self._failed(error)
            return False
        return True

    def wait(self) -> bool:
        """Until all is written; False where that failed."""
        try:
            self._finish()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _sum_up(self, response: Any, path: Path) -> None:
        response.result()
        if jax.process_index() == 0:
            write_checksums(path)

    def _finish(self) -> None:
        summed, self._summed = self._summed, None
        self._saver.wait()
        if summed is not None:
            summed.result()

    def _failed(self, error: Exception) -> None:
        last = max(self.steps(), default=None)
        kept = f"the checkpoint of step {last} stays" if last is not None else "there is none yet"
        self._say(f"a checkpoint could not be written ({_first_line(error)}); {kept}; free space in {self._folder}")

    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete."""
        return [checkpoint.step for checkpoint in self._saver.checkpoints]

    def restore(self, abstract: TrainState, shardings: TrainState) -> tuple[TrainState, list[Any]] | None:
        """The newest state that can be read, on its devices, and all processes' data states; None if there is none."""
        for step in sorted(self.steps(), reverse=True):
            path = self._folder / str(step)
            try:
                return read_checkpoint(path, abstract, shardings)
            except CheckpointError as error:
                self._say(f"the checkpoint of step {step} is passed over: {error}")
                self._set_aside(path)
        return None

    def _set_aside(self, path: Path) -> None:
        """Out of the way of the checkpoint that will be written at this step again, but not deleted."""
        if jax.process_index() == 0 and path.exists():
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        _barrier("set aside")
        self._saver.reload()

    def close(self) -> None:
        """Waits for what is being written."""
        self.wait()
        self._summing.shutdown()
        self._saver.close()


class CheckpointError(ValueError):
    """A checkpoint that cannot be read."""


def steps_in(folder: Path) -> list[int]:
    """The steps that have checkpoints, in order; a run may be writing there."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_checkpoint(path: Path, abstract: TrainState, shardings: TrainState) -> tuple[TrainState, list[Any]]:
    """The state of a checkpoint, on its devices, and the data states of the processes that wrote it.

    Raises `CheckpointError` where it is damaged or of another run's shapes.
    """
    if problem := _agreed(damage(path) if jax.process_index() == 0 else ""):
        raise CheckpointError(problem)
    target = jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place), abstract, shardings
    )
    named = _named(target)
    try:
        found = ocp.load_checkpointables(path.resolve(), {"state": named, "data": None})
        values = [found["state"][name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(target), values), found["data"]["processes"]
    # What orbax and tensorstore raise for damaged files is not documented.
    except Exception as error:
        raise CheckpointError(_first_line(error)) from error


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves by their names: what orbax stores does not depend on optax's classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def write_checksums(path: Path) -> None:
    """The SHA-256 of every file of a checkpoint beside them."""
    sums = {str(file.relative_to(path)): _sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    aside = path / f".{CHECKSUMS}"
    aside.write_text(json.dumps(sums, indent=1))
    aside.rename(path / CHECKSUMS)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's files; nothing if they are as they were written, or were never summed up."""
    if not (path / CHECKSUMS).exists():
        return ""
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError) as error:
        return _first_line(error)
    return ""


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _agreed(text: str) -> str:
    """Process 0's text in all processes."""
    return _of_all_processes(text)[0]


def _of_all_processes(value: Any) -> list[Any]:
    """Every process's JSON value, in all of them."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(data))).max())
    gathered = multihost_utils.process_allgather(np.pad(data, (0, longest - len(data)), constant_values=ord(" ")))
    return [json.loads(row.tobytes()) for row in gathered]
