"""Convolutions with both gradients as training needs them: ours, XLA's own and PyTorch's, turn by turn in one run.

    python experiments/benchmarks/convolutions.py

Shapes are those of hi3d-tiny's U-Nets for two videos, and the temporal convolution of the full size. `rate` is the
arithmetic of all three passes over the fastest round's time. PyTorch has channels last, its faster layout on CPUs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hi3d_jax.models.products import Padding, convolve

SPATIAL, TEMPORAL = ((1, 1), (1, 1)), ((1, 1), (0, 0))
# Input [n h w c], outputs d and padding; a temporal convolution's axes are (video, view, position, channel).
CASES = {
    "32 x 32, 32 to 32": ((32, 32, 32, 32), 32, SPATIAL),
    "32 x 32, 64 to 32": ((32, 32, 32, 64), 32, SPATIAL),
    "16 x 16, 64 to 64": ((32, 16, 16, 64), 64, SPATIAL),
    "over views, 32 x 32, 32": ((2, 16, 1024, 32), 32, TEMPORAL),
    "over views, 16 x 16, 64": ((2, 16, 256, 64), 64, TEMPORAL),
    "over views, 32 x 32, 320": ((2, 16, 1024, 320), 320, TEMPORAL),
}


def in_jax(convolution: Callable[..., Array], x: np.ndarray, kernel: np.ndarray, slope: np.ndarray):
    """A function that gives the output and both gradients."""

    @jax.jit
    def passes(x: Array, kernel: Array, slope: Array) -> tuple[Array, ...]:
        output, pull = jax.vjp(convolution, x, kernel)
        return (output, *pull(slope))

    arrays = [jnp.asarray(array) for array in (x, kernel, slope)]
    return lambda: jax.block_until_ready(passes(*arrays))


def in_torch(x: np.ndarray, kernel: np.ndarray, slope: np.ndarray, padding: Padding) -> Callable[[], Any]:
    """The same by PyTorch."""
    import torch

    channels_first = lambda array: torch.tensor(array).permute(0, 3, 1, 2)  # noqa: E731
    x, slope = channels_first(x).requires_grad_(), channels_first(slope)
    kernel = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last).requires_grad_()

    def passes():
        output = torch.nn.functional.conv2d(x, kernel, padding=tuple(before for before, _ in padding))
        gradients = torch.autograd.grad(output, (x, kernel), slope)
        made = output, gradients[0], gradients[1].permute(2, 3, 1, 0)
        return [array.permute(0, 2, 3, 1) for array in made[:2]] + [made[2]]

    return passes


def main() -> None:
    """Prints rates, and times as ratios to XLA's and PyTorch's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print("| convolution | ours, ms | rate, GFLOP/s | over XLA's time | over PyTorch's | largest difference / scale |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (shape, outputs, padding) in CASES.items():
        rng = np.random.default_rng(0)
        size = tuple(1 + sum(sides) for sides in padding)
        arrays = [
            rng.standard_normal(s, np.float32) for s in (shape, (*size, shape[-1], outputs), (*shape[:3], outputs))
        ]
        layout = {"padding": padding, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        plain = lambda x, kernel: lax.conv_general_dilated(x, kernel, (1, 1), **layout)  # noqa: B023, E731
        ours = lambda x, kernel: convolve(x, kernel, 1, padding)  # noqa: B023, E731
        sides = [in_jax(ours, *arrays), in_jax(plain, *arrays), in_torch(*arrays, padding)]
        made = [
            [np.asarray(array.detach() if hasattr(array, "detach") else array) for array in side()] for side in sides
        ]
        apart = max(
            np.abs(a - b).max() / np.abs(b).max() for other in made[1:] for a, b in zip(made[0], other, strict=True)
        )
        fastest = np.full(len(sides), np.inf)
        for _ in range(rounds):
            for index, side in enumerate(sides):
                begin = time.perf_counter()
                side()
                fastest[index] = min(fastest[index], time.perf_counter() - begin)
        flops = 3 * 2 * np.prod(shape) * outputs * np.prod(size)
        ratios = " | ".join(f"{fastest[0] / other:.2f}" for other in fastest[1:])
        print(
            f"| {name} | {fastest[0] * 1e3:.1f} | {flops / fastest[0] / 1e9:.0f} | {ratios} | {apart:.0e} |", flush=True
        )


if __name__ == "__main__":
    main()
