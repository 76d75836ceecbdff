"""Holds the memory planner to what a run really takes: python experiments/benchmarks/memory.py

Writes a model folder with random weights, runs `hi3d views` with a memory budget in a process of its own, and compares
what that says beforehand with the most anonymous memory that the process has at any moment (mapped weights files, which
the system takes back when it likes, are not counted). Linux, CPU. `--full` takes the released U-Net's sizes: 13 GB on
disk and 9 GB of memory.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from PIL import Image

from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig
from hi3d_jax.pretrained import abstract_network, save_pretrained, with_parameters
from hi3d_jax.stages.random_model import IMAGE_ENCODER, random_networks
from hi3d_jax.stages.recipe import Recipe

CLI = "import sys; from hi3d_jax.cli import main; sys.exit(main())"


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """A stage 1 with the released autoencoder's sizes and a U-Net of 70 million parameters or the released one's."""
    recipe = dataclasses.replace(Recipe.paper(1), num_views=args.views, image_size=args.size, num_steps=1)
    sizes = {} if args.full else {"block_channels": (64, 128, 256, 256), "num_heads": (1, 2, 4, 4)}
    networks = {
        **random_networks(recipe),
        "unet": (UNet, UNetConfig(vector_dim=512, context_dim=IMAGE_ENCODER.projection_dim, **sizes)),
        "vae": (Autoencoder, AutoencoderConfig.stable_diffusion()),
    }
    generator = np.random.default_rng(0)

    def values(path: str, spec) -> np.ndarray:
        spread = 0.5 / np.sqrt(np.prod(spec.shape[:-1])) if len(spec.shape) > 1 else 0.1
        noise = generator.standard_normal(spec.shape, np.float32)
        return np.float32(spread) * noise + np.float32(path.endswith("scale"))

    made = {name: with_parameters(abstract_network(*size), values) for name, size in networks.items()}
    save_pretrained(folder, made, recipe.to_dict())


def run_and_watch(command: list[str], cache: Path) -> tuple[str, int, float]:
    """What the command printed, its peak anonymous memory in bytes, and its seconds."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, env=environment)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
            peak = max(peak, 1024 * int(found[1])) if found else peak
            time.sleep(0.005)
        printed.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {printed.read()}")
        return printed.read(), peak, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the released U-Net's sizes")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="pixels each way")
    parser.add_argument("--budgets", nargs="+", default=["auto"], help="such as auto 3GB 2.5GB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, photo = Path(folder) / "stage1", Path(folder) / "photo.png"
        write_model(model, args)
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[16:48, 16:48] = (200, 80, 40, 255)
        Image.fromarray(pixels).save(photo)
        print("| budget | planned, GB | measured, GB | planned / measured | seconds | plan |")
        print("| --- | --- | --- | --- | --- | --- |")
        for budget in args.budgets:
            command = [sys.executable, "-c", CLI, "views", str(photo), "-o", f"{folder}/{budget}"]
            printed, peak, seconds = run_and_watch(
                [*command, "-m", str(model), "--memory-budget", budget], Path(folder) / "cache"
            )
            planned, plan = re.search(r"will hold ([\d.]+) GB at most, (.*)", printed).groups()
            row = [budget, planned, f"{peak / 1e9:.2f}", f"{1e9 * float(planned) / peak:.2f}", f"{seconds:.0f}", plan]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
