"""LPIPS here against a graph of the same weights in PyTorch, on the same pairs of images, turn by turn in one run.

    python experiments/benchmarks/lpips.py --size 256 --pairs 8

PyTorch runs twice: with images as they usually come (NCHW), and with channels last, its faster layout on CPUs. Rounds
alternate, so that other work on the machine hits all alike; CPU seconds tell more than wall seconds where there is any.
The weights are the published ones where they are installed, else random: that changes no time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from flax import nnx

from hi3d_jax.evaluation import WeightsError, load_network
from hi3d_jax.evaluation.perceptual import metric_of
from hi3d_jax.models.lpips import LPIPS, SCALE, SHIFT, LPIPSConfig
from hi3d_jax.pretrained import parameters


def network_of(name: str) -> LPIPS:
    """LPIPS with its published weights, or with random ones."""
    try:
        return load_network(f"lpips_{name}")
    except WeightsError as error:
        print(f"random weights: {error}")
        return LPIPS(LPIPSConfig(name), rngs=nnx.Rngs(0))


def in_torch(network: LPIPS, channels_last: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The same distance as a PyTorch graph, from images [n h w 3] in [0, 1]."""
    import torch
    import torch.nn.functional as F

    weights = {path: torch.tensor(np.asarray(value)) for path, value in parameters(network).items()}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kernels = [
        weights[f"convs.{index}.kernel"].permute(3, 2, 0, 1).contiguous(memory_format=layout)
        for index in range(len(network.config.layers))
    ]
    shift, scale = (torch.tensor(np.asarray(values)).view(1, 3, 1, 1) for values in (SHIFT, SCALE))

    def features(x):
        found, x = [], (x - shift) / scale
        for index, layer in enumerate(network.config.layers):
            x = F.max_pool2d(x, network.config.pool_size, 2) if layer.pool_first else x
            x = F.conv2d(x, kernels[index], weights[f"convs.{index}.bias"], layer.stride, layer.padding).relu_()
            if layer.compared:
                found.append(x)
        return found

    def unit(x):
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    @torch.no_grad()
    def distance(images, references):
        total = 0
        pair = (
            torch.tensor(2 * x - 1).permute(0, 3, 1, 2).contiguous(memory_format=layout) for x in (images, references)
        )
        for index, (one, other) in enumerate(zip(*(features(x) for x in pair), strict=True)):
            weighted = (unit(one) - unit(other)).square() * weights[f"heads.{index}"].view(1, -1, 1, 1)
            total = total + weighted.sum(1).mean((1, 2))
        return total.numpy()

    return distance


def main() -> None:
    """Prints seconds per pair and the ratios to PyTorch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=["alex", "vgg"], choices=["alex", "vgg"])
    arguments = parser.parse_args()
    shape = (2, arguments.pairs, arguments.size, arguments.size, 3)
    images, references = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    print(f"{arguments.pairs} pairs of {arguments.size}², best of {arguments.rounds} rounds, seconds per pair")
    for name in arguments.networks:
        network = network_of(name)
        ways = {
            "jax": metric_of(network),
            "torch": in_torch(network, channels_last=False),
            "torch, channels last": in_torch(network, channels_last=True),
        }
        values = {way: distance(images, references) for way, distance in ways.items()}  # and compiles
        np.testing.assert_allclose(values["jax"], values["torch"], rtol=1e-4)
        best = {way: [np.inf, np.inf] for way in ways}
        for _ in range(arguments.rounds):
            for way, distance in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                distance(images, references)
                spent = time.perf_counter() - wall, time.process_time() - cpu
                best[way] = [min(pair) for pair in zip(best[way], spent, strict=True)]
        for way, (wall, cpu) in best.items():
            ratios = f"{wall / best['jax'][0]:.2f} of jax's wall, {cpu / best['jax'][1]:.2f} of its CPU time"
            print(f"{name:5} {way:21} {wall / arguments.pairs:.4f} s, CPU {cpu / arguments.pairs:.4f} s: {ratios}")


if __name__ == "__main__":
    main()
