"""`hi3d doctor`: what this machine has, what is installed, which models are found and how long they would take."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

PACKAGES = ("hi3d_jax", "jax", "jaxlib", "flax", "numpy", "trimesh")
# What an extra brings -> how to get it.
EXTRAS = {
    "rembg": ("cutting out busy backgrounds", "matting"),
    "huggingface_hub": ("model folders by their id on the Hugging Face hub", "hub"),
    "grain": ("training", "train"),
    "diffusers": ("meshes from a prompt (with torch and transformers)", "text"),
    "ray": ("rendering data sets and many pictures on several machines", "ray"),
}
# Floating-point operations of the full-size networks for one asset, 25 steps with guidance (multiply-add = 2): counted
# on SVD's U-Net with Hi3D's input sizes.
PETAFLOP = {"stage 1, 16 views of 512 pixels": 1.06, "stage 2, 16 views of 1024 pixels": 5.49}
# Side of the matrices whose product is timed: large enough for any device to run at its rate.
PROBE_SIDE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Tell what this machine has, which weights and extras are found, and how long models would take at least.

    examples:
      hi3d doctor
      hi3d doctor models/hi3d models/stage2     # also looks into model folders
    """

    models: Annotated[Positional[tuple[Path, ...]], arg(metavar="MODEL_FOLDER")] = ()
    """Model folders to look into, beside the models in the package."""

    def run(self) -> None:
        for title, lines in (
            ("Versions", _versions()),
            ("Machine", _machine()),
            ("Devices", _devices()),
            ("Extras", _extras()),
            ("Caches", _caches()),
            ("Models", _models(self.models)),
            ("Speed", _speed(self.models)),
        ):
            print(title)
            for line in lines:
                print(f"  {line}")


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()}"
    for package in PACKAGES:
        yield f"{package} {importlib.metadata.version(package)}"


def _machine() -> Iterator[str]:
    yield f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(name) / 1e9 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        yield f"memory {total:.1f} GB, {free:.1f} GB of it unused"
    yield f"disk {shutil.disk_usage('.').free / 1e9:.0f} GB free in {Path.cwd()}"


def _devices() -> Iterator[str]:
    import jax

    for device in jax.devices():
        # The CPU has no figures of its own: its memory is the machine's.
        stats = device.memory_stats() or {}
        memory = f", {stats['bytes_limit'] / 1e9:.1f} GB for JAX" if "bytes_limit" in stats else ""
        yield f"{device.platform} {device.id}: {device.device_kind}{memory}"


def _extras() -> Iterator[str]:
    for package, (purpose, extra) in EXTRAS.items():
        if importlib.util.find_spec(package):
            yield f"{package} {importlib.metadata.version(package)}: {purpose}"
        else:
            yield f'{package} is missing: {purpose} needs pip install "hi3d_jax[{extra}]"'


def _caches() -> Iterator[str]:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        yield "compiled programs are not kept (HI3D_CACHE=off)"
        return
    files = [entry for entry in Path(folder).rglob("*") if entry.is_file()]
    size = sum(entry.stat().st_size for entry in files)
    yield f"compiled programs: {folder}, {len(files)} files, {size / 1e6:.0f} MB"


def _models(sources: tuple[Path, ...]) -> Iterator[str]:
    from hi3d_jax.pretrained import PACKAGED, PretrainedError, stage_folders

    for source in (*PACKAGED, *sources):
        try:
            for folder in stage_folders(source):
                yield f"{source}: {_contents(folder)}"
        except PretrainedError as error:
            yield f"{source}: {error}"


def _contents(folder: Path) -> str:
    """The networks of a model folder with the sizes of their weights, and whether a stage's fit each other."""
    from hi3d_jax.pretrained import PretrainedError, check_weights, read_config, read_networks, weights_folder
    from hi3d_jax.stages.recipe import Recipe

    networks, words = read_networks(folder), []
    for name in networks:
        try:
            check_weights(folder, [name])
        except PretrainedError as error:
            words.append(f"{name} unusable ({' '.join(str(error).split())})")
            continue
        size = sum(file.stat().st_size for file in weights_folder(folder, name).glob("*.safetensors"))
        shared = read_config(folder)["networks"][name].get("weights")
        words.append(f"{name} {size / 1e6:.1f} MB" + (f" (is {shared})" if shared else ""))
    if not read_config(folder).get("recipe"):
        return ", ".join(words) or "no networks"
    recipe = Recipe.of(folder)
    size = f"{recipe.num_views} views of {recipe.image_size} x {recipe.image_size}"
    return f"stage {recipe.stage}, {recipe.name} recipe, {size}: {', '.join(words)}"


def _speed(sources: tuple[Path, ...]) -> Iterator[str]:
    import jax
    import jax.numpy as jnp

    platform_name = jax.default_backend()
    # CPUs compute in float32 here; the others have units for bfloat16.
    dtype = jnp.float32 if platform_name == "cpu" else jnp.bfloat16
    rate = matmul_rate(PROBE_SIDE.get(platform_name, 1024), dtype)
    yield f"matrix products, {jnp.dtype(dtype).name}: {rate / 1e12:.2f} TFLOP/s; at that rate at least"
    for name, flops in _work(sources):
        yield f"{name}: {duration(flops / rate)} ({flops / 1e12:.2g} TFLOP)"
    for name, petaflop in PETAFLOP.items():
        yield f"{name}, full size: {duration(petaflop * 1e15 / rate)} ({petaflop * 1e3:.0f} TFLOP)"


def _work(sources: tuple[Path, ...]) -> Iterator[tuple[str, float]]:
    """The stages that are found, and the floating-point operations of one orbit: sampling and decoding."""
    from hi3d_jax.models.flops import count_flops
    from hi3d_jax.pretrained import PACKAGED, PretrainedError, stage_folders
    from hi3d_jax.stages.model import StageModel
    from hi3d_jax.stages.recipe import RecipeError

    for source in (*PACKAGED, *sources):
        # What is wrong with a model was said above.
        with contextlib.suppress(PretrainedError, RecipeError):
            for folder in stage_folders(source):
                model = StageModel(folder)
                step, decode = (count_flops(model.programs[name].trace().jaxpr) for name in ("denoise_step", "decode"))
                count, size = model.recipe.num_views, model.recipe.image_size
                flops = model.recipe.num_steps * step + count * decode
                yield f"{source}, {model.name}, {count} views of {size} pixels", float(flops)


def matmul_rate(side: int, dtype: object) -> float:
    """Floating-point operations per second of a product of square matrices: the best of five."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
