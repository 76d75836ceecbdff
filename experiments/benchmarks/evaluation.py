"""How long `hi3d evaluate views` takes for 25 objects of 16 views, part by part.

    python experiments/benchmarks/evaluation.py --size 128
    python experiments/benchmarks/evaluation.py --size 256 --metrics lpips_alex

Views are made up (noise over white), since their contents change no time; reading, tables and report are included, the
drawing of truths from object files is not. CPU seconds tell more than wall seconds where other work is running.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from hi3d_jax.cameras import orbit
from hi3d_jax.cli.compiled_programs import keep_compiled_programs
from hi3d_jax.cli.evaluate import Evaluate
from hi3d_jax.evaluation.perceptual import perceptual_metrics
from hi3d_jax.evaluation.views import psnr, ssim, ssim_gaussian
from hi3d_jax.video import Orbit, write_orbit

NUM_VIEWS = 16


def made_up(size: int, seed: int) -> Orbit:
    """An orbit of a square of noise on white."""
    views = np.ones((NUM_VIEWS, size, size, 3), np.float32)
    inside = slice(size // 4, 3 * size // 4)
    views[:, inside, inside] = np.random.default_rng(seed).uniform(size=views[:, inside, inside].shape)
    return Orbit(views, np.ones(views.shape[:3], np.float32), orbit(width=size))


def parts(size: int, names: tuple[str, ...]) -> None:
    """Seconds of each metric for one orbit, compiled."""
    one, other = made_up(size, 0).views, made_up(size, 1).views
    per_view = {
        "psnr": lambda a, b: [psnr(x, y) for x, y in zip(a, b, strict=True)],
        "ssim": lambda a, b: [ssim(x, y) for x, y in zip(a, b, strict=True)],
        "ssim_gaussian": ssim_gaussian,
    }
    for name, metric in {**per_view, **perceptual_metrics(names)}.items():
        metric(one, other)
        wall, cpu = time.perf_counter(), time.process_time()
        metric(one, other)
        print(f"  {name:14} {time.perf_counter() - wall:6.2f} s, CPU {time.process_time() - cpu:6.2f} s an object")


def main() -> None:
    """Prints the parts for one object, then the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=25)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--metrics", nargs="*", default=["lpips_vgg"], choices=["lpips_vgg", "lpips_alex", "dists"])
    arguments = parser.parse_args()
    keep_compiled_programs()
    names = tuple(arguments.metrics)
    parts(arguments.size, names)
    with tempfile.TemporaryDirectory() as folder:
        results, truths = Path(folder) / "results", Path(folder) / "truths"
        for number in range(arguments.objects):
            write_orbit(results / f"{number:02d}", made_up(arguments.size, 2 * number))
            write_orbit(truths / f"{number:02d}", made_up(arguments.size, 2 * number + 1))
        wall, cpu = time.perf_counter(), time.process_time()
        command = Evaluate("views", results, Path(folder) / "out", truths, size=arguments.size, metrics=names)
        command.score()
        spent = f"{time.perf_counter() - wall:.0f} s, CPU {time.process_time() - cpu:.0f} s"
    print(f"{arguments.objects} objects x {NUM_VIEWS} views of {arguments.size}²: {spent}, compilation included")


if __name__ == "__main__":
    main()
