"""The steps of a run: each makes a file, or takes the one that an interrupted run left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from hi3d_jax.stages.checks import StageError, check_finite
from hi3d_jax.stages.run_record import RunRecord

Made = TypeVar("Made")


class Steps:
    """Makes what is missing and takes what is there."""

    def __init__(self, record: RunRecord, progress: bool):
        self.record, self.progress = record, progress

    def take(
        self,
        name: str,
        file: str,
        make: Callable[[], Made],
        save: Callable[[Path, Made], None],
        load: Callable[[Path], Made],
    ) -> Made:
        """What the step `name` makes, as its `file` in the output folder holds it."""
        folder = self.record.folder
        if folder is not None and self.record.finished(name) and (folder / file).exists():
            return load(folder / file)
        with self.timed(name):
            made = make()
            check_finite(name, made)
            if folder is not None:
                save(folder / file, made)
        return made if folder is None else load(folder / file)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A step of the record; its errors begin with its name."""
        try:
            with self.record.step(name):
                yield
        except ValueError as error:
            # A bare ValueError is a defect of the program; subclasses say what a user can change.
            if type(error) is ValueError or isinstance(error, StageError):
                raise
            raise StageError(f"{name}: {error}") from error
        if self.progress:
            seconds = self.record.steps[name]["seconds"]
            tqdm.write(f"{name}: {seconds:.1f} s, {self.record.seconds:.0f} s in all")
