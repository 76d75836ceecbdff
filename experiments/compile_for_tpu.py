"""Compiles full-size programs for TPUs that are not there: python experiments/compile_for_tpu.py --config=stage1

XLA's TPU compiler runs on any machine (`pip install -e ".[tpu]"`). What it says is exact: bytes that each device holds,
and whether they fit. `--mode=sample` compiles one step of sampling as the pipeline runs it (both halves of the
guidance, 16 views), `--mode=train` a training step as experiments/train.py runs it with the config of that name and
the same changes of its fields (state sharded by its mesh rules, frozen networks included). Seconds are floors:
arithmetic at the chip's peak rate, or each byte of the arguments once over its memory bus, whichever is longer. For
training, videos per second are what 40 % of the peak rate would give, recomputation for the backward pass counted as
work.

    python experiments/compile_for_tpu.py --config=stage1 --topology=v5e:2x2 --devices=1
    python experiments/compile_for_tpu.py --config=stage2 --topology=v5e:2x4
    python experiments/compile_for_tpu.py --config=stage1 --mode=train --topology=v5e:4x4
    python experiments/compile_for_tpu.py --config=stage1 --mode=train --topology=v5e:8x8 --mesh.tensor=4
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # The compiler must neither look for a TPU nor ask the cloud about one, and needs no TPU to itself.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from experiments import train
from hi3d_jax.models.aesthetic import AestheticConfig, AestheticPredictor
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.models.depth import DPT, DPTConfig
from hi3d_jax.models.flops import count_flops
from hi3d_jax.models.unet import UNet, UNetConfig
from hi3d_jax.models.vae import Autoencoder, AutoencoderConfig
from hi3d_jax.pretrained import abstract_network
from hi3d_jax.stages.devices import make_device_mesh, shared_programs
from hi3d_jax.stages.memory import argument_bytes, beside_arguments, device_bytes
from hi3d_jax.stages.programs import Chunking
from hi3d_jax.stages.random_model import random_networks
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training.config import TrainConfig
from hi3d_jax.training.program import TrainProgram
from hi3d_jax.training.sharding import batch_shardings, make_mesh


class Chip(NamedTuple):
    """Of one chip: bfloat16 operations per second, bytes of memory that a program may use, bytes per second from it."""

    flops: float
    memory: float
    bandwidth: float


# Google's published peak rates and bandwidths (cloud.google.com/tpu/docs); memory as the compiler has it.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9),
}


def full_networks(recipe: Recipe) -> dict[str, tuple[type[nnx.Module], Any]]:
    """Class and config of the networks of the released models."""
    return {
        "unet": (UNet, UNetConfig.hi3d_stage1() if recipe.stage == 1 else UNetConfig.hi3d_stage2()),
        "vae": (Autoencoder, AutoencoderConfig.stable_diffusion()),
        "image_encoder": (CLIPVision, CLIPVisionConfig.vit_h_14()),
        "depth": (DPT, DPTConfig.dpt_hybrid()),
        "aesthetic_encoder": (CLIPVision, CLIPVisionConfig.vit_l_14()),
        "aesthetic_predictor": (AestheticPredictor, AestheticConfig.laion()),
    }


class Work(NamedTuple):
    """A traced program, and the bytes of its arguments on each device."""

    traced: Any
    argument_bytes: int


def sampling(args: argparse.Namespace, devices: list[Any]) -> Work:
    """The chosen program of a stage, placed on the devices."""
    if args.config not in ("stage1", "stage2"):
        raise SystemExit(f"--config={args.config}: --mode=sample compiles stage1 or stage2")
    recipe = Recipe.official(1 if args.config == "stage1" else 2)
    sizes = random_networks(recipe) if args.tiny else full_networks(recipe)
    dtype = jnp.dtype(args.dtype)
    networks = {name: abstract_network(*size, dtype=dtype, param_dtype=dtype) for name, size in sizes.items()}
    views = args.views_at_once or len(devices)
    mesh, chunking = make_device_mesh(recipe.num_views, devices), Chunking(views, views, args.split_guidance)
    programs = shared_programs(recipe, networks, chunking, mesh, spread_parameters=args.spread_parameters)
    if args.program not in programs:
        raise SystemExit(f"--program={args.program} is unknown; {args.config} has {', '.join(programs)}")
    return Work(programs[args.program].trace(), argument_bytes(programs[args.program]))


def training(args: argparse.Namespace, devices: list[Any]) -> Work:
    """The training step of a config, its batch as pictures."""
    data, mesh = args.training.data, make_mesh(args.training.mesh, devices)
    program, count = TrainProgram(args.training, mesh), data.batch_size
    views = (count, data.num_views, data.image_size, data.image_size)
    batch = {"views": ((*views, 4), jnp.uint8), "elevation_deg": ((count,), jnp.float32)}
    if data.coarse is not None:
        batch["coarse"] = (*views, 3), jnp.uint8
    specs = {name: jax.ShapeDtypeStruct(*spec) for name, spec in batch.items()}
    trees = (program.state, program.frozen, specs)
    shardings = (program.state_shardings, program.frozen_shardings, batch_shardings(mesh, specs))
    placed = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), trees, shardings)
    # Keys are opaque and tiny.
    numbers = [leaf for leaf in jax.tree.leaves(placed) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return Work(program.step.trace(*placed), device_bytes(numbers))


def described_devices(args: argparse.Namespace) -> list[Any]:
    """The chips of the slice, or the first of them. Raises `SystemExit` where there is no such slice or no compiler."""
    try:
        devices = list(topologies.get_topology_desc(args.topology, "tpu").devices)
    except RuntimeError as error:
        hint = 'pip install -e ".[tpu]"' if "not installed" in str(error) else "write it like v5e:4x4 or v5p:2x2x1"
        raise SystemExit(f"--topology={args.topology}: {error}; {hint}") from error
    count = args.devices or len(devices)
    if not 1 <= count <= len(devices):
        raise SystemExit(f"--devices={count}: {args.topology} has {len(devices)} chips")
    return devices[:count]


def seconds_of(args: argparse.Namespace, chip: Chip, devices: int, argument_bytes: int, flops: int) -> dict[str, Any]:
    """Floors of the time that a step takes, from the trace alone."""
    arithmetic, bus = flops / devices / chip.flops, argument_bytes / chip.bandwidth
    seconds = {"tflops": round(flops / 1e12, 2), "floor_seconds": round(max(arithmetic, bus), 4)}
    if args.mode == "train":
        rate = 0.4 * args.training.data.batch_size / arithmetic
        seconds["videos_per_second_at_40_percent"] = round(rate, 3)
    return seconds


def bytes_of(chip: Chip, argument_bytes: int, compiled: Any) -> dict[str, Any]:
    """What each device holds while the compiled program runs."""
    memory, total = compiled.memory_analysis(), argument_bytes + beside_arguments(compiled)
    sizes = {
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "total": total,
        "memory": chip.memory,
    }
    headroom = {"headroom_percent": round(100 * (1 - total / chip.memory), 1)}
    return {f"{name}_gib": round(size / 2**30, 3) for name, size in sizes.items()} | headroom


def training_config(name: str, changes: list[str]) -> TrainConfig:
    """The config as experiments/train.py would take it. Raises `SystemExit` for what it would refuse."""
    try:
        return train.parse([f"--config={name}", *changes])[0]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="stage1 or stage2; to train, any of experiments/configs")
    parser.add_argument("--mode", default="sample", choices=["sample", "train"])
    parser.add_argument("--topology", default="v5e:2x2", help="chip and slice: v5e:2x4, v5p:2x2x1, v6e:2x2, ...")
    parser.add_argument("--devices", type=int, help="use only so many chips of the slice (there is none of a single)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--program", default="denoise_step", help="another program of the stage: decode, depth, ...")
    parser.add_argument("--views-at-once", type=int, help="of encoders and the decoder; default: one per chip")
    parser.add_argument("--split-guidance", action="store_true", help="the U-Net for one half after the other")
    parser.add_argument("--spread-parameters", action="store_true", help="a part of each parameter on each chip")
    parser.add_argument(
        "--effort", type=float, default=-1.0, help="of the compiler's search for speed, -1 to 1; 0, its own, takes 5 x"
    )
    parser.add_argument("--trace-only", action="store_true", help="count arithmetic and arguments, compile nothing")
    parser.add_argument("--tiny", action="store_true", help="the smallest networks, to try the command")
    args, changes = parser.parse_known_args(arguments)
    if changes and args.mode != "train":
        parser.error(f"{changes[0]} is unknown; fields of a config can be changed for --mode=train")
    args.training = training_config(args.config, changes) if args.mode == "train" else None
    chip = args.topology.partition(":")[0]
    if chip not in CHIPS:
        parser.error(f"--topology={args.topology}: the chip {chip} is unknown; there are {', '.join(CHIPS)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    chip, devices = CHIPS[args.topology.partition(":")[0]], described_devices(args)
    start = time.perf_counter()
    try:
        work = {"sample": sampling, "train": training}[args.mode](args, devices)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    numbers = {"config": args.config, "mode": args.mode, "topology": args.topology, "devices": len(devices)}
    numbers |= seconds_of(args, chip, len(devices), work.argument_bytes, count_flops(work.traced.jaxpr))
    numbers["arguments_gib"] = round(work.argument_bytes / 2**30, 3)
    print(f"traced in {time.perf_counter() - start:.0f} s: {numbers['tflops']} TFLOP", file=sys.stderr)
    if not args.trace_only:
        start = time.perf_counter()
        try:
            compiled = work.traced.lower().compile({"exec_time_optimization_effort": args.effort})
        except jax.errors.JaxRuntimeError as error:
            print(f"{args.config} on {len(devices)} of {args.topology} does not compile: {error}", file=sys.stderr)
            return 1
        numbers |= bytes_of(chip, work.argument_bytes, compiled)
        numbers["compile_seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(numbers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
