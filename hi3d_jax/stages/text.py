"""From words to a picture of an object (paper section 5.5), by a text-to-image pipeline of diffusers.

Nothing that comes with a model is executed: weights are read from safetensors files only, and pipelines that bring code
of their own are refused.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hi3d_jax.images import over_white, read_image, write_png
from hi3d_jax.stages.run_record import RunRecord
from hi3d_jax.stages.steps import Steps

PICTURE_FILE = "picture.png"
# What makes a picture of it one that can be cut out and turned around.
ADDITION = "a single object, whole, centred, plain white background"
PACKAGES = ("diffusers", "torch", "transformers")


class TextError(ValueError):
    """Words that cannot become a picture here; the text says why and the remedy."""


def picture_of(
    prompt: str, source: str, output: str | Path, *, seed: int = 0, resume: bool = False, progress: bool = True
) -> Path:
    """Draws `prompt` and returns the file, picture.png in the new folder `output`; run.json beside it says how.

    `source` is a folder as diffusers writes it or the id of a Hugging Face repository. With `resume`, what `output`
    holds already is not drawn again. Raises `TextError`, `StageError`, `RunError`, and `OSError` for the disk.
    """
    if not prompt.strip():
        raise TextError("the prompt is empty; say what to make")
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise TextError(
            f"a prompt needs a text-to-image model, and {', '.join(missing)} is not installed: pip install "
            '"hi3d_jax[text]"'
        )
    request = {"prompt": prompt, "addition": ADDITION, "text_model": source, "seed": seed}
    record = RunRecord.begin(Path(output), request, resume)
    draw = functools.partial(draw_text, f"{prompt}, {ADDITION}", source, seed, progress)
    Steps(record, progress).take("text", PICTURE_FILE, draw, write_png, lambda path: over_white(read_image(path)))
    return Path(output) / PICTURE_FILE


def draw_text(prompt: str, source: str, seed: int = 0, progress: bool = True) -> Float[np.ndarray, "h w 3"]:
    """The picture in [0, 1] that the pipeline `source` draws, with its own number of steps. Raises `TextError`."""
    import torch

    pipeline = _open(source)
    pipeline.set_progress_bar_config(desc="text", disable=None if progress else True)
    drawn = pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed)).images[0]
    return np.asarray(drawn.convert("RGB"), np.float32) / 255


def _open(source: str) -> Any:
    import diffusers
    import torch

    gpu = torch.cuda.is_available()
    try:
        # Without use_safetensors, files that are unpickled would do.
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
            source, use_safetensors=True, torch_dtype=torch.float16 if gpu else torch.float32
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TextError(
            f"{source} is no text-to-image pipeline of diffusers that can be opened ({type(error).__name__}: {error}); "
            "give a folder with model_index.json and safetensors files, or the id of such a repository"
        ) from error
    return pipeline.to("cuda" if gpu else "cpu")
