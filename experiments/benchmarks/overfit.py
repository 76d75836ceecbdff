"""Lets hi3d-tiny learn four objects by heart: python experiments/benchmarks/overfit.py OBJECTS -o FOLDER

Whether the training of both stages can learn at all, with the networks, the loss and the loop that the real runs have.
Four objects of a folder (see experiments/render_dataset.py) are rendered, one orbit each from view 0, and these train

    autoencoder128, autoencoder256    from `--autoencoder`, or from nothing
    stage1                            asked for views 1 to 15 of what it has seen: 28 dB of PSNR and more are wanted
    depth                             from `--depth`, or from nothing
    stage2, stage2_no_depth           given bicubic enlargements of degraded views: 3 dB more than they have are wanted,
                                      and more with the depth than without

one after the other, each a run of experiments/train.py in FOLDER. The same command goes on after an interruption, and
does again only what is not finished. results.json and the table hold what was reached, with the autoencoders' own PSNR,
which no stage exceeds, and for stage 2 that of the enlargements, as they are and as it is given them: painted white
where the true views show nothing. `--parts` takes some of the runs, `--steps` other numbers of steps than the table's.

With `--orbits N` each object is learnt from N orbits, from random elevations and azimuths, and all is asked of orbits
that no training had: one orbit can be learnt by heart view by view, many ask for what the coarse views and the depth
say. Nothing is dropped then, as for the package's own model, since no sampling that is tried needs guidance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules; the configs are loaded by a module of the root.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import jax
import numpy as np
from PIL import Image

from experiments import cache_latents, encode_examples, render_dataset
from experiments.train import load_config
from hi3d_jax.data.loader import Batch, open_batches
from hi3d_jax.data.record_folder import RecordFolder
from hi3d_jax.stages.recipe import Dropping
from hi3d_jax.training.config import CheckpointConfig, LogConfig, TrainConfig
from hi3d_jax.training.export import export
from hi3d_jax.training.loop import train
from hi3d_jax.training.networks import found_in
from hi3d_jax.training.program import TrainProgram
from hi3d_jax.training.sharding import make_mesh
from hi3d_jax.training.state import TrainState
from hi3d_jax.training.tasks import AutoencoderTask, StageTask
from hi3d_jax.training.tasks.pictures import grid, psnr

OBJECTS, NUM_VIEWS, SIZE, ELEVATION_DEG = 4, 16, 256, 20.0
# Runs with the file of experiments/configs that they change, and their steps.
RUNS = {
    "autoencoder128": ("autoencoder_tiny", 600),
    "stage1": ("stage1_tiny", 1500),
    "autoencoder256": ("autoencoder_tiny", 900),
    "depth": ("depth_tiny", 2000),
    "stage2": ("stage2_tiny", 3000),
    "stage2_no_depth": ("stage2_tiny_no_depth", 3000),
}
LEARNING_RATES = {"adamw": 1e-3, "muon": 3e-3}
# Besides the config's own sampling, that with so many steps and no guidance is tried, by stage, and the best counts:
# the tiny configs' steps fit what hi3d-tiny has learnt, not networks that know four objects or hardly know anything.
SAMPLING_STEPS = {1: (6, 10), 2: (2, 4, 6)}
# Degraded videos of each object that stage 2 learns from, encoded beforehand: that is most of a step's time.
EXAMPLES = 60
# Degraded videos of each object that stage 2 is asked to refine, and the depth network to see; with many orbits, each
# is of another orbit that no training had.
DRAWS, DRAWS_OF_MANY = 2, 10
# Rows of pictures that are kept to be looked at.
ROWS = 24


class Overfit:
    """The runs in one folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.output
        self.orbits = self.folder / "orbits"
        self.many = options.orbits > 1
        # The orbits that all is asked of.
        self.asked = self.folder / "held" if self.many else self.orbits
        self.num_draws = DRAWS_OF_MANY if self.many else DRAWS

    def render(self) -> None:
        """The records that everything learns, and those that it is asked of."""
        one = {"elevations_deg": (ELEVATION_DEG,), "azimuth_deg": 0.0}
        self._render(self.orbits, {"orbits": self.options.orbits} if self.many else one)
        if self.many:
            self._render(self.asked, {"orbits": self.num_draws, "seed": 1})

    def _render(self, folder: Path, settings: dict[str, Any]) -> None:
        render = render_dataset.RenderSettings(size=SIZE, assets_per_shard=1, **settings)
        wanted = {"split": self.options.split, "limit": OBJECTS, "render": render}
        render_dataset.render(render_dataset.Arguments(self.options.objects, folder, **wanted))

    def run(self, name: str) -> tuple[TrainConfig, TrainState]:
        """Trains a run to its end and makes its model folder; returns its config and last state."""
        config = self.config(name)
        clock = time.perf_counter(), time.process_time()
        state = train(config)
        self.note(name, {"steps": int(state.step)})
        # A run that was finished before has its time noted already.
        if not self.model(name).exists():
            spent = {"wall_s": time.perf_counter() - clock[0], "cpu_s": time.process_time() - clock[1]}
            self.note(name, {key: round(value) for key, value in spent.items()})
            print(export(config.folder, self.model(name)))
        return config, state

    def config(self, name: str) -> TrainConfig:
        """The tiny config of the run's name, made to learn four objects."""
        file, steps = RUNS[name]
        base, steps = load_config(file), self.options.steps or (2 if self.options.quick else steps)
        size = 256 if name == "autoencoder256" else base.data.image_size
        optimizer = {
            "learning_rate": LEARNING_RATES[base.optimizer.method],
            "warmup_steps": steps // 20,
            "ema_decay": 0.99,
        }
        optimizer |= {"schedule": "cosine", "decay_steps": steps, "final_fraction": 0.05}
        data = {"folder": str(self.orbits), "batch_size": OBJECTS, "image_size": size, "category_power": 1.0}
        config = dataclasses.replace(
            base,
            folder=str(self.folder / name),
            steps=steps,
            data=dataclasses.replace(base.data, **data, roll=False),
            optimizer=dataclasses.replace(base.optimizer, **optimizer),
            checkpoint=CheckpointConfig(every_steps=100, keep=1),
            log=LogConfig(every_steps=20, samples_every_steps=0, tensorboard=False),
        )
        if isinstance(config.task, StageTask):
            return self._stage(name, config)
        begun = self.options.autoencoder
        starts = {
            "autoencoder128": begun,
            "autoencoder256": begun or self.model("autoencoder128"),
            "depth": self.options.depth,
        }
        if start := starts.get(name):
            config = dataclasses.replace(config, start=str(start))
            if isinstance(config.task, AutoencoderTask):
                # What was measured of its latents goes with the weights.
                sizes = found_in([start], "vae").config
                config = dataclasses.replace(config, task=dataclasses.replace(config.task, vae=sizes))
        # Which views a batch has differs from step to step.
        return dataclasses.replace(config, data=dataclasses.replace(config.data, num_views=4))

    def _stage(self, name: str, config: TrainConfig) -> TrainConfig:
        """With the networks of the other runs, and cached latents or encoded examples."""
        networks = [self.model(f"autoencoder{config.data.image_size}")]
        if config.task.recipe.stage == 1:
            data = self._cached(config.data.image_size)
        else:
            given = None if "depth" in self.options.parts else self.options.depth
            networks += [self.options.stage1 or self.model("stage1"), given or self.model("depth")]
            # A video of stage 2 has as many pixels as four of stage 1.
            data = {"folder": str(self.folder / "examples"), "batch_size": 1}
        recipe = config.task.recipe
        recipe = dataclasses.replace(recipe, num_steps=2) if self.options.quick else recipe
        recipe = dataclasses.replace(recipe, dropping=Dropping(0.0, 0.0, 0.0)) if self.many else recipe
        task = dataclasses.replace(config.task, networks=tuple(map(str, networks)), recipe=recipe)
        return dataclasses.replace(config, task=task, data=dataclasses.replace(config.data, **data))

    def _cached(self, size: int) -> dict[str, Any]:
        """Fields of the data that take latents of views of that size from their cache."""
        return {"cache_folder": str(self.folder / f"latents{size}"), "arrays": ("latents",)}

    def cache(self, config: TrainConfig) -> None:
        """The latents of the true views, which no step has to make again."""
        size = config.data.image_size
        model, output = str(self.model(f"autoencoder{size}")), Path(config.data.cache_folder)
        cache_latents.cache(cache_latents.Arguments(self.orbits, output, model, size=size))

    def encode(self) -> None:
        """Examples of stage 2, with depths: those of both its runs."""
        config = self.config("stage2")
        data = dataclasses.replace(config.data, **self._cached(config.data.image_size), folder=str(self.orbits))
        on_pictures = dataclasses.replace(config, data=data)
        self.cache(on_pictures)
        draws = max(1, EXAMPLES // self.options.orbits)
        encode_examples.encode(on_pictures, config.data.folder, 2 if self.options.quick else draws)

    def model(self, name: str) -> Path:
        """The model folder of a run."""
        return self.folder / f"{name}_model"

    def note(self, name: str, values: dict[str, Any]) -> None:
        """Adds to results.json what is known of a run."""
        path = self.folder / "results.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: {**known.get(name, {}), **values}}, indent=1) + "\n")

    def _asked(self, config: TrainConfig) -> Iterator[Batch]:
        """Batches of four orbits, degraded as no training has seen them."""
        data = dataclasses.replace(config.data, batch_size=OBJECTS, num_views=NUM_VIEWS, cache_folder="", arrays=())
        return open_batches(RecordFolder(self.asked), data, seed=1)

    def coarse_views(self, config: TrainConfig, draws: int) -> list[np.ndarray]:
        """The degraded views that `samples` refines, in [-1, 1]."""
        batches = self._asked(config)
        return [video.astype(np.float32) / 127.5 - 1 for _ in range(draws) for video in next(batches)["coarse"]]

    def draws(
        self, config: TrainConfig, state: TrainState, count: int
    ) -> Iterator[tuple[list[np.ndarray], dict[str, float]]]:
        """What the run's task shows of all objects, and its scalars, `count` times, degraded anew each time."""
        program = TrainProgram(config, make_mesh(config.mesh))
        frozen, batches = program.frozen_values(), self._asked(config)
        for draw in range(count):
            made, scalars = program.samples(state, frozen, program.place_batch(next(batches)), jax.random.key(draw))
            yield [np.asarray(row) for row in made], {key: float(value) for key, value in scalars.items()}

    def samples(self, config: TrainConfig, state: TrainState, draws: int = 1) -> list[list[np.ndarray]]:
        """For each kind of picture that the run's task shows (true, coarse, made): whole orbits of all objects."""
        rows = [row for made, _ in self.draws(config, state, draws) for row in made]
        kinds = 2 if config.data.coarse is None else 3
        if isinstance(config.task, AutoencoderTask):
            # It shows all views of all objects in one row.
            rows = [each for pair in zip(*(np.split(row, OBJECTS) for row in rows), strict=True) for each in pair]
        steps = f"_{config.task.recipe.num_steps}" if isinstance(config.task, StageTask) else ""
        Image.fromarray(grid(rows[:ROWS])).save(Path(config.folder) / f"samples{steps}.png")
        return [rows[kind::kinds] for kind in range(kinds)]


def autoencoder(overfit: Overfit, name: str) -> None:
    """An autoencoder and what is left of views that pass it."""
    config, state = overfit.run(name)
    views, made = overfit.samples(config, state)
    overfit.note(name, {"psnr": mean(decibels(made, views, first=0))})


def stage1(overfit: Overfit, name: str) -> None:
    """Views 1 to 15 from view 0."""
    overfit.cache(overfit.config(name))
    sample_stage(overfit, name, draws=1)


def depth(overfit: Overfit, name: str) -> None:
    """A depth network, and how wrong it is about degraded views."""
    config, state = overfit.run(name)
    errors = [scalars["stretched_error"] for _, scalars in overfit.draws(config, state, overfit.num_draws)]
    overfit.note(name, {"stretched_error": round(float(np.mean(errors)), 4)})


def stage2(overfit: Overfit, name: str) -> None:
    """Fine views from degraded ones that were enlarged by bicubic interpolation, beside these."""
    overfit.encode()
    config, views, coarse = sample_stage(overfit, name, overfit.num_draws)
    unpainted = overfit.coarse_views(with_degradation(config, clean_background=False), overfit.num_draws)
    overfit.note(name, {"bicubic_psnr": mean(decibels(unpainted, views)), "given_psnr": mean(decibels(coarse, views))})


def sample_stage(overfit: Overfit, name: str, draws: int) -> tuple[TrainConfig, list[np.ndarray], list[np.ndarray]]:
    """Trains a stage and scores what its samplings make; returns its config, the true views and stage 2's coarse."""
    config, state = overfit.run(name)
    config = with_degradation(config, enlarge="bicubic") if config.task.recipe.stage == 2 else config
    scores: dict[str, list[float]] = {}
    views: list[np.ndarray] = []
    coarse: list[list[np.ndarray]] = []
    for label, sampled in samplings(overfit, config).items():
        # All see the same views, degraded alike.
        views, *coarse, made = overfit.samples(sampled, state, draws)
        scores[label] = decibels(made, views)
    means = {label: mean(values) for label, values in scores.items()}
    best = max(means, key=lambda label: means[label])
    overfit.note(name, {"psnr": means[best], "psnr_by_sampling": means, "psnr_by_video": scores[best]})
    return config, views, coarse[0] if coarse else []


def samplings(overfit: Overfit, config: TrainConfig) -> dict[str, TrainConfig]:
    """The run with its own sampling and with the others that are tried, by what they are called."""
    recipe = config.task.recipe
    made = {f"{recipe.num_steps} steps, guidance to {recipe.guidance[1]:g}": config}
    for steps in () if overfit.options.quick else SAMPLING_STEPS[recipe.stage]:
        changed = dataclasses.replace(recipe, num_steps=steps, guidance=(1.0, 1.0))
        made[f"{steps} steps"] = dataclasses.replace(config, task=dataclasses.replace(config.task, recipe=changed))
    return made


def with_degradation(config: TrainConfig, **choices: Any) -> TrainConfig:
    """The config with its degradation changed."""
    coarse = config.data.coarse
    coarse = dataclasses.replace(coarse, degradation=dataclasses.replace(coarse.degradation, **choices))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, coarse=coarse))


def decibels(made: list[np.ndarray], views: list[np.ndarray], first: int = 1) -> list[float]:
    """The mean PSNR of each video's views from `first` on."""
    return [round(float(np.asarray(psnr(a, b))[first:].mean()), 3) for a, b in zip(made, views, strict=True)]


def mean(values: list[float]) -> float:
    """To hundredths."""
    return round(float(np.mean(values)), 2)


PARTS: dict[str, Callable[[Overfit, str], None]] = {
    "autoencoder_tiny": autoencoder,
    "stage1_tiny": stage1,
    "depth_tiny": depth,
    "stage2_tiny": stage2,
    "stage2_tiny_no_depth": stage2,
}


def report(results: dict[str, dict[str, Any]]) -> None:
    """Prints the table, and whether what is wanted was reached."""
    print("| run | steps | wall s (CPU s) | PSNR, dB | bicubic, dB | bicubic as given, dB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, values in results.items():
        scores = " | ".join(str(values.get(key, "")) for key in ("psnr", "bicubic_psnr", "given_psnr"))
        print(f"| {name} | {values['steps']} | {values['wall_s']} ({values['cpu_s']}) | {scores} |")
    if error := results.get("depth", {}).get("stretched_error"):
        print(f"depth: mean error {error} of the range of a degraded view's disparity")
    reached = {name: values["psnr"] for name, values in results.items() if "psnr" in values}
    for name in reached:
        tried = ", ".join(f"{label}: {value}" for label, value in results[name].get("psnr_by_sampling", {}).items())
        print(f"{name}: {reached[name]} dB" + (f" ({tried})" if tried else ""))
    if "stage1" in reached:
        print(f"stage 1: {reached['stage1']} dB of 28 wanted")
    if "stage2" in reached:
        bicubic, given = (reached["stage2"] - results["stage2"][key] for key in ("bicubic_psnr", "given_psnr"))
        print(
            f"stage 2: {bicubic:+.2f} dB over bicubic enlargement, of 3 wanted; {given:+.2f} dB over what it is given"
        )
    if {"stage2", "stage2_no_depth"} <= set(reached):
        with_depth, without = (np.array(results[name]["psnr_by_video"]) for name in ("stage2", "stage2_no_depth"))
        gains = with_depth - without
        error = gains.std(ddof=1) / len(gains) ** 0.5
        print(
            f"depth brings {gains.mean():+.2f} +- {error:.2f} dB, of more than 0 wanted; it is better on "
            f"{(gains > 0).sum()} of {len(gains)} videos"
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", help="folder of objects, the first four of which are taken")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of the runs: new, or one to go on with"
    )
    parser.add_argument("--split", help="only objects that a manifest.jsonl gives this split")
    parser.add_argument("--autoencoder", type=Path, help="model folder of an autoencoder to go on from")
    parser.add_argument("--stage1", type=Path, help="model folder whose image encoder stage 2 has; default: the run's")
    parser.add_argument(
        "--depth", type=Path, help="model folder of a depth network to go on from, or to use if depth is not in --parts"
    )
    parser.add_argument("--orbits", type=int, default=1, help="orbits that each object is learnt from (see above)")
    parser.add_argument("--parts", nargs="+", choices=RUNS, default=list(RUNS), help="which runs")
    parser.add_argument("--steps", type=int, help="of every run; default: as in this file")
    parser.add_argument("--quick", action="store_true", help="two steps of everything, to see that it runs")
    overfit = Overfit(parser.parse_args(arguments))
    overfit.render()
    for name, (config, _) in RUNS.items():
        if name in overfit.options.parts:
            PARTS[config](overfit, name)
    report(json.loads((overfit.folder / "results.json").read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
