"""Times the splatting: forward, forward + backward, a full training step, and a whole fit with held-out PSNR.

    python experiments/benchmarks/splatting.py [--quick] [--scene FOLDER --image-folder images_2]

FOLDER holds transforms.json and transforms_heldout.json (nerfstudio's fields), the RGBA images they name, and the
coloured points of `ply_file_path`. `--image-folder` replaces the images' folder: images_2 takes heldout_2 with it.
Prints Markdown. "floor" is the arithmetic that the pairs of pixel and Gaussian cannot do without, divided by the rate
at which this machine multiplies matrices.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import trimesh

from hi3d_jax import cameras
from hi3d_jax.images import read_image
from hi3d_jax.splatting import FitConfig, Gaussians, adam, fit, from_points, render
from hi3d_jax.splatting.losses import photometric
from hi3d_jax.splatting.projection import project
from hi3d_jax.splatting.rasterize import capacity_for, rasterize
from hi3d_jax.splatting.tiles import TILE, bin_footprints

# Operations per pair of pixel and Gaussian, counted from rasterize.py; an exponential counts as ten.
FORWARD_FLOPS, BACKWARD_FLOPS = 32, 72
LEARNING_RATES = {"means": 1e-4, "quats": 1e-3, "log_scales": 5e-3, "opacity_logits": 0.05, "sh": 2.5e-3}


def seconds(function, *args, repeats: int) -> tuple[float, float, float]:
    """Compilation, median and fastest run."""
    # The fit asks for the same vector width; see fit.py.
    options = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile(options)
    compilation = time.perf_counter() - start
    runs = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        runs.append(time.perf_counter() - start)
    return compilation, float(np.median(runs[1:])), min(runs[1:])


def ball(count: int) -> Gaussians:
    """A ball of random colours that covers about a quarter of the image, as an object does."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(count, 3))
    points *= 0.42 / np.linalg.norm(points, axis=1, keepdims=True)
    return from_points(points.astype(np.float32), rng.random((count, 3)).astype(np.float32), sh_degree=1)


def matrix_rate() -> float:
    """Measured float32 operations per second of a large matrix product."""
    matrix = jnp.ones((2048, 2048))
    _, _, fastest = seconds(lambda a: a @ a, matrix, repeats=5)
    return 2 * 2048**3 / fastest


def step_table(counts, sizes, repeats: int) -> None:
    rate = matrix_rate()
    print(f"\nMatrix product: {rate / 1e9:.0f} GFLOP/s. Milliseconds: median (fastest) of {repeats} runs.\n")
    print("| image | Gaussians | pairs | forward | + backward | full step | compile s | floor | step / floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in sizes:
        for count in counts:
            print(step_row(size, count, rate, repeats), flush=True)


def step_row(size: int, count: int, rate: float, repeats: int) -> str:
    gaussians, camera = ball(count), cameras.orbit([0.0], width=size)
    w2c, K = jnp.asarray(camera.w2c[0]), jnp.asarray(camera.K[0])
    capacity = capacity_for(gaussians, w2c, K, size, size)
    target = render(gaussians, w2c, K, size, size)

    def loss(gaussians):
        footprints = project(gaussians, w2c, K, size, size)
        lists = bin_footprints(jax.lax.stop_gradient(footprints), size, size, capacity)
        return photometric(*rasterize(footprints, lists, size, size)[:2], target.colour * 0.9, target.alpha, 0.2, 0.5)

    def drawn_sum(gaussians):
        drawn = render(gaussians, w2c, K, size, size, 1.0, capacity)
        return (drawn.colour * drawn.colour).sum() + drawn.depth.sum()

    def step(gaussians, moments):
        return adam.update(gaussians, jax.grad(loss)(gaussians), moments, LEARNING_RATES)

    def forward(gaussians):
        return render(gaussians, w2c, K, size, size, 1.0, capacity)

    cells, compilation = [], 0.0
    for function, args in (
        (forward, (gaussians,)),
        (jax.grad(drawn_sum), (gaussians,)),
        (step, (gaussians, adam.start(gaussians))),
    ):
        compilation, median, fastest = seconds(function, *args, repeats=repeats)
        cells.append(f"{median * 1e3:.1f} ({fastest * 1e3:.1f})")
    pairs = listed_pairs(gaussians, w2c, K, size, capacity)
    floor = pairs * TILE * TILE * (FORWARD_FLOPS + BACKWARD_FLOPS) / rate
    cells += [f"{compilation:.1f}", f"{floor * 1e3:.1f}", f"{fastest / floor:.1f}"]
    return f"| {size}² | {count} | {pairs} | {' | '.join(cells)} |"


def listed_pairs(gaussians, w2c, K, size, capacity) -> int:
    lists = bin_footprints(project(gaussians, w2c, K, size, size), size, size, capacity)
    return int(lists.needed[0])


def read_scene(folder: Path, transforms: str, image_folder: str):
    """Views, alphas and cameras of one transforms file."""
    seen, paths = cameras.read_transforms(folder / transforms)
    suffix = image_folder.removeprefix("images")
    pictures = np.stack([read_image(folder / f"{Path(p).parent}{suffix}" / Path(p).name) for p in paths])
    alphas = pictures[..., 3]
    views = pictures[..., :3] * alphas[..., None] + (1 - alphas[..., None])
    return views, alphas, seen.resized(views.shape[2], views.shape[1])


def psnr(gaussians, views, seen) -> float:
    """Mean over the views of the PSNR of the whole image over white."""
    values = []
    for view, w2c, K in zip(views, seen.w2c, seen.K, strict=True):
        drawn = np.clip(render(gaussians, w2c, K, seen.width, seen.height).colour, 0, 1)
        values.append(-10 * np.log10(np.mean((drawn - view) ** 2)))
    return float(np.mean(values))


def fit_table(folder: Path, image_folder: str, step_counts) -> None:
    views, alphas, seen = read_scene(folder, "transforms.json", image_folder)
    heldout, _, heldout_cameras = read_scene(folder, "transforms_heldout.json", image_folder)
    cloud = trimesh.load(folder / json.loads((folder / "transforms.json").read_text())["ply_file_path"])
    points, colours = np.asarray(cloud.vertices, np.float32), np.asarray(cloud.colors, np.float32)[:, :3] / 255
    print(f"\nFit of {folder.name}, {seen.width} x {seen.height}, {len(points)} Gaussians; compilation included.\n")
    print("| steps | wall s | CPU s | train PSNR | held-out PSNR |")
    print("| --- | --- | --- | --- | --- |")
    for steps in step_counts:
        jax.clear_caches()
        wall, cpu = time.perf_counter(), time.process_time()
        fitted = fit(views, alphas, seen, FitConfig(steps=steps), points, colours, progress=False)
        jax.block_until_ready(fitted)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        train, held = psnr(fitted, views, seen), psnr(fitted, heldout, heldout_cameras)
        print(f"| {steps} | {wall:.1f} | {cpu:.1f} | {train:.2f} | {held:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10,000 Gaussians at 256² and the two shortest fits only")
    parser.add_argument("--scene", type=Path, help="folder with transforms.json; without it no fit is timed")
    parser.add_argument("--image-folder", default="images_2", help="images or images_2")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}, jax {jax.__version__}, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} at the start")
    quick = arguments.quick
    step_table((10_000,) if quick else (1_000, 10_000, 50_000), (256,) if quick else (256, 512), arguments.repeats)
    if arguments.scene:
        fit_table(arguments.scene, arguments.image_folder, (130, 300) if quick else (130, 300, 1000, 2000))


if __name__ == "__main__":
    main()
