"""Who renders the shards of a plan: processes of this machine, or Ray's workers on many."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from hi3d_jax.cluster import run_on_ray
from hi3d_jax.data.dataset import Plan, RenderSettings, acquit, render_shard
from hi3d_jax.data.sources import Asset

# Deaths of worker processes in a row, without a shard coming out, after which something else than an asset is wrong.
MAX_BREAKS = 24


def run_processes(folder: str | Path, plan: Plan, shards: list[int], workers: int) -> Iterator[tuple[int, dict]]:
    """Yields (shard, note) as the shards are rendered by `workers` processes; one worker is this process itself.

    Shards of a worker that dies are given to others. Raises `RuntimeError` when workers die and nothing comes out.
    """
    if workers == 1:
        for shard in shards:
            yield shard, render_shard(folder, *_work(plan, shard))
        return
    waiting, breaks = list(shards), 0
    while waiting:
        before = len(waiting)
        try:
            for shard, note in _run_pool(folder, plan, waiting, workers):
                waiting.remove(shard)
                yield shard, note
        except BrokenProcessPool as error:
            breaks = breaks + 1 if len(waiting) == before else 0
            if breaks >= MAX_BREAKS:
                raise RuntimeError(
                    f"{breaks} worker processes died without finishing a shard; use fewer workers"
                ) from error


def _work(plan: Plan, shard: int) -> tuple[int, tuple[Asset, ...], RenderSettings]:
    """What a worker needs: a plan of 46,000 objects would be 10 MB for each of its shards."""
    return shard, plan.shards[shard], plan.settings


def _run_pool(folder, plan: Plan, shards: list[int], workers: int) -> Iterator[tuple[int, dict]]:
    others = set(multiprocessing.active_children())
    # Not fork: JAX and Embree have threads, which a forked child does not get.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _prepare_worker) as pool:
        futures = {pool.submit(render_shard, str(folder), *_work(plan, shard)): shard for shard in shards}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except (KeyboardInterrupt, GeneratorExit):
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare_worker() -> None:
    """Makes a worker end when it is told to, or when the process that started it ends (Linux)."""

    def end(*_):
        # Also the pool's way to end the others when one dies: what they render is not to blame.
        acquit()
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        parent_death_signal = 1
        ctypes.CDLL("libc.so.6").prctl(parent_death_signal, signal.SIGTERM)


def run_ray(
    folder: str | Path, plan: Plan, shards: list[int], workers: int, address: str | None
) -> Iterator[tuple[int, dict]]:
    """Yields (shard, note) as Ray's workers render: those of the cluster at `address`, or `workers` of this machine.

    `folder` and the assets must be on a file system that all machines see. Raises `ClusterError` without Ray.
    """
    folder = str(Path(folder).resolve())
    work = {shard: (folder, *_work(plan, shard)) for shard in shards}
    yield from run_on_ray(render_shard, work, address=address, local_cpus=workers, retries=MAX_BREAKS)
