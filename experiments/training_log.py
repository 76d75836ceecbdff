"""Writes down how a model was trained: python experiments/training_log.py RUN [RUN ...] -o FOLDER --dataset DATASET

    training_log.md     of each run: what learnt, on what, steps, hours, the machine, the last validation
    training_log.png    the curves
    attributions.csv    of each object of the data set: name, licence, whom it is by, where it comes from

What is said is read from the runs' config.json and metrics.jsonl and from the data set's manifest. For a model of both
stages:

    python experiments/training_log.py runs/autoencoder_tiny runs/depth_tiny runs/stage1_tiny runs/stage2_tiny \\
        -o hi3d_jax/weights/tiny --dataset train256

A model is trained in many sittings, on other machines and other data: with --append the three files go on where they
end.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from hi3d_jax.atomic import written_aside
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.training.config import TrainConfig
from hi3d_jax.training.loop import load_config
from hi3d_jax.training.metric_writer import read_metrics

CREDITS_FILE = "attributions.csv"
HEAD = "run", "steps", "a step", "learning rate at the end", "hours", "seed", "data", "machine", "held out, at the end"
CREDITS = ("object_id", "name", "licence", "attribution", "source")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Everything on the command line."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, in the order in which they are told."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write into."""
    dataset: Path
    """The data set that they learnt from."""
    machine: str = ""
    """What they ran on, in words; this machine if not given."""
    append: bool = False
    """Go on with the log that is in the folder."""


@dataclasses.dataclass(frozen=True)
class Log:
    """What a run left."""

    name: str
    config: TrainConfig
    # Metrics by split and by step, in order.
    metrics: dict[str, dict[int, dict[str, float]]]

    @classmethod
    def read(cls, folder: Path) -> Log:
        """Raises `ValueError` for a folder that is no run or has no metrics yet."""
        config = load_config(folder)
        try:
            metrics = {split: read_metrics(folder, split) for split in ("train", "validation", "samples")}
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the metrics cannot be read ({error}); is {folder} the folder of a run?") from error
        if not metrics["train"]:
            raise ValueError(f"{folder}/metrics.jsonl has no step; let the run take a few (log.every_steps)")
        return cls(folder.name, config, metrics)

    def last(self, split: str) -> dict[str, float]:
        """What was written last of `split`; nothing if it never was."""
        steps = self.metrics[split]
        return steps[max(steps)] if steps else {}

    def losses(self, split: str) -> tuple[list[int], list[float]]:
        """Steps and the losses at them."""
        return list(self.metrics[split]), [values["loss"] for values in self.metrics[split].values()]

    @property
    def steps(self) -> int:
        return max(self.metrics["train"])

    @property
    def hours(self) -> float:
        """Of training itself: without compiling, validation and pictures."""
        train, before, seconds = self.metrics["train"], 0, 0.0
        pace = next((values["seconds_per_step"] for values in train.values() if "seconds_per_step" in values), 0.0)
        for step, values in train.items():
            # Before the pace is known, steps are taken to be as fast as the next ones.
            pace = values.get("seconds_per_step", pace)
            seconds += pace * (step - before)
            before = step
        return seconds / 3600

    def row(self, orbits: int, machine: str) -> list[str]:
        """The run's line of the table, under `HEAD`."""
        config = self.config
        shown = {name: value for name, value in self.last("validation").items() if name in ("loss", "psnr", "lpips")}
        # Without held-out records, samples are drawn for training ones.
        samples = self.last("samples") if config.data.validation_folder else {}
        shown |= {name: value for name, value in samples.items() if name.endswith("psnr")}
        views = config.data.batch_size * config.data.num_views
        return [
            self.name,
            f"{self.steps:,}",
            f"{views} views of {config.data.image_size}²",
            f"{self.last('train')['learning_rate']:.1g}",
            f"{self.hours:.2f}",
            str(config.seed),
            f"{orbits:,} orbits",
            machine,
            ", ".join(f"{name} {value:.4g}" for name, value in shown.items()) or "none",
        ]


def table_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def earlier_lines(path: Path) -> list[str]:
    """The runs' lines of a log that was written before. Raises `ValueError` where it has other columns."""
    lines = [each for each in path.read_text().splitlines() if each.startswith("|")]
    if lines[:1] != [table_line(HEAD)]:
        raise ValueError(f"{path} has no table with the columns {', '.join(HEAD)}; write a new log, without --append")
    return lines[2:]


def this_machine() -> str:
    """CPU, cores and system in words."""
    names = {"unknown CPU": None}
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {line.partition(":")[2].strip(): None for line in lines if line.startswith("model name")} or names
    return f"{', '.join(names)}, {os.cpu_count()} cores, {platform.system()}"


def draw(path: Path, logs: Sequence[Log], append: bool) -> None:
    """The losses of all runs, held-out ones as dots; with `append` below the picture that is there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(logs), figsize=(4 * len(logs), 3), dpi=80, squeeze=False, layout="constrained")
    for axis, log in zip(axes[0], logs, strict=True):
        axis.plot(*log.losses("train"), linewidth=0.6, label="training")
        if log.metrics["validation"]:
            axis.plot(*log.losses("validation"), "o-", label="held out")
        axis.set(title=log.name, xlabel="step", ylabel="loss", yscale="log")
        axis.legend()
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    rows = [np.asarray(Image.open(path).convert("RGB")), drawn] if append else [drawn]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    with written_aside(path) as aside:
        Image.fromarray(np.concatenate(padded)).save(aside, format="png", optimize=True)


def credits_of(records: RecordFolder, earlier: Path | None) -> list[dict[str, Any]]:
    """One line per object, of those that an `earlier` attributions.csv names too."""
    lines = [] if earlier is None else list(csv.DictReader(earlier.read_text().splitlines()))
    lines += [{name: line[name] for name in CREDITS} for line in records.lines]
    return list({line["object_id"]: line for line in lines}.values())


def document(lines: Sequence[str], credited: Sequence[dict[str, Any]]) -> str:
    """training_log.md."""
    licences = ", ".join(f"{name} {count}" for name, count in Counter(c["licence"] for c in credited).most_common())
    return "\n\n".join(
        [
            "# How it was trained",
            "Hours are those of the training steps alone, beside other work on the same cores.",
            "\n".join([table_line(HEAD), table_line(["---"] * len(HEAD)), *lines]),
            "![The losses](training_log.png)",
            f"Data: orbits of {len(credited)} objects. Licences: {licences}; attributions.csv names all.",
        ]
    )


def write(arguments: Arguments) -> None:
    """Reads the runs and writes the three files. Raises `ValueError`."""
    logs, records = [Log.read(run) for run in arguments.runs], RecordFolder(arguments.dataset)
    log, picture, credits = (arguments.output / name for name in ("training_log.md", "training_log.png", CREDITS_FILE))
    lines = earlier_lines(log) if arguments.append else []
    credited = credits_of(records, credits if arguments.append else None)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with written_aside(credits) as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, CREDITS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(credited)
    draw(picture, logs, arguments.append)
    machine = arguments.machine or this_machine()
    lines += [table_line(each.row(len(records), machine)) for each in logs]
    with written_aside(log) as aside:
        aside.write_text(document(lines, credited) + "\n")


def main() -> None:
    """Parses and runs; errors a user can mend are one line."""
    try:
        write(tyro.cli(Arguments, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
