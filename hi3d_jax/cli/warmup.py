"""`hi3d warmup`: compiles what a run would compile, so that the first run starts at once."""

from __future__ import annotations

import dataclasses
import os
import time

from hi3d_jax.cli.models import Dtype, Model, chosen_dtype
from hi3d_jax.cli.output import OutputError


@dataclasses.dataclass(frozen=True)
class Warmup:
    """Compile a model's programs for this machine into the cache, before they are needed.

    Takes minutes for full-size models and needs neither their weights in memory nor an image. Compiled again is only
    what changed: another model size, device, precision or version of JAX.

    examples:
      hi3d warmup
      hi3d warmup --model models/hi3d
      hi3d warmup --model models/hi3d --dtype float32
    """

    model: Model = "tiny"
    """The small model in the package, a model folder, one with stage1/ and stage2/, or a Hugging Face repository."""
    dtype: Dtype = "auto"
    """What networks compute in; auto: float32 on CPU, else bfloat16. Must be what the runs will use."""

    def run(self) -> None:
        if os.environ.get("HI3D_CACHE") == "off" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            raise OutputError("HI3D_CACHE=off keeps no compiled programs, so there is nothing to warm up; unset it")
        from hi3d_jax.pretrained import stage_folders
        from hi3d_jax.stages.memory import gigabytes, program_bytes
        from hi3d_jax.stages.model import StageModel

        for folder in stage_folders(self.model):
            model = StageModel(folder, dtype=chosen_dtype(self.dtype))
            for name, program in model.programs.items():
                start = time.perf_counter()
                held = gigabytes(program_bytes(program, program.lower().compile()))
                print(f"{model.name}, {name}: {time.perf_counter() - start:.1f} s, will hold {held}", flush=True)
