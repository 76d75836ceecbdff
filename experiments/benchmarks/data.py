"""Times the data pipeline: rendering views, and examples a second that one core reads and degrades.

    python experiments/benchmarks/data.py [--quick] [--dataset FOLDER]
    python experiments/benchmarks/data.py --dataset FOLDER --train autoencoder_tiny
    python experiments/benchmarks/data.py --dataset FOLDER --train stage1_tiny --task.networks AUTOENCODER_FOLDER

Without a data set of yours, the built-in rocket is rendered into a temporary one (a busy texture over much of the
view: a hard case for the compression). An example is one orbit of 16 views. CPU seconds are those of one thread;
processes multiply the rate (LoaderConfig.workers). With --train, the steps of a config of experiments/configs, whose
fields can be changed as for experiments/train.py, are timed with the pipeline and with one batch again and again.
Prints markdown tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules; the configs are loaded by a module of the root.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import jax
import numpy as np

from experiments import train
from hi3d_jax import images
from hi3d_jax.data import example_mesh, render_orbit
from hi3d_jax.data.degrade import Degradation
from hi3d_jax.data.loader import CoarseConfig, LoaderConfig, open_batches
from hi3d_jax.data.record_folder import RecordFolder, RecordList
from hi3d_jax.data.records import OrbitRecord, depth_to_units, encode
from hi3d_jax.data.shards import write_records
from hi3d_jax.training.batches import training_batches
from hi3d_jax.training.config import TrainConfig
from hi3d_jax.training.program import TrainProgram
from hi3d_jax.training.sharding import make_mesh

NUM_VIEWS, LATENT_FACTOR = 16, 8


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Least CPU seconds of one call, which the load of the machine disturbs least."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def time_rendering(sizes: tuple[int, ...], repeats: int) -> None:
    """Views a second of the ray caster, and of compressing them."""
    mesh = example_mesh()
    print(f"\n| rendering, {len(mesh.faces)} faces | rays a pixel | views/s and core | with compression |")
    print("| --- | --- | --- | --- |")
    for size in sizes:
        for supersample in (1, 2, 3):
            orbit = []
            work = lambda: orbit.append(render_orbit(mesh, width=size, supersample=supersample)[0])  # noqa: B023, E731
            seconds = cpu_seconds(work, repeats)
            record = as_record("rocket/0", orbit[0])
            both = seconds + cpu_seconds(lambda: encode(record), 1)  # noqa: B023
            rates = f"{NUM_VIEWS / seconds:.1f} | {NUM_VIEWS / both:.1f}"
            print(f"| {size} | {supersample**2} | {rates} |", flush=True)


def as_record(key: str, renders) -> OrbitRecord:
    """Renders as a record with latents and tokens of the sizes that caching would add."""
    straight = [images.straight_alpha(*pair) for pair in zip(renders.views, renders.alphas, strict=True)]
    side = renders.views.shape[1] // LATENT_FACTOR
    arrays = {"latents": np.zeros((NUM_VIEWS, side, side, 8), np.float16), "image_token": np.zeros((NUM_VIEWS, 1024))}
    arrays["image_token"] = arrays["image_token"].astype(np.float16)
    views = images.to_bytes(np.stack(straight))
    return OrbitRecord(key, views, depth_to_units(renders.depths), about={"category": "toy"}, arrays=arrays)


def rocket_set(folder: Path, size: int) -> RecordFolder:
    """A data set of two orbits of the rocket."""
    mesh = example_mesh()
    orbits = [render_orbit(mesh, width=size, supersample=1, elevation_deg=e)[0] for e in (0.0, 30.0)]
    write_records(folder, [as_record(f"rocket/{index}", renders) for index, renders in enumerate(orbits)], {})
    return RecordFolder(folder)


def time_reading(orbits: RecordFolder, size: int, repeats: int) -> None:
    """Examples a second and core of what the networks' training reads at this size."""
    base = {"batch_size": 1, "num_views": NUM_VIEWS, "image_size": size, "read_threads": 0}
    stage1 = RecordList(
        [
            OrbitRecord(f"{line['key']}@0", orbits.read(i, depths=False).views[:, ::2, ::2])
            for i, line in enumerate(orbits.lines[:8])
        ]
    )
    cases = {
        "views (stage 1)": LoaderConfig(**base),
        "views of 4 (autoencoder)": LoaderConfig(**{**base, "num_views": 4}),
        "views and depths": LoaderConfig(**base, depths=True),
        "degraded views (stage 2)": LoaderConfig(**base, coarse=CoarseConfig(Degradation(), 0.0)),
        "stage 1's outputs as coarse views (stage 2)": LoaderConfig(**base, coarse=CoarseConfig(Degradation(), 1.0)),
    }
    if "latents" in orbits.read(0, views=False, depths=False).arrays:
        cases["cached latents and tokens"] = LoaderConfig(**base, views=False, arrays=("latents", "image_token"))
    for name, config in cases.items():
        batches = open_batches(orbits, config, seed=0, stage1=stage1)
        seconds = np.median([cpu_seconds(lambda: next(batches), 1) for _ in range(repeats)])  # noqa: B023
        print(f"| {size} | {name} | {seconds:.3f} | {1 / seconds:.2f} |", flush=True)


def time_training(config: TrainConfig, rounds: int, steps: int) -> None:
    """Seconds a training step with and without the pipeline, in turns, so that the machine's load hits both."""
    program = TrainProgram(config, make_mesh(config.mesh))
    state, frozen = program.initial_state()
    data = training_batches(config)
    fixed = program.place_batch(next(data))
    sources = {"one batch, again and again": lambda: fixed, "the pipeline": lambda: program.place_batch(next(data))}
    wall: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(rounds + 1):
        for name, source in sources.items():
            begin = time.perf_counter()
            for _ in range(steps):
                state, metrics = program.step(state, frozen, source())
            jax.block_until_ready(metrics)
            # The first turn compiles and fills the pipeline.
            if turn:
                wall[name].append((time.perf_counter() - begin) / steps)
    print(f"\n| {config.folder}: batches from | wall s a step, median of {rounds} | least |\n| --- | --- | --- |")
    for name, seconds in wall.items():
        print(f"| {name} | {np.median(seconds):.3f} | {min(seconds):.3f} |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--dataset", type=Path, help="a data set of render_dataset.py, read at its own size")
    parser.add_argument("--train", metavar="CONFIG", help="time this config's training on --dataset instead")
    arguments, changes = parser.parse_known_args()
    if changes and not arguments.train:
        parser.error(f"{changes[0]} is unknown; fields of a config can be changed with --train")
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}")
    repeats = 3 if arguments.quick else 8
    if arguments.train:
        config, _ = train.parse([f"--config={arguments.train}", *changes])
        data = dataclasses.replace(config.data, folder=str(arguments.dataset or config.data.folder))
        time_training(dataclasses.replace(config, data=data), rounds=3 if arguments.quick else 7, steps=8)
        return
    if arguments.dataset is None:
        time_rendering((128,) if arguments.quick else (128, 256, 512), 1 if arguments.quick else 3)
    print("\n| size | an example holds | CPU s an example | examples/s and core |")
    print("| --- | --- | --- | --- |")
    if arguments.dataset is not None:
        orbits = RecordFolder(arguments.dataset)
        time_reading(orbits, orbits.settings["size"], repeats)
        return
    for size in (128,) if arguments.quick else (256, 512, 1024):
        with tempfile.TemporaryDirectory() as folder:
            time_reading(rocket_set(Path(folder) / "set", size), size, repeats)


if __name__ == "__main__":
    main()
