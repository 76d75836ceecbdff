"""What a stage will hold in memory, known before anything is loaded, and how to make that fit a budget.

A stage loads a network, runs its program and lets it go, so its peak is that of its largest program: parameters,
arguments, results and temporaries, as the compiled program states them. Nothing is guessed: a choice is compiled (which
the run needs anyway, and finds in the cache) before it is offered. Choices are tried from the fastest to the most
frugal: many views at a time before few, both halves of the guidance at once before one after the other, and all that
before another dtype.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hi3d_jax.pretrained import abstract_network
from hi3d_jax.stages.devices import shared_programs
from hi3d_jax.stages.programs import Chunking, Program
from hi3d_jax.stages.recipe import Recipe

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
# Views per call of encoders and the decoder that are tried; on CPU more at once are not faster.
VIEWS_AT_ONCE = {"cpu": (1,)}
VIEWS_AT_ONCE_ELSEWHERE = (8, 4, 2, 1)
# What XLA's CPU backend keeps for every program that has run beside what the compiled program states: its libraries'
# workspaces. Measured with 256 and 512 pixels.
CPU_WORKSPACE = 7 * 10**7
# What each program's memory depends on.
BY_ENCODE_VIEWS = ("conditioning_latents", "coarse_latents", "depth")


class MemoryBudgetError(ValueError):
    """A budget that nothing fits into, or that cannot be read; the text says the smallest that works."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """How a stage fits its budget. All numbers are bytes on one device."""

    dtype: Any
    chunking: Chunking
    # What each program holds while it runs, its parameters included.
    programs: dict[str, int]
    # What is held beside: on CPU the process itself.
    held: int

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.held + max(self.programs.values())

    def describe(self) -> str:
        """The plan in a line."""
        largest = max(self.programs, key=self.programs.__getitem__)
        half = "one half of the guidance after the other" if self.chunking.split_guidance else "both halves at once"
        return (
            f"{gigabytes(self.peak)} at most, in {largest} ({gigabytes(self.held)} of them by the process): "
            f"{jnp.dtype(self.dtype).name}, {half}, encoding {self.chunking.encode_views} and decoding "
            f"{self.chunking.decode_views} view(s) at a time"
        )


def plan_memory(
    recipe: Recipe,
    networks: Mapping[str, tuple[type[nnx.Module], Any]],
    budget: int,
    dtypes: Sequence[Any],
    device_mesh: Mesh | None = None,
) -> MemoryPlan:
    """The fastest way of running a stage within `budget` bytes.

    `networks` are classes and configs by name, `dtypes` what may be computed in, in order of preference. Raises
    `MemoryBudgetError` where even the most frugal way needs more.
    """
    needed = []
    for dtype in dtypes:
        abstract = {name: abstract_network(*size, dtype=dtype, param_dtype=dtype) for name, size in networks.items()}
        plan = _Search(recipe, abstract, budget, device_mesh).plan(dtype)
        if plan.peak <= budget:
            return plan
        needed.append(plan.peak)
    raise MemoryBudgetError(
        f"stage {recipe.stage} of this model does not fit into {gigabytes(budget)}; the smallest budget that works "
        f"is {gigabytes(min(needed))}"
    )


class _Search:
    """Tries choices for one dtype, each program by itself."""

    def __init__(self, recipe: Recipe, networks: Mapping[str, nnx.Module], budget: int, mesh: Mesh | None):
        self.recipe, self.networks, self.budget, self.mesh = recipe, networks, budget, mesh
        # Kept until all is measured: a run keeps its programs, too.
        self.compiled: dict[str, Any] = {}

    def plan(self, dtype: Any) -> MemoryPlan:
        """The fastest choice that fits, or the most frugal one."""
        views = VIEWS_AT_ONCE.get(jax.default_backend(), VIEWS_AT_ONCE_ELSEWHERE)
        encoding = [Chunking(encode_views=count) for count in views]
        decoding = [Chunking(decode_views=count) for count in views]
        # Halves that have devices of their own are not done one after the other.
        together = self.mesh is not None and self.mesh.shape["guidance"] > 1
        halves = [Chunking(split_guidance=split) for split in ((False,) if together else (False, True))]
        names = [name for name in self._programs(Chunking()) if name != "preview"]
        encode, encoded = self._first_fit([name for name in names if name in BY_ENCODE_VIEWS], encoding)
        decode, decoded = self._first_fit(["decode"], decoding)
        split, step = self._first_fit(["denoise_step"], halves)
        _, others = self._first_fit([n for n in names if n not in {*encoded, *decoded, *step}], [Chunking()])
        chunking = Chunking(encode.encode_views, decode.decode_views, split.split_guidance)
        programs = {**encoded, **decoded, **step, **others}
        return MemoryPlan(dtype, chunking, programs, self._held())

    def _first_fit(self, names: Sequence[str], choices: Sequence[Chunking]) -> tuple[Chunking, dict[str, int]]:
        """The first choice with which the programs of these names fit, or the last one, and what they hold."""
        for chunking in choices:
            programs = self._programs(chunking)
            last = chunking == choices[-1]
            # What the arguments alone show not to fit need not be compiled.
            if not last and max(argument_bytes(programs[name]) for name in names) > self.budget:
                continue
            self.compiled |= {name: programs[name].lower().compile() for name in names}
            held = {name: program_bytes(programs[name], self.compiled[name]) for name in names}
            if last or self._held() + max(held.values()) <= self.budget:
                return chunking, held
        raise AssertionError("the last choice is always taken")

    def _held(self) -> int:
        """Bytes held beside the largest program."""
        workspaces = CPU_WORKSPACE * len(self._programs(Chunking())) if jax.default_backend() == "cpu" else 0
        return held_bytes() + workspaces

    def _programs(self, chunking: Chunking) -> dict[str, Program]:
        return shared_programs(self.recipe, self.networks, chunking, self.mesh)


def argument_bytes(program: Program) -> int:
    """Bytes of a program's parameters and inputs on each device.

    All of them: what the compiled program has no use for (queries where there is one key) is loaded none the less.
    """
    return device_bytes((program.params, program.inputs))


def device_bytes(tree: Any) -> int:
    """Bytes on each device of arrays, or of ShapeDtypeStructs, placed or not."""

    def on_device(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(on_device, jax.tree.leaves(tree)))


def program_bytes(program: Program, compiled: Any) -> int:
    """Bytes that a compiled program holds on each device while it runs, its parameters included."""
    return argument_bytes(program) + beside_arguments(compiled)


def beside_arguments(compiled: Any) -> int:
    """Bytes of a compiled program's results, temporaries and code on each device."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def held_bytes() -> int:
    """Bytes in use already: on CPU the process's own (without mapped files, which the system can take back)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["bytes_in_use"]
    give_back()
    return _status("/proc/self/status", "RssAnon") or 0


def give_back() -> None:
    """Returns to the system what was freed: glibc keeps it, 0.3 GB more after every network."""
    gc.collect()
    # Not on other systems or with other C libraries.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int | None:
    """All memory of the device that programs run on, or of the machine (or container); None where it is unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats.get("bytes_limit")
    limits = [_status("/proc/meminfo", "MemTotal")]
    # Absent, or the word "max".
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min((limit for limit in limits if limit), default=None)


def _status(path: str | os.PathLike, field: str) -> int | None:
    """A field of Linux's status files, in bytes."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def parse_budget(text: str) -> int:
    """Bytes of "12GB", "800 MB", "11.5GiB", or of "auto": nine tenths of all there are. Raises `MemoryBudgetError`."""
    if text == "auto":
        available = available_bytes()
        if available is None:
            raise MemoryBudgetError("this machine does not say how much memory it has: give a number, such as 12GB")
        return available * 9 // 10
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]+)", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise MemoryBudgetError(f"{text!r} is no amount of memory: write it like 12GB, 800MB, 11.5GiB, or auto")
    return int(float(match[1]) * UNITS[match[2]])


def gigabytes(count: int) -> str:
    """Bytes for a person to read, rounded up."""
    return f"{math.ceil(count / 10**7) / 100:.2f} GB"
