"""Renders 3D objects into a training set: orbits of views with depths, as array_record shards.

    python experiments/render_dataset.py objects/ -o train256 --split train --size 256 --orbits 2 --workers 8
    python experiments/render_dataset.py objects/ -o val256 --split val --size 256 --elevations-deg 20 --azimuth-deg 0
    python experiments/render_dataset.py objaverse-lvis -o lvis1024 --size 1024 --runner ray --ray-address auto
    python experiments/render_dataset.py train256 --verify

SOURCE is a folder of GLB, glTF, OBJ, PLY or zip files at any depth, a folder with manifest.jsonl (one object a line),
Google Scanned Objects as downloaded, the cache folder of the `objaverse` package, or the word objaverse-lvis, which
fetches the LVIS subset with that package first. Run the same command again to go on after an interruption.

The result: shards/*.array_record, manifest.json (settings, SHA-256 of every shard), manifest.jsonl (a line a record),
skipped.jsonl (objects that could not be rendered, and why). hi3d_jax.data.loader.open_batches reads it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from hi3d_jax.cli.output import script_errors
from hi3d_jax.data.dataset import RenderSettings, finish, make_plan, missing_shards
from hi3d_jax.data.record_folder import verify
from hi3d_jax.data.runners import run_processes, run_ray


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Everything on the command line."""

    source: Annotated[str, tyro.conf.Positional]
    """Where the objects are (see above); with --verify, the data set."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The data set's folder: new, empty, or one that this command began."""
    split: str | None = None
    """Only the objects that a manifest.jsonl gives this split."""
    limit: int | None = None
    """Only the first so many objects."""
    render: Annotated[RenderSettings, tyro.conf.arg(name="")] = RenderSettings()
    runner: Literal["processes", "ray"] = "processes"
    """Processes of this machine, or Ray's workers on many."""
    workers: int = os.cpu_count() or 1
    """Processes of this machine."""
    ray_address: str | None = None
    """Of a running Ray cluster ("auto": the one this machine belongs to); Ray starts on this machine if not given."""
    verify: bool = False
    """Read the data set SOURCE whole, compare all checksums, and render nothing."""


def render(arguments: Arguments) -> None:
    """Plans, renders what is missing, and writes manifest and report."""
    if arguments.output is None:
        raise ValueError("give the folder to write to: -o FOLDER")
    plan = make_plan(arguments.output, arguments.source, arguments.render, split=arguments.split, limit=arguments.limit)
    missing = missing_shards(arguments.output, plan)
    if arguments.runner == "ray":
        results = run_ray(arguments.output, plan, missing, arguments.workers, arguments.ray_address)
    else:
        results = run_processes(arguments.output, plan, missing, arguments.workers)
    total = sum(len(shard) for shard in plan.shards)
    done = total - sum(len(plan.shards[shard]) for shard in missing)
    with tqdm(total=total, initial=done, unit="object", desc=str(arguments.output)) as bar:
        for shard, note in results:
            bar.update(len(plan.shards[shard]))
            for line in note["skipped"]:
                bar.write(f"skipped {line['id']}: {line['reason']}")
    counts = finish(arguments.output, plan)
    print(
        f"{counts['records']} orbits in {counts['shards']} shards, {counts['skipped']} objects skipped "
        f"(skipped.jsonl); SHA-256 of all shards {counts['sha256']}"
    )


def check(folder: str) -> int:
    """Prints what is damaged; returns the exit status."""
    problems = verify(folder)
    print("\n".join(problems) or f"{folder}: every shard and record is as it was written")
    return 1 if problems else 0


def main() -> None:
    """Parses and runs; errors a user can mend are one line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with script_errors(RuntimeError):
        sys.exit(check(arguments.source) if arguments.verify else render(arguments))


if __name__ == "__main__":
    main()
