"""Times one iteration of the NeuS fit, its parts, and the compilation, on views of a painted sphere.

    python experiments/benchmarks/neus.py [--quick]

Prints a markdown table: wall and CPU milliseconds (best of the repeats: machines are shared), seconds to compile.
"""

from __future__ import annotations

import argparse
import platform
import time

import jax
import numpy as np

from hi3d_jax import neus, visual_hull
from hi3d_jax.cameras import orbit, pixel_rays

SIZE, RADIUS = 256, 0.35


def painted_sphere():
    """Sixteen views of a sphere whose colour changes with height, in closed form."""
    cameras = orbit(elevation_deg=20.0, width=SIZE)
    origins, directions = pixel_rays(cameras)
    closest = -(origins * directions).sum(-1)
    inside = RADIUS**2 - ((origins + closest[..., None] * directions) ** 2).sum(-1)
    alphas = (inside > 0).astype(np.float32)
    height = (origins + (closest - np.sqrt(np.maximum(inside, 0)))[..., None] * directions)[..., 2]
    colours = np.stack([0.5 + height, np.full_like(height, 0.3), 0.5 - height], axis=-1)
    views = colours * alphas[..., None] + (1 - alphas[..., None])
    return views.astype(np.float32), alphas, cameras


def time_fit(rays: int, iterations: int) -> tuple[float, float, float]:
    """Best wall and CPU milliseconds of an iteration, and the seconds until the first one is done."""
    views, alphas, cameras = painted_sphere()
    hull = visual_hull.carve(alphas, cameras, 96)
    config = neus.NeuSConfig(iterations=iterations, rays=rays)
    clocks = [(time.perf_counter(), time.process_time())]

    def tick(iteration, fields):
        jax.block_until_ready(fields)
        clocks.append((time.perf_counter(), time.process_time()))

    neus.fit(views, alphas, cameras, config, hull.sdf, progress=False, on_iteration=tick)
    wall, cpu = np.diff(np.array(clocks), axis=0).T
    return 1e3 * wall[1:].min(), 1e3 * cpu[1:].min(), wall[0]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few repeats")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("| rays | samples a ray | iteration, wall ms | CPU ms | compile and first iteration, s |")
    print("| --- | --- | --- | --- | --- |")
    for rays in (1024,) if arguments.quick else (512, 1024, 2048):
        wall, cpu, first = time_fit(rays, 8 if arguments.quick else 40)
        print(f"| {rays} | {neus.NeuSConfig().sampling.fine} | {wall:.0f} | {cpu:.0f} | {first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
