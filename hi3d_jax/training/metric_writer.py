"""What a run leaves to look at: metrics.jsonl, TensorBoard events, pictures.

    metrics.jsonl          one object per line: {"step": 50, "split": "train", "loss": ...}
    tensorboard/           the same scalars and pictures as event files
    samples/000050.png     what the model made

After a resume, lines of steps that are done again stand twice; the later one counts (`read_metrics`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


class MetricWriter:
    """Writes into a run's folder; in other processes than the first it writes nothing."""

    def __init__(self, folder: Path, *, tensorboard: bool, active: bool = True):
        self._folder, self._active, self._events = folder, active, None
        if not active:
            return
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if tensorboard:
            # Imported here: it takes a second, and a run may go without.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line of metrics."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no NaN: what is not finite is written as text.
        line = {name: value if np.isfinite(value) else str(value) for name, value in numbers.items()}
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **line}) + "\n")
        if self._events:
            for name, value in numbers.items():
                self._events.add_scalar(f"{split}/{name}", value, step)
            self._events.flush()

    def picture(self, step: int, picture: np.ndarray) -> None:
        """One picture, uint8 [h w 3]."""
        if not self._active:
            return
        Image.fromarray(picture).save(self._folder / "samples" / f"{step:07d}.png")
        if self._events:
            self._events.add_image("samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the event files."""
        if self._events:
            self._events.close()


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
