"""How well `--elevation-deg auto` finds known elevations: python experiments/benchmarks/elevation.py OBJECTS

OBJECTS is a folder with manifest.jsonl, whose `val` objects are rendered from the elevations in question. Without
--model their true views stand for drawn ones, in two ways in which a model can be told a wrong elevation: it draws what
the picture shows ("picture"), or what it was told, with the input as view 0 ("told"). With --model, stage 1 draws, from
view 0 alone. Printed are the estimates, the best candidates, and the mean error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from hi3d_jax.data import load_object, render_orbit
from hi3d_jax.evaluation.results import find_truths
from hi3d_jax.images import to_bytes
from hi3d_jax.mesh import Mesh
from hi3d_jax.stages.elevation import candidate_elevations, estimate_elevation
from hi3d_jax.stages.framing import frame_image
from hi3d_jax.stages.multiview import multiview
from hi3d_jax.stages.pipeline import open_stage
from hi3d_jax.stages.recipe import Recipe

SIZE = 128


def views(mesh: Mesh, elevation_deg: float) -> np.ndarray:
    renders, _ = render_orbit(mesh, elevation_deg=elevation_deg, width=SIZE, supersample=2)
    return to_bytes(renders.views)


def true_views(mesh: Mesh, recipe: Recipe) -> dict[str, Callable[[float], Callable]]:
    """The two ways of drawing, for a true elevation."""
    orbits = {elevation: views(mesh, elevation) for elevation in candidate_elevations(recipe)}
    return {
        "picture": lambda true: lambda told, steps: orbits[true],
        "told": lambda true: lambda told, steps: np.concatenate([orbits[true][:1], orbits[told][1:]]),
    }


def drawn_views(mesh: Mesh, model, seed: int, keep_framing: bool) -> dict[str, Callable[[float], Callable]]:
    """Stage 1, shown view 0."""

    def draw_for(true: float) -> Callable:
        renders, _ = render_orbit(mesh, azimuths_deg=[0.0], elevation_deg=true, width=2 * model.recipe.image_size)
        cut = np.concatenate([renders.views[0], renders.alphas[0][..., None]], axis=-1)
        image = frame_image(cut, model.recipe, keep_framing)
        return lambda told, steps: multiview(
            model, image, elevation_deg=told, seed=seed, num_steps=steps, progress=False
        )

    return {"stage 1": draw_for}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest)
    parser.add_argument("objects", type=Path, metavar="OBJECTS", help="folder with manifest.jsonl")
    parser.add_argument("--model", help="model folder of stage 1, or tiny")
    parser.add_argument("--true", type=float, nargs="*", default=[0.0, 20.0], help="elevations to be found, degrees")
    parser.add_argument("--limit", type=int, help="only the first so many objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-framing", action="store_true", help="show the model the render as it is framed")
    options = parser.parse_args(arguments)
    model = None if options.model is None else open_stage(options.model, 1, keep_loaded=True)
    recipe = Recipe.paper(1) if model is None else model.recipe
    errors: dict[str, list[float]] = {}
    best: dict[str, list[bool]] = {}
    for name, path in list(find_truths(options.objects, "val").items())[: options.limit]:
        mesh = load_object(path)
        ways = (
            true_views(mesh, recipe) if model is None else drawn_views(mesh, model, options.seed, options.keep_framing)
        )
        for way, draw_for in ways.items():
            for true in options.true:
                started = time.perf_counter()
                estimate = estimate_elevation(recipe, draw_for(true), progress=False)
                first_choice = estimate.candidates_deg[int(np.argmax(estimate.agreements))]
                errors.setdefault(way, []).append(abs(estimate.elevation_deg - true))
                best.setdefault(way, []).append(first_choice == true)
                scores = " ".join(f"{agreement:.3f}" for agreement in estimate.agreements)
                print(
                    f"{way}, {name}: true {true:g}, estimate {estimate.elevation_deg:g} ({scores}), "
                    f"{time.perf_counter() - started:.1f} s",
                    flush=True,
                )
    for way, values in errors.items():
        print(
            f"{way}: mean error {np.mean(values):.1f} degrees, median {np.median(values):.1f}, largest {max(values):g}"
            f"; the true candidate scores best in {sum(best[way])} of {len(values)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
