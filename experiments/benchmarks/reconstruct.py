"""Reconstructs objects whose truth is known, and scores the meshes beside the visual hull of the same masks.

    python experiments/benchmarks/reconstruct.py ../shared/objects --split val --out results.jsonl
    python experiments/benchmarks/reconstruct.py ../shared/objects --num-interpolated 0 --out results_m0.jsonl

Ground truth: 16 views at 256 pixels, elevation 20 degrees, softly lit by lamps that stand still in the world; true
cameras and masks. Splats are scored on 16 views halfway between. One line of JSON per object, so a run that is
stopped goes on where it was; the table is printed at the end. An object that leaves the frame is used as it is: what no
view shows of it is not carved, and it counts like the others except in the mean over watertight objects in frame.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from hi3d_jax import splatting, visual_hull
from hi3d_jax.cli.compiled_programs import keep_compiled_programs
from hi3d_jax.data import load_object, render_orbit
from hi3d_jax.evaluation import psnr, strict, syncdreamer
from hi3d_jax.mesh import decimate, extract_surface
from hi3d_jax.stages.presets import ReconstructConfig
from hi3d_jax.stages.reconstruct import reconstruct
from hi3d_jax.video import Orbit

SIZE, ELEVATION_DEG = 256, 20.0
HALFWAY_DEG = (np.arange(16) + 0.5) * 22.5


def hull_mesh(orbit: Orbit, resolution: int = 128):
    """The baseline: the surface of the visual hull."""
    hull = visual_hull.carve(orbit.alphas, orbit.cameras, resolution)
    return decimate(extract_surface(hull.sample, hull.lower, hull.upper, resolution), 20_000)


def heldout_psnr(gaussians, truth) -> float:
    """Mean PSNR of the Gaussians on views between those they were fitted to."""
    renders, cameras = render_orbit(truth, azimuths_deg=HALFWAY_DEG, elevation_deg=ELEVATION_DEG, width=SIZE)
    drawn = [
        np.clip(splatting.render(gaussians, w2c, K, SIZE, SIZE).colour, 0, 1)
        for w2c, K in zip(cameras.w2c, cameras.K, strict=True)
    ]
    return float(np.mean([psnr(np.asarray(view), true) for view, true in zip(drawn, renders.views, strict=True)]))


def surface_scores(mesh, truth) -> dict[str, float]:
    """Both protocols, by name."""
    near, far = syncdreamer(mesh, truth), strict(mesh, truth)
    return {f"syncdreamer_{k}": float(v) for k, v in dataclasses.asdict(near).items()} | {
        f"strict_{k}": float(v) for k, v in dataclasses.asdict(far).items()
    }


def score_object(path: Path, config: ReconstructConfig) -> dict:
    """One object, reconstructed from its true views."""
    truth = load_object(path)
    renders, cameras = render_orbit(truth, elevation_deg=ELEVATION_DEG, width=SIZE)
    orbit = Orbit(renders.views, renders.alphas, cameras)
    started = time.perf_counter()
    made = reconstruct(orbit, None, config, progress=False)
    row = {
        "seconds": time.perf_counter() - started,
        "steps": made.seconds,
        "view_psnr": made.scores.psnr,
        "silhouette_iou": made.scores.silhouette_iou,
        "watertight": bool(made.report.watertight),
        "leaves_frame": any(visual_hull.touches_border(alpha) for alpha in orbit.alphas),
        "mesh": surface_scores(made.mesh, truth),
        "hull": surface_scores(hull_mesh(orbit), truth),
    }
    if made.gaussians is not None:
        row["heldout_psnr"] = heldout_psnr(made.gaussians, truth)
    return row


def table(rows: list[dict]) -> str:
    """Means and medians as markdown, mesh beside hull."""
    lines = ["| metric | mesh, mean (median) | hull, mean (median) | mesh better on |", "| --- | --- | --- | --- |"]
    for name in rows[0]["mesh"]:
        mesh, hull = (np.array([row[kind][name] for row in rows]) for kind in ("mesh", "hull"))
        better = mesh < hull if "chamfer" in name else mesh > hull
        numbers = [f"{values.mean():.4f} ({np.median(values):.4f})" for values in (mesh, hull)]
        lines.append(f"| {name} | {numbers[0]} | {numbers[1]} | {better.sum()} of {len(rows)} |")
    closed = [row for row in rows if row["truth_watertight"] and not row["leaves_frame"]]
    if closed:
        numbers = [np.mean([row[kind]["syncdreamer_iou"] for row in closed]) for kind in ("mesh", "hull")]
        lines.append(f"| syncdreamer_iou, {len(closed)} watertight in frame | {numbers[0]:.4f} | {numbers[1]:.4f} | |")
    for name in ("heldout_psnr", "view_psnr", "silhouette_iou", "seconds"):
        values = np.array([row[name] for row in rows if name in row])
        if len(values):
            lines.append(f"| {name} | {values.mean():.4f} ({np.median(values):.4f}) | | |")
    lines.append(f"| watertight | {sum(row['watertight'] for row in rows)} of {len(rows)} | | |")
    return "\n".join(lines)


def main() -> None:
    """Reads the folder's manifest.jsonl (id, file, split, watertight), reconstructs, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with manifest.jsonl and GLB files")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per object; continued if it exists")
    parser.add_argument("--quality", default="draft", choices=("draft", "standard", "full"))
    parser.add_argument("--num-interpolated", type=int, default=16, help="M of the paper; 0: no splats")
    parser.add_argument("--limit", type=int, default=None, help="only the first objects")
    arguments = parser.parse_args()
    keep_compiled_programs()
    config = ReconstructConfig.preset(arguments.quality, num_interpolated=arguments.num_interpolated)
    manifest = [json.loads(line) for line in (arguments.folder / "manifest.jsonl").read_text().splitlines()]
    entries = [entry for entry in manifest if entry["split"] == arguments.split][: arguments.limit]
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    for entry in entries:
        if any(row["id"] == entry["id"] for row in rows):
            continue
        row = {"id": entry["id"], "truth_watertight": entry["watertight"]}
        row |= score_object(arguments.folder / entry["file"], config)
        rows.append(row)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['id']}: {row['seconds']:.0f} s, F-score at .01 {row['mesh']['strict_f_score_01']:.3f}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
