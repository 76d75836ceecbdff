"""Reconstructs objects whose truth is known, and scores the meshes beside the visual hull of the same masks.

    python experiments/benchmarks/reconstruct.py ../shared/objects --split val --out results.jsonl
    python experiments/benchmarks/reconstruct.py ../shared/objects --num-interpolated 0 --out results_m0.jsonl
    python experiments/benchmarks/reconstruct.py ../shared/evaluation/chicken --out chicken.jsonl

Ground truth: 16 views at 256 pixels, elevation 20 degrees, softly lit by lamps that stand still in the world; true
cameras and masks. Splats are scored on 16 views halfway between. One line of JSON per object, so a run that is
stopped goes on where it was; the table is printed at the end.

From the orbit's radius of 1.5 some objects leave the frame (those whose bounding box is nearly a cube: only its longest
side is 1). Cameras then stand further back, at the smallest radius in steps of .05 from which every view holds the
whole object; each row states its `radius`. A folder with gt/ and mesh.obj is a case of SyncDreamer's benchmark, used
with its own pictures and cameras (elevation 30, radius 1.5).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from hi3d_jax import splatting
from hi3d_jax.cameras import ORBIT_RADIUS, orbit, project
from hi3d_jax.cli.compiled_programs import keep_compiled_programs, let_go_of_programs
from hi3d_jax.data import load_object, render_orbit
from hi3d_jax.evaluation import psnr, strict, syncdreamer
from hi3d_jax.evaluation.baselines import hull
from hi3d_jax.evaluation.protocols import syncdreamer_cameras
from hi3d_jax.images import over_white, read_image
from hi3d_jax.mesh import Mesh, is_watertight
from hi3d_jax.stages.presets import ReconstructConfig
from hi3d_jax.stages.reconstruct import Reconstruction, reconstruct
from hi3d_jax.video import Orbit

SIZE, ELEVATION_DEG = 256, 20.0
HALFWAY_DEG = (np.arange(16) + 0.5) * 22.5
# Pixels that stay empty around an object, and how far cameras step back to keep them so.
FRAME_MARGIN, RADIUS_STEP = 4, 0.05


def holding_radius(truth: Mesh) -> float:
    """The smallest radius, from the paper's on, from which the views and those halfway hold the whole object."""
    vertices = truth.vertices[np.unique(truth.faces)]
    radius = ORBIT_RADIUS
    while True:
        cameras = orbit(np.arange(32) * 11.25, ELEVATION_DEG, radius, width=SIZE)
        pixels, depths = project(vertices, cameras)
        if (depths > 0).all() and (np.abs(pixels - SIZE / 2) <= SIZE / 2 - FRAME_MARGIN).all():
            return radius
        radius = round(radius + RADIUS_STEP, 2)


def heldout_psnr(gaussians, truth: Mesh, radius: float) -> float:
    """Mean PSNR of the Gaussians on views between those they were fitted to."""
    views = {"azimuths_deg": HALFWAY_DEG, "elevation_deg": ELEVATION_DEG, "radius": radius}
    renders, cameras = render_orbit(truth, **views, width=SIZE)
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
    radius = holding_radius(truth)
    renders, cameras = render_orbit(truth, elevation_deg=ELEVATION_DEG, radius=radius, width=SIZE)
    made, row = score_orbit(Orbit(renders.views, renders.alphas, cameras), truth, config)
    if made.gaussians is not None:
        row["heldout_psnr"] = heldout_psnr(made.gaussians, truth, radius)
    return {"radius": radius} | row


def score_case(folder: Path, config: ReconstructConfig) -> dict:
    """One case of SyncDreamer's benchmark: gt/*.png and a scan that stands in their frame once turned about z."""
    pictures = np.stack([read_image(path) for path in sorted((folder / "gt").glob("[0-9][0-9][0-9].png"))])
    scan = load_object(folder / "mesh.obj")
    turned = np.stack([-scan.vertices[:, 1], scan.vertices[:, 0], scan.vertices[:, 2]], axis=1)
    views = Orbit(np.stack([over_white(picture) for picture in pictures]), pictures[..., 3], syncdreamer_cameras())
    return score_orbit(views, Mesh(turned, scan.faces), config)[1]


def score_orbit(views: Orbit, truth: Mesh, config: ReconstructConfig) -> tuple[Reconstruction, dict]:
    """What is made of the views, and how near it comes to the truth."""
    started = time.perf_counter()
    made = reconstruct(views, None, config, progress=False)
    return made, {
        "seconds": time.perf_counter() - started,
        "steps": made.seconds,
        "view_psnr": made.scores.psnr,
        "silhouette_iou": made.scores.silhouette_iou,
        "watertight": bool(made.report.watertight),
        "genus": made.report.genus,
        "mesh": surface_scores(made.mesh, truth),
        "hull": surface_scores(hull(views), truth),
    }


def table(rows: list[dict]) -> str:
    """Means and medians as markdown, mesh beside hull."""
    lines = ["| metric | mesh, mean (median) | hull, mean (median) | mesh better on |", "| --- | --- | --- | --- |"]
    for name in rows[0]["mesh"]:
        ours, carved = (np.array([row[kind][name] for row in rows]) for kind in ("mesh", "hull"))
        better = ours < carved if "chamfer" in name else ours > carved
        numbers = [f"{values.mean():.4f} ({np.median(values):.4f})" for values in (ours, carved)]
        lines.append(f"| {name} | {numbers[0]} | {numbers[1]} | {better.sum()} of {len(rows)} |")
    closed = [row for row in rows if row["truth_watertight"]]
    for name, some in (("", closed), (" at radius 1.5", [row for row in closed if row.get("radius") == ORBIT_RADIUS])):
        if some:
            numbers = [np.mean([row[kind]["syncdreamer_iou"] for row in some]) for kind in ("mesh", "hull")]
            lines.append(f"| syncdreamer_iou, {len(some)} watertight{name} | {numbers[0]:.4f} | {numbers[1]:.4f} | |")
    for name in ("heldout_psnr", "view_psnr", "silhouette_iou", "seconds"):
        values = np.array([row[name] for row in rows if name in row])
        if len(values):
            lines.append(f"| {name} | {values.mean():.4f} ({np.median(values):.4f}) | | |")
    lines.append(f"| watertight | {sum(row['watertight'] for row in rows)} of {len(rows)} | | |")
    return "\n".join(lines)


def rows_table(rows: list[dict]) -> str:
    """One line per object as markdown, mesh / hull."""
    names = ("syncdreamer_chamfer", "syncdreamer_iou", "strict_f_score_01", "strict_normal_consistency")
    heads = ["object", "radius", *names, "splats, dB", "mesh on views, dB", "genus", "s"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        pairs = [f"{row['mesh'][name]:.4f} / {row['hull'][name]:.4f}" for name in names]
        splats = f"{row['heldout_psnr']:.1f}" if "heldout_psnr" in row else ""
        rest = [splats, f"{row['view_psnr']:.1f}", str(row["genus"]), f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join([row['id'], str(row.get('radius', '')), *pairs, *rest])} |")
    return "\n".join(lines)


def entries_of(folder: Path, split: str, ids: list[str] | None) -> list[dict]:
    """Lines of the folder's manifest.jsonl (id, file, split, watertight), or the folder itself as a single case."""
    if (folder / "mesh.obj").is_file():
        return [
            {"id": folder.resolve().name, "file": ".", "watertight": is_watertight(load_object(folder / "mesh.obj"))}
        ]
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return [entry for entry in entries if (entry["id"] in ids if ids else entry["split"] == split)]


def main() -> None:
    """Reconstructs, scores, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with manifest.jsonl and GLB files, or with gt/ and mesh.obj")
    parser.add_argument("--split", default="val")
    parser.add_argument("--ids", nargs="+", help="only these objects, of any split")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per object; continued if it exists")
    parser.add_argument("--quality", default="draft", choices=("draft", "standard", "full"))
    parser.add_argument("--num-interpolated", type=int, default=16, help="M of the paper; 0: no splats")
    parser.add_argument("--iterations", type=int, help="of the surface fit; default: by quality")
    parser.add_argument("--limit", type=int, default=None, help="only the first objects")
    arguments = parser.parse_args()
    keep_compiled_programs()
    config = ReconstructConfig.preset(arguments.quality, num_interpolated=arguments.num_interpolated)
    if arguments.iterations is not None:
        config = dataclasses.replace(config, neus=dataclasses.replace(config.neus, iterations=arguments.iterations))
    settings = {
        "quality": arguments.quality,
        "num_interpolated": config.num_interpolated,
        "iterations": config.neus.iterations,
    }
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    if any(row.get("settings") != settings for row in rows):
        parser.error(f"{arguments.out} holds results of other settings than {settings}: name another file")
    for entry in entries_of(arguments.folder, arguments.split, arguments.ids)[: arguments.limit]:
        if any(row["id"] == entry["id"] for row in rows):
            continue
        row = {"id": entry["id"], "settings": settings, "truth_watertight": entry["watertight"]}
        path = arguments.folder / entry["file"]
        row |= score_case(path, config) if path.is_dir() else score_object(path, config)
        rows.append(row)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['id']}: {row['seconds']:.0f} s, F-score at .01 {row['mesh']['strict_f_score_01']:.3f}", flush=True)
        let_go_of_programs()
    print(f"{rows_table(rows)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
