"""What a run leaves to look at: metrics.jsonl, TensorBoard events, pictures.

    metrics.jsonl          one object per line: {"step": 50, "split": "train", "loss": ...}
    tensorboard/           the same scalars and pictures as event files
    samples/000050.png     what the model made

After a resume, lines of steps that are done again stand twice; the later one counts (`read_metrics`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hi3d_jax.atomic import written_aside


class MetricWriter:
    """Writes into a run's folder; in other processes than the first it writes nothing.

    A full disk ends no run: what cannot be written is left out, and `say` gets a line when that begins.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, active: bool = True, say: Callable[[str], None] = print):
        self._folder, self._active, self._say = folder, active, say
        self._events = EventFiles(folder / "tensorboard") if tensorboard and active else None
        self._failing: set[str] = set()
        if active:
            (folder / "samples").mkdir(parents=True, exist_ok=True)

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line of metrics."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no NaN: what is not finite is written as text.
        line = {name: value if np.isfinite(value) else str(value) for name, value in numbers.items()}
        with self._left_out("metrics.jsonl"):
            _append(self._folder / "metrics.jsonl", json.dumps({"step": step, "split": split, **line}) + "\n")
        if self._events:
            with self._left_out("tensorboard"):
                self._events.scalars(step, {f"{split}/{name}": value for name, value in numbers.items()})

    def picture(self, step: int, picture: np.ndarray) -> None:
        """One picture, uint8 [h w 3]."""
        if not self._active:
            return
        with self._left_out("samples"), written_aside(self._folder / "samples" / f"{step:07d}.png") as aside:
            Image.fromarray(picture).save(aside)
        if self._events:
            with self._left_out("tensorboard"):
                self._events.picture(step, "samples", picture)

    @contextlib.contextmanager
    def _left_out(self, name: str):
        """Says what could not be written, once for each time that it begins to fail."""
        try:
            yield
            self._failing.discard(name)
        except OSError as error:
            if name not in self._failing:
                reason = error.strerror or error
                self._say(f"{self._folder / name} cannot be written ({reason}) and is left out; free some space")
            self._failing.add(name)

    def close(self) -> None:
        """Ends the event file."""
        if self._events:
            with self._left_out("tensorboard"):
                self._events.close()


class EventFiles:
    """TensorBoard's event files, written in step with the run.

    Not by tensorboardX's SummaryWriter: a full disk kills its thread, and then its queue lets nobody go on.
    """

    def __init__(self, folder: Path):
        # Imported here: it takes a second, and a run may go without.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto.event_pb2 import Event

        self._folder, self._open, self._event, self._summary = folder, event_file_writer.EventsWriter, Event, summary
        self._writer: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by their names. Raises `OSError`."""
        self._write(step, (self._summary.scalar(name, value) for name, value in values.items()))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """One picture, uint8 [h w 3]. Raises `OSError`."""
        self._write(step, [self._summary.image(name, picture, dataformats="HWC")])

    def _write(self, step: int, summaries: Iterable[Any]) -> None:
        try:
            if self._writer is None:
                number = len(list(self._folder.iterdir()))
                self._writer = self._open(str(self._folder / "events"), f".{number}")
            for summary in summaries:
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            self._writer.flush()
        except OSError:
            # Behind half an event nothing can be read: what comes next gets a file of its own.
            self._writer = None
            raise

    def close(self) -> None:
        """Ends the file. Raises `OSError`."""
        if self._writer is not None:
            self._writer.close()


def _append(path: Path, line: str) -> None:
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError:
        # Half a line would spoil the next one.
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def read_metrics(folder: str | Path, split: str = "train") -> dict[int, dict[str, float]]:
    """The metrics of a run by step. A last line that a kill cut off is left out."""
    metrics = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values.pop("split") == split:
            metrics[values.pop("step")] = {name: float(value) for name, value in values.items()}
    return dict(sorted(metrics.items()))
