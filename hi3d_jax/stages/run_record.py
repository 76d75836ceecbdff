"""The diary of a run: run.json, which says what was asked for, on what, and what is finished.

It is written before anything else and again, whole, after every step: an interrupted run can go on after its last
finished step, and a person can read where time and memory went.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hi3d_jax.atomic import written_aside

FILE_NAME = "run.json"
PACKAGES = ("hi3d_jax", "jax", "jaxlib", "numpy", "scipy", "scikit-image", "trimesh", "embreex", "xatlas")


class RunError(ValueError):
    """A run that cannot be begun or continued; the text names the folder or value and the remedy."""


@dataclasses.dataclass
class RunRecord:
    """What run.json holds, kept in step with the file; without `folder`, only in memory.

    `request` is everything that decides the result (settings, seed, a digest of the input): a run is only continued
    with the request it was begun with. `steps` maps the name of each step to its seconds, the process's peak memory
    during it in bytes (None where the system does not tell) and whether it is finished.
    """

    folder: Path | None
    request: dict[str, Any]
    steps: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(cls, folder: Path | None, request: dict[str, Any], resume: bool) -> RunRecord:
        """A new record, or with `resume` the one that `folder` holds. Raises `RunError`, and `OSError` for the disk."""
        record = cls(folder, json.loads(json.dumps(request)))
        if folder is None:
            return record
        path = folder / FILE_NAME
        if path.exists():
            if not resume:
                raise RunError(f"{folder} already holds a run; continue it with --resume, or give a new folder")
            record.steps = _finished_steps(path, record.request)
        folder.mkdir(parents=True, exist_ok=True)
        record.write()
        return record

    def finished(self, name: str) -> bool:
        """Whether the step `name` was finished, now or before the run was interrupted."""
        return self.steps.get(name, {}).get("finished", False)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times what happens inside; only when it ends without an error is the step finished."""
        self.steps[name] = {"seconds": None, "peak_memory_bytes": None, "finished": False}
        self.write()
        forget_peak_memory()
        start = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - start, 3)
        self.steps[name] = {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes(), "finished": True}
        self.write()

    @property
    def seconds(self) -> float:
        """What all finished steps took together, those before an interruption included."""
        return sum(step["seconds"] or 0.0 for step in self.steps.values())

    def write(self) -> None:
        """Brings run.json up to date, atomically."""
        if self.folder is None:
            return
        document = {**self.request, **surroundings(), "steps": self.steps, "results": self.results}
        with written_aside(self.folder / FILE_NAME) as aside:
            aside.write_text(json.dumps(document, indent=1) + "\n")


def _finished_steps(path: Path, request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        document = json.loads(path.read_text())
        before = {name: document[name] for name in request}
        finished = {name: step for name, step in document["steps"].items() if step["finished"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); begin anew in another folder") from error
    for name, was, now in _differences(before, request):
        if name.startswith("input"):
            raise RunError(
                f"{path.parent} was begun with other views or splats; continue with those, or begin in another folder"
            )
        raise RunError(
            f"{path.parent} was begun with {name} = {was}, not {now}; continue with that, or begin in another folder"
        )
    return finished


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two requests differ: dotted name and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def surroundings() -> dict[str, Any]:
    """Versions and machine, as far as they can change the result or the time."""
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    device = jax.devices()[0]
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": f"{device.platform}: {device.device_kind}",
    }
    return {"versions": versions, "machine": machine}


def forget_peak_memory() -> None:
    """Lets Linux measure the peak anew; elsewhere `peak_memory_bytes` is that since the process began."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int | None:
    """The most memory that this process has had at once, without the processes it started; None if unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
