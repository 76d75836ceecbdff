"""Kills `hi3d generate` in every stage and every write, and compares what resuming gives with an undisturbed run.

    python experiments/benchmarks/kill_generate.py                                  # random networks, smallest sizes
    python experiments/benchmarks/kill_generate.py --model tiny --image photo.png   # the trained model, draft quality

Each kill is SIGKILL, which no program can prepare for: after a sampling step, with what a step has made still in
memory, between two files that it writes, before a finished file gets its name, or before the run's record knows of it.
The run goes on until the next kill, and at last to its end. mesh.glb must be that of the undisturbed run, byte by byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from hi3d_jax.neus import FieldConfig, HashGridConfig, NeuSConfig, SamplingConfig
from hi3d_jax.splatting import FitConfig
from hi3d_jax.stages import pictures, sampling
from hi3d_jax.stages.image_to_3d import ImageTo3D
from hi3d_jax.stages.model import StageModel
from hi3d_jax.stages.pipeline import Options
from hi3d_jax.stages.presets import ReconstructConfig
from hi3d_jax.stages.random_model import write_random_model
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.stages.steps import Steps

ROOT = Path(__file__).resolve().parents[2]
# Step of a run, and when: "made" before anything of it is saved, a number before that file of it gets its name, "saved"
# before the record knows, "sampling" after two steps of sampling.
KILLS: tuple[tuple[str, str | int], ...] = (
    ("stage 1 coarse", "sampling"),
    ("stage 1 coarse", 3),
    ("stage 2", "sampling"),
    ("stage 2", "saved"),
    ("views", 2),
    ("splats", "made"),
    ("splats", 1),
    ("interpolated", 2),
    ("surface", "made"),
    ("surface", 1),
    ("mesh", 1),
    ("texture", 1),
    ("pictures", 2),
)
SMALLEST = ReconstructConfig(
    num_interpolated=2,
    image_size=32,
    hull_resolution=32,
    num_gaussians=200,
    splats=FitConfig(steps=3, sh_degree=0, resolutions=((1.0, 32),)),
    neus=NeuSConfig(
        fields=FieldConfig(grid=HashGridConfig(num_levels=2, log2_table_size=8), sdf_width=8, colour_width=8),
        sampling=SamplingConfig(coarse=24, fine=6),
        iterations=6,
        rays=64,
        cache_resolution=24,
    ),
    resolution=32,
    num_faces=400,
    texture_size=64,
)


def write_random_stages(folder: Path, stages: tuple[int, ...] = (1, 2)) -> None:
    """Stages with random networks, four views, and steps enough to be killed between them."""
    for stage in stages:
        recipe = dataclasses.replace(Recipe.paper(stage), num_views=4, image_size=48 * stage, num_steps=4)
        write_random_model(folder / f"stage{stage}", recipe, seed=stage)


def start(output: Path, model: Path | str, image: Path | None, kill: tuple[str, str | int] | None) -> subprocess.Popen:
    """The run in a process of its own, which resumes what `output` holds."""
    command = [sys.executable, str(Path(__file__).resolve()), "--model", str(model), "--run", str(output)]
    command += [] if image is None else ["--image", str(image)]
    command += [] if kill is None else ["--kill", *map(str, kill)]
    # Compiled once, by the first run; in a hurry where little is computed.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(output.parent / "compiled")}
    hurry = {} if image else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **cache, **hurry, **os.environ}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(output: Path, model: Path | str, image: Path | None, kill: tuple[str, str | int] | None = None) -> None:
    """Runs to the end, or to the kill. Raises `RuntimeError` where the process ends in another way."""
    process = start(output, model, image, kill)
    said = process.communicate()[1].decode()
    if process.returncode != (0 if kill is None else -signal.SIGKILL):
        raise RuntimeError(f"{output}, kill {kill}: exit status {process.returncode}\n{said[-2000:]}")


def run(options: argparse.Namespace) -> None:
    """What `start` starts."""
    if options.kill:
        _die_at(options.kill[0], int(options.kill[1]) if options.kill[1].isdigit() else options.kill[1])
    config, picture = ReconstructConfig.preset("draft"), options.image
    if picture is None:
        _put_on_white()
        pictures.TURNTABLE_SIZE = 48
        config, picture = SMALLEST, _disc()
    ImageTo3D.from_pretrained(options.model)(
        picture, options.run, config=config, options=Options(resume=True, progress=False)
    )


def _disc(size: int = 64) -> np.ndarray:
    """A picture of a red disc, RGBA."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    alpha = (np.hypot(x, y) < 0.3 * size).astype(np.float32)
    return np.concatenate([np.tile(np.float32([0.8, 0.2, 0.1]), (size, size, 1)), alpha[..., None]], axis=-1)


def _put_on_white() -> None:
    """Random networks draw noise, and no object; what they draw is cut to a disc on white, which stage 3 can use."""
    decode = StageModel.decode

    def decode_on_white(model: StageModel, *arguments: Any, **named: Any) -> np.ndarray:
        views = decode(model, *arguments, **named)
        inside = _disc(views.shape[1])[..., 3:] > 0
        return np.where(inside, views // 2, np.uint8(255))

    StageModel.decode = decode_on_white


def _die_at(name: str, when: str | int) -> None:
    """Lets this process kill itself in the step `name`."""
    take = Steps.take

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def take_and_die(steps: Steps, step: str, file: str, make: Callable, save: Callable, load: Callable) -> Any:
        if step != name:
            return take(steps, step, file, make, save, load)

        def save_and_die(path: Path, made: Any) -> None:
            if when == "made":
                die()
            if isinstance(when, int):
                _after(when, Path, "replace", die)
            save(path, made)
            die()

        if when == "sampling":
            _after(3, sampling, "_write_state", die)
        return take(steps, step, file, make, save_and_die, load)

    Steps.take = take_and_die


def _after(count: int, owner: Any, name: str, die: Callable) -> None:
    """Lets the call number `count` of a function of `owner` not happen."""
    function, calls = getattr(owner, name), []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == count:
            die()
        return function(*arguments)

    setattr(owner, name, counted)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "mesh.glb").read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 if both meshes are equal."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder, or tiny; random networks if not given")
    parser.add_argument("--image", type=Path, help="picture for a trained model")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run is not None:
        run(options)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "model"
        if options.model is None:
            write_random_stages(model)
        undisturbed, killed = Path(scratch) / "undisturbed", Path(scratch) / "killed"
        finish(undisturbed, model, options.image)
        for number, kill in enumerate(KILLS, 1):
            started = time.perf_counter()
            finish(killed, model, options.image, kill)
            seconds = time.perf_counter() - started
            print(f"kill {number} of {len(KILLS)}, {kill[0]}, {kill[1]}: after {seconds:.0f} s", flush=True)
        finish(killed, model, options.image)
        same = digest(killed) == digest(undisturbed)
        print(f"{len(KILLS)} kills: mesh.glb is " + ("the same, byte by byte" if same else "NOT the same"))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
