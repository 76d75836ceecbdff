"""Times one U-Net forward next to diffusers with the same weights: python experiments/benchmarks/unet.py

The default is SVD's full size (1.5 billion parameters) at 16 views of 128 x 128 pixels: 16 x 16 latents; it needs 13 GB
of memory and about ten minutes on two cores. `--small` is a network of 70 million. Every measurement runs in a process
of its own, both sides fill their parameters with the same numbers made from the parameters' names, ours through the
converter's table, and the outputs are compared. Seconds are medians over `--repeats` after one warm-up. Peak memory is
the process's on CPU (weights included) and the allocator's on GPU. diffusers must be installed; on a GPU, torch must
see it for the comparison to be of one device.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules; the converters are named from the repository's root.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

SMALL_CHANNELS, SMALL_HEADS = (64, 128, 256, 256), (1, 2, 4, 4)


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 numbers that keep activations of ordinary size: ones and a tenth for norms, 1/sqrt(fan-in) for layers."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return noise / np.float32(np.sqrt(np.prod(shape[1:])))
    return np.float32(0.1) * noise + np.float32(name.endswith("weight"))


def random_inputs(args: argparse.Namespace) -> list[np.ndarray]:
    """x [b t h w 8], c_noise [b], the vector's three numbers [b 3], image_token [b 1 1024]."""
    rng = np.random.default_rng(0)
    shapes = (
        (args.batch, args.views, args.latents, args.latents, 8),
        (args.batch,),
        (args.batch, 3),
        (args.batch, 1, 1024),
    )
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def timed(call: Callable[[], object], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call on the wall and of all cores; `call` returns when its result is there."""
    call()
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def run_ours(args: argparse.Namespace) -> tuple[np.ndarray, dict]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from converters.rules import plan, plan_export
    from converters.svd_unet import diffusers_rules
    from hi3d_jax.models.embeddings import scalar_vector
    from hi3d_jax.models.unet import UNet, UNetConfig
    from hi3d_jax.pretrained import abstract_network, parameters, with_parameters

    sizes = {"block_channels": SMALL_CHANNELS, "num_heads": SMALL_HEADS} if args.small else {}
    config, dtype = UNetConfig(**sizes, attention_down_and_up_epsilon=1e-6), jnp.dtype(args.dtype)
    abstract = abstract_network(UNet, config, dtype=dtype, param_dtype=dtype)
    rules = diffusers_rules(config)
    weights = RandomWeights({key: s.shape for key, s in plan_export(parameters(abstract), rules).specs.items()})
    make = plan(weights, parameters(abstract), rules).make
    unet = with_parameters(abstract, lambda path, spec: jnp.asarray(make(path).astype(spec.dtype)))
    graphdef, params = nnx.split(unet)
    x, c_noise, numbers, token = (jnp.asarray(array) for array in random_inputs(args))
    inputs = params, x, c_noise, scalar_vector(numbers), token
    start, cpu_start = time.perf_counter(), time.process_time()
    forward = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs)).lower(*inputs).compile()
    compiling = {"compile": time.perf_counter() - start, "compile_cpu": time.process_time() - cpu_start}
    seconds = timed(lambda: jax.block_until_ready(forward(*inputs)), args.repeats)
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return np.asarray(forward(*inputs)), {**seconds, **compiling, "peak": peak, "device": str(device)}


class RandomWeights(dict):
    """Names to shapes, read as the random numbers of that name: one tensor in memory at a time."""

    def __getitem__(self, name: str) -> "LazyWeight":
        return LazyWeight(name, super().__getitem__(name))


class LazyWeight:
    """A tensor that is made when numpy asks for its numbers."""

    dtype = np.dtype(np.float32)

    def __init__(self, name: str, shape: tuple[int, ...]):
        self.name, self.shape, self.ndim = name, shape, len(shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return random_weight(self.name, self.shape)


def run_diffusers(args: argparse.Namespace) -> tuple[np.ndarray, dict]:
    # The U-Net needs no torchvision, and one built for another torch cannot even be imported.
    sys.modules.setdefault("torchvision", None)
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"block_out_channels": SMALL_CHANNELS, "num_attention_heads": SMALL_HEADS} if args.small else {}
    sizes = {"num_attention_heads": (5, 10, 20, 20), "cross_attention_dim": 1024, **sizes}
    x, c_noise, numbers, token = (torch.from_numpy(array).to(device) for array in random_inputs(args))
    inputs = [x.movedim(-1, 2).contiguous(), c_noise, token, numbers]
    with torch.device("meta"):
        model = diffusers.UNetSpatioTemporalConditionModel(**sizes).eval()
    # Its mix factors are made by a constructor that does not heed the context.
    model = model.to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*(array.to("meta") for array in inputs))
    dtype = getattr(torch, args.dtype)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(random_weight(name, tuple(parameter.shape))))
        # As in its pipelines: c_noise and the vector's numbers stay float32.
        inputs = [inputs[0].to(dtype), inputs[1], inputs[2].to(dtype), inputs[3]]

        def forward():
            out = model(*inputs).sample.float().cpu()
            return out.movedim(2, -1).numpy()

        seconds = timed(forward, args.repeats)
        out = forward()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return out, {**seconds, "peak": peak, "flops": counter.get_total_flops(), "device": device}


def measure(side: str, args: argparse.Namespace, folder: Path) -> tuple[np.ndarray, dict]:
    """Runs one side in a process of its own, at the precision of `args`."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--dtype", args.dtype]
    for name in ("batch", "views", "latents", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    subprocess.run([*command, *(["--small"] if args.small else [])], check=True)
    return np.load(folder / "out.npy"), json.loads((folder / "result.json").read_text())


def compare(args: argparse.Namespace) -> None:
    """Prints one table: both sides in float32 and bfloat16, errors relative to diffusers in float32."""
    print("| side | dtype | device | s, median (fastest) | CPU s | TFLOP/s | compile s (CPU s) | peak GiB | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    reference, flops = None, 0
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtypes:
            for side in ("diffusers", "ours"):
                args.dtype = dtype
                out, result = measure(side, args, Path(folder))
                reference = out if reference is None else reference
                flops = result.get("flops", flops)
                seconds, cpu_seconds = (statistics.median(result[name]) for name in ("seconds", "cpu_seconds"))
                error = np.abs(out - reference).max() / np.abs(reference).max()
                row = [side, dtype, result["device"], f"{seconds:.2f} ({min(result['seconds']):.2f})"]
                row += [f"{cpu_seconds:.2f}", f"{flops / seconds / 1e12:.3f}"]
                compiled = "compile" in result
                row += [f"{result['compile']:.1f} ({result['compile_cpu']:.1f})" if compiled else "-"]
                row += [f"{result['peak'] / 2**30:.2f}", f"{error:.1e}"]
                print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="channels (64, 128, 256, 256) instead of SVD's")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    for name, default in (("batch", 1), ("views", 16), ("latents", 16), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("side", "folder", "dtype"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is None:
        return compare(args)
    out, result = {"ours": run_ours, "diffusers": run_diffusers}[args.side](args)
    result["peak"] = result["peak"] or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.save(Path(args.folder) / "out.npy", out)
    (Path(args.folder) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
