"""How good hi3d-tiny's views are: python experiments/benchmarks/hi3d_tiny.py VAL_DATASET [--model FOLDER]

VAL_DATASET is of render_dataset.py and holds objects that were never trained on. View 0 is the input, views 1-15 are
scored, over white, at the size of each stage. Beside each stage stand what needs no model (stage 1: the input copied
sixteen times; the mean of the true views, which knows the answer but no direction. Stage 2: stage 1's views enlarged,
and what the autoencoder alone makes of them) and the autoencoder's own ceiling: true views, encoded and decoded.

    python experiments/render_dataset.py objects -o val256 --split val --elevations-deg 20 --azimuth-deg 0 --size 256
    python experiments/benchmarks/hi3d_tiny.py val256 --seeds 4 --lpips
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Float, UInt8
from tqdm import tqdm

from hi3d_jax.atomic import written_aside
from hi3d_jax.data.loader import over_white_bytes, resized_views
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.data.records import OrbitRecord
from hi3d_jax.evaluation.baselines import copy_input
from hi3d_jax.evaluation.perceptual import perceptual_metrics
from hi3d_jax.evaluation.views import psnr
from hi3d_jax.images import resize, write_png
from hi3d_jax.stages.framing import resize_views, to_network
from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.multiview import multiview
from hi3d_jax.stages.pipeline import open_stage
from hi3d_jax.stages.refine import refine

Views = UInt8[np.ndarray, "t s s 3"]
# (made, truth), in [0, 1] -> one number per view
Metric = Callable[[Float[np.ndarray, "t s s 3"], Float[np.ndarray, "t s s 3"]], Float[np.ndarray, " t"]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Everything on the command line."""

    dataset: Annotated[Path, tyro.conf.Positional]
    """Records of objects that were not trained on."""
    model: str = "tiny"
    """Folder with the stages."""
    stages: int = 2
    """1: only the first stage."""
    seeds: int = 4
    """Orbits per object, seeds 0, 1, ..."""
    limit: int | None = None
    """Only so many objects."""
    num_steps: int | None = None
    """Steps of the sampler of stage 1; the recipe's if not given."""
    lpips: bool = False
    """Also LPIPS (alex), from where `hi3d evaluate` takes it."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for scores.json and a picture of each object: truth, stage 1, stage 2."""


def peak_signal(made: Float[np.ndarray, "t s s 3"], truth: Float[np.ndarray, "t s s 3"]) -> Float[np.ndarray, " t"]:
    """PSNR of each view in dB."""
    return np.array([psnr(one, other) for one, other in zip(made, truth, strict=True)])


def decoded(model: StageModel, views: Views) -> Views:
    """What the autoencoder leaves of true views."""
    return model.decode(model.run("conditioning_latents", to_network(views)).mean * model.scaling_factor)


class Scores:
    """Means over views 1-15, by name of what was scored: one list entry per object and seed."""

    def __init__(self, metrics: Mapping[str, Metric]):
        self.metrics, self.values = metrics, {}

    def add(self, name: str, made: Views, truth: Views) -> None:
        """Scores the views of one orbit."""
        made, truth = (views[1:].astype(np.float32) / 255 for views in (made, truth))
        for metric, measure in self.metrics.items():
            self.values.setdefault(name, {}).setdefault(metric, []).append(float(np.mean(measure(made, truth))))

    def means(self) -> dict[str, dict[str, float]]:
        """{what: {metric: mean over objects and seeds}}."""
        return {
            name: {metric: float(np.mean(values)) for metric, values in by_metric.items()}
            for name, by_metric in self.values.items()
        }


class Session:
    """The models, their scores and the seconds that their orbits took."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        metrics: dict[str, Metric] = {"psnr": peak_signal}
        metrics |= perceptual_metrics(["lpips_alex"]) if arguments.lpips else {}
        stages = range(1, arguments.stages + 1)
        self.models = {stage: open_stage(arguments.model, stage, keep_loaded=True) for stage in stages}
        self.scores, self.seconds = Scores(metrics), {stage: [] for stage in stages}

    def score(self, record: OrbitRecord) -> None:
        """One object: what needs no model, the ceilings, every seed."""
        truths = {
            stage: over_white_bytes(resized_views(record.views, model.recipe.image_size))
            for stage, model in self.models.items()
        }
        truth = truths[1]
        mean = np.rint(truth.mean(0)).astype(np.uint8)
        self.scores.add("stage 1: the input copied", copy_input(truth), truth)
        self.scores.add("stage 1: mean of the true views", np.stack([mean] * len(truth)), truth)
        for stage, model in self.models.items():
            self.scores.add(
                f"stage {stage}: truth through the autoencoder", decoded(model, truths[stage]), truths[stage]
            )
        shown = [truth]
        for seed in range(self.arguments.seeds):
            orbits = self._generate(record, truths, seed)
            for stage, views in orbits.items():
                self.scores.add(f"stage {stage}", views, truths[stage])
            if 2 in orbits:
                recipe = self.models[2].recipe
                enlarged = resize_views(orbits[1], recipe.image_size, recipe)
                self.scores.add("stage 2: stage 1 enlarged", enlarged, truths[2])
                through = decoded(self.models[2], enlarged)
                self.scores.add("stage 2: stage 1 enlarged, through the autoencoder", through, truths[2])
            shown += list(orbits.values()) if seed == 0 else []
        if self.arguments.output is not None:
            draw(self.arguments.output / f"{record.key.replace('/', '_')}.png", shown)

    def _generate(self, record: OrbitRecord, truths: Mapping[int, Views], seed: int) -> dict[int, Views]:
        given = {"elevation_deg": record.elevation_deg, "seed": seed, "progress": False}
        orbits, start = {}, time.perf_counter()
        for stage, model in self.models.items():
            if stage == 1:
                orbits[1] = multiview(model, truths[1][0], num_steps=self.arguments.num_steps, **given)
            else:
                orbits[2] = refine(model, orbits[1], truths[2][0], **given)
            self.seconds[stage].append(time.perf_counter() - start)
            start = time.perf_counter()
        return orbits


def draw(path: Path, orbits: Sequence[Views]) -> None:
    """Rows of every second view, each orbit at the size of the last."""
    size = orbits[-1].shape[1]
    rows = [np.concatenate([resize(view / 255, size, size) for view in views[::2]], axis=1) for views in orbits]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, np.concatenate(rows))


def measure(arguments: Arguments) -> dict[str, object]:
    """Means of all scores, and the median seconds of an orbit; each object's scores under `each`."""
    session, records = Session(arguments), RecordFolder(arguments.dataset)
    count = min(len(records), arguments.limit or len(records))
    for index in tqdm(range(count), unit="object"):
        session.score(records[index])
    seconds = {f"stage {stage}": round(float(np.median(taken)), 2) for stage, taken in session.seconds.items()}
    return {
        "objects": count,
        "seeds": arguments.seeds,
        "seconds_per_orbit": seconds,
        "means": session.scores.means(),
        "each": session.scores.values,
    }


def main() -> None:
    """Parses and runs; errors a user can mend are one line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        found = measure(arguments)
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            with written_aside(arguments.output / "scores.json") as aside:
                aside.write_text(json.dumps(found, indent=1) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{found['objects']} objects, {found['seeds']} seeds; seconds per orbit {found['seconds_per_orbit']}")
    for name, by_metric in found["means"].items():
        print(f"| {name} | " + " | ".join(f"{metric} {value:.4g}" for metric, value in by_metric.items()) + " |")


if __name__ == "__main__":
    main()
