"""Times the conversion of a full-size first_stage.pt: python experiments/benchmarks/convert.py [--folder /tmp]

The file has the names, shapes and dtype (fp16, about 5 GB) of the released one in torch's zip layout, with random
numbers, and is written without torch. Goal: at most 3 GB of memory besides the mapped file. Needs 12 GB of disk; both
the file and the model folder are deleted at the end.
"""

import argparse
import json
import pickle
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules; the converters are named from the repository's root.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from converters.rules import export
from converters.svd_unet import sgm_rules
from hi3d_jax.models.unet import UNetConfig
from hi3d_jax.pretrained import open_shards

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
COPY, ORIGINAL = "conditioner.embedders.3.encoder.", "first_stage_model."


def stage1_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of first_stage.pt."""
    shapes = json.loads((FIXTURES / "network_manifest.json").read_text())["stage1"]
    shapes |= json.loads((FIXTURES / "conditioner_manifest.json").read_text())
    shapes |= {COPY + key.removeprefix(ORIGINAL): s for key, s in shapes.items() if key.startswith(ORIGINAL)}
    return {key: tuple(s) for key, s in shapes.items() if not key.startswith("conditioner.embedders.2.")}


def random_halves(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Finite fp16 numbers of about 0.2 in size; the two autoencoders get the same ones, as in the released file."""
    seed = zlib.crc32(key.replace(COPY, ORIGINAL).encode())
    bits = np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)
    return (bits & np.uint16(0x83FF) | np.uint16(0x3000)).view(np.float16)


def _text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def _numbers(values: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(pickle.BININT + struct.pack("<i", value) for value in values) + pickle.TUPLE


def _tensor(storage: str, shape: tuple[int, ...]) -> bytes:
    """The opcodes with which torch describes a contiguous fp16 tensor."""
    numel = int(np.prod(shape, dtype=np.int64))
    strides = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
    number = pickle.BININT + struct.pack("<i", numel)
    kind = pickle.GLOBAL + b"torch\nHalfStorage\n"
    described = pickle.MARK + _text("storage") + kind + _text(storage) + _text("cpu") + number + pickle.TUPLE
    hooks = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = described + pickle.BINPERSID + pickle.BININT + struct.pack("<i", 0) + _numbers(shape)
    arguments = pickle.MARK + arguments + _numbers(strides) + pickle.NEWFALSE + hooks + pickle.TUPLE
    return pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE


def write_deepspeed_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """{"module": {"module.<key>": tensor}} as torch.save writes it."""
    items = b"".join(_text(f"module.{key}") + _tensor(str(i), shape) for i, (key, shape) in enumerate(shapes.items()))
    module = pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    data = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + _text("module") + module + pickle.SETITEM + pickle.STOP
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("first_stage/data.pkl", data)
        archive.writestr("first_stage/byteorder", "little")
        for i, (key, shape) in enumerate(shapes.items()):
            archive.writestr(f"first_stage/data/{i}", random_halves(key, shape).tobytes())


def differing(folder: Path, shapes: dict[str, tuple[int, ...]], count: int) -> Iterator[str]:
    """Of `count` U-Net tensors chosen at random, those that the model folder does not have bit for bit."""
    prefix = "model.diffusion_model."
    keys = [key for key in shapes if key.startswith(prefix)]
    back = export(open_shards(folder / "unet"), sgm_rules(UNetConfig.hi3d_stage1()))
    for key in np.random.default_rng(0).choice(keys, count, replace=False):
        if back[key.removeprefix(prefix)].tobytes() != random_halves(key, shapes[key]).tobytes():
            yield key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to write (12 GB)")
    options = parser.parse_args()
    shapes = stage1_shapes()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, model = Path(folder) / "first_stage.pt", Path(folder) / "model"
        start = time.perf_counter()
        write_deepspeed_checkpoint(source, shapes)
        size = source.stat().st_size
        print(f"wrote {len(shapes)} tensors, {size / 1e9:.2f} GB, in {time.perf_counter() - start:.0f} s")
        start = time.perf_counter()
        command = [sys.executable, str(ROOT / "converters" / "convert.py"), str(source), "-o", str(model)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(done.stdout)
        peak = usage.ru_maxrss * 1024
        print(f"converted in {seconds:.0f} s ({usage.ru_utime + usage.ru_stime:.0f} s of CPU)")
        print(f"peak resident memory {peak / 1e9:.2f} GB, {(peak - size) / 1e9:+.2f} GB against the mapped file")
        without = float(re.search(r"([\d.]+) GB without them", done.stdout)[1])
        assert without <= 3, f"{without} GB of memory besides the mapped file: the goal is 3"
        wrong = list(differing(model, shapes, 50))
        assert not wrong, f"not bit-equal: {wrong}"
        print("50 random U-Net tensors are bit-equal")


if __name__ == "__main__":
    main()
