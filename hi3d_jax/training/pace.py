"""How fast a run goes, and how much of the devices it uses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from hi3d_jax.training.program import TrainProgram

# bfloat16 FLOP/s of one device, by its device_kind, from vendors' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
    """FLOP/s of all devices together; None where a device is not in the table."""
    peaks = [PEAKS.get(device.device_kind) for device in jax.devices()]
    return None if None in peaks else sum(peaks)


class Pace:
    """Seconds, examples and FLOPs between two looks; what happens in `paused` and compilation are no part of them."""

    def __init__(self, program: TrainProgram):
        self._program, self._examples = program, program.config.data.batch_size
        self._since: tuple[float, int] | None = None
        self._flops: int | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since = self._since[0] + time.perf_counter() - start, self._since[1]

    def measure(self, step: int, batch: Mapping[str, Any]) -> dict[str, float]:
        """What happened since the last call: seconds per step, examples and FLOPs per second, and MFU where known.

        MFU is the share of the devices' peak that the step's own FLOPs take, recomputation not counted. The first call
        only starts the clock.
        """
        now, before = time.perf_counter(), self._since
        if self._flops is None:
            self._flops = self._program.step_flops(batch)
        self._since = time.perf_counter(), step
        if before is None or before[1] == step:
            return {}
        seconds = (now - before[0]) / (step - before[1])
        values = {"seconds_per_step": seconds, "examples_per_second": self._examples / seconds}
        values["flops_per_second"] = self._flops / seconds
        peak = peak_flops()
        return values if peak is None else values | {"mfu": values["flops_per_second"] / peak}
