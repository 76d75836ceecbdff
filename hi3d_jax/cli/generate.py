"""`hi3d generate`: images become textured meshes (all three stages)."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from hi3d_jax.cli.compiled_programs import keep_compiled_programs, let_go_of_programs
from hi3d_jax.cli.models import ByRecipe, Dtype, Elevation, MemoryBudget, Model, open_pipeline
from hi3d_jax.cli.output import Output, OutputError, explained, prepare_output
from hi3d_jax.cli.reconstruct import ByQuality

if TYPE_CHECKING:
    from hi3d_jax.stages.image_to_3d import ImageTo3D

REPORT_FILE = "report.json"
# Where the picture of a prompt is kept in a run's folder.
TEXT_FOLDER = "text"


@dataclasses.dataclass(frozen=True)
class Generate:
    """Turn images of objects into textured meshes (all three stages of the paper).

    IMAGE is a still picture of one object, upright, not cut off at the border; a folder stands for the pictures in it.
    Several images are done one after the other, or on several machines, each in a folder of its own name; one that
    fails does not stop the others, and report.json tells at the end what became of each.

    examples:
      hi3d generate photo.png -o out                               # with the small model in the package
      hi3d generate photo.png -o out --model models/hi3d --elevation-deg auto --variants 3
      hi3d generate photos/ -o meshes --quality draft              # meshes/NAME/mesh.glb for each picture
      hi3d generate photos/ -o meshes --runner ray --ray-address auto
      hi3d generate --prompt "a red armchair" --text-model stabilityai/sdxl-turbo -o out
      hi3d generate photo.png -o out --resume                      # after Ctrl-C or a full disk

    FOLDER will hold mesh.glb, contact_sheet.png (look at this first) and turntable.mp4, with all that `hi3d
    reconstruct` writes; generated/ holds what `hi3d views` and `hi3d refine` write, text/ the picture of a prompt.
    """

    output: Output
    """New folder for the results."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")] = ()
    """PNG, JPEG, WebP, TIFF or BMP of any size and colour mode, or folders of them."""
    model: Model = "tiny"
    """The small model in the package, a folder with stage1/ and perhaps stage2/ in it, or a Hugging Face repository."""
    prompt: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """In place of an image: what to make, in words, which --text-model draws first (extra `text`)."""
    text_model: Annotated[str | None, arg(metavar="FOLDER|HUB_ID", help_behavior_hint="")] = None
    """Text-to-image pipeline of diffusers that draws the prompt; only safetensors files are read."""
    elevation_deg: Elevation = 0.0
    """How far above the horizon the pictures were taken, in degrees; auto: the elevation that the model fits best."""
    seed: int = 0
    """The same seed gives the same meshes on the same machine."""
    num_variants: Annotated[int, arg(aliases=["--variants"])] = 1
    """How many meshes to make of each image; variant k of a seed is the same however many are made."""
    num_steps: ByRecipe = None
    """Sampling steps of stages 1 and 2: fewer are faster and coarser."""
    quality: Literal["draft", "standard", "full"] = "standard"
    """Of stage 3. draft: a first look on a laptop; standard: more detail, minutes on a CPU; full: for a GPU."""
    faces: ByQuality = None
    """Triangles of the mesh, about."""
    texture_size: ByQuality = None
    """Width and height of the texture in pixels."""
    matting: Literal["auto", "alpha", "key", "rembg"] = "auto"
    """How the object is cut out: the file's alpha, keying a plain background, rembg; auto: the first that fits."""
    keep_framing: FlagCreatePairsOff[bool] = False
    """Leave the object where it is in the picture, even where the model prefers it in the middle at a certain size."""
    dtype: Dtype = "auto"
    """What networks compute in; auto: float32 on CPU, else bfloat16."""
    memory_budget: MemoryBudget = None
    """The most memory that stages 1 and 2 may hold on each device, like 12GB, or auto: nine tenths of all there is."""
    num_devices: int = 1
    """Devices that share each orbit; they must divide its views, or twice their number."""
    resume: FlagCreatePairsOff[bool] = False
    """Continue the run that FOLDER holds after its last finished step."""
    runner: Literal["here", "ray"] = "here"
    """Where several images are done: here, one after the other, or by Ray's workers on many machines, which must see
    the same files (extra `ray`)."""
    ray_address: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="(default: this machine alone)")] = (
        None
    )
    """Of a running Ray cluster; auto: the one this machine belongs to."""
    cpus_per_image: int = 2
    """CPUs that an image claims of a machine, with --runner ray; also a GPU, where the cluster has any."""

    def run(self) -> None:
        if self.prompt is not None:
            self._of_prompt()
            return
        if self.text_model is not None:
            raise OutputError("--text-model draws the words of --prompt, and there are none; give --prompt TEXT")
        if not self.images:
            raise OutputError("there is nothing to make a mesh of; give an IMAGE, or --prompt TEXT")
        images = pictures(self.images)
        prepare_output(self.output, self.resume, images[0])
        if len(images) == 1 and self.runner == "here":
            self.one(self.open(), images[0], self.output)
        else:
            self._many(images)

    def open(self) -> ImageTo3D:
        """All stages of the model."""
        from hi3d_jax.stages.image_to_3d import ImageTo3D

        return ImageTo3D(open_pipeline(self.model, self.dtype, self.memory_budget, self.num_devices))

    def one(self, generator: ImageTo3D, image: Path, folder: Path) -> list[dict[str, Any]]:
        """Makes the meshes of one image in `folder`, prints a line about each and returns what the report says."""
        from hi3d_jax.stages.pipeline import Options
        from hi3d_jax.stages.presets import ReconstructConfig

        chosen = {"num_faces": self.faces, "texture_size": self.texture_size}
        given = {name: value for name, value in chosen.items() if value is not None}
        assets = generator(
            image,
            folder,
            elevation_deg=self.elevation_deg,
            num_variants=self.num_variants,
            num_steps=self.num_steps,
            matting=self.matting,
            keep_framing=self.keep_framing,
            config=ReconstructConfig.preset(self.quality, seed=self.seed, **given),
            options=Options(resume=self.resume),
        )
        meshes = []
        for number, asset in enumerate(assets):
            file = str((folder if len(assets) == 1 else folder / f"variant_{number}") / "mesh.glb")
            scores, report = asset.reconstruction.scores, asset.reconstruction.report
            print(
                f"{file}: {report.faces} faces, {'watertight' if report.watertight else 'not watertight'}; "
                f"against the generated views silhouette IoU {scores.silhouette_iou:.3f}, PSNR {scores.psnr:.1f} dB"
            )
            about = {"faces": report.faces, "watertight": report.watertight}
            meshes.append({"file": file, **about, "silhouette_iou": scores.silhouette_iou, "psnr": scores.psnr})
        return meshes

    def _of_prompt(self) -> None:
        if self.images:
            raise OutputError("an image and a prompt were given; give one of the two")
        if self.text_model is None:
            raise OutputError(
                "--prompt needs --text-model, a text-to-image pipeline of diffusers: a folder, or the id of a Hugging "
                "Face repository such as stabilityai/sdxl-turbo"
            )
        prepare_output(self.output, self.resume)
        generator = self.open()
        from hi3d_jax.stages.text import picture_of

        folder = self.output / TEXT_FOLDER
        drawn = picture_of(self.prompt, self.text_model, folder, seed=self.seed, resume=self.resume)
        self.one(generator, drawn, self.output)

    def _many(self, images: Sequence[Path]) -> None:
        """Each image in a folder of its name. Raises `OutputError` at the end if any failed."""
        from hi3d_jax.atomic import written_aside

        rows: dict[Path, dict[str, Any]] = {}
        for image, row in self._rows_by_ray(images) if self.runner == "ray" else self._rows(images):
            rows[image] = row
            print(f"[{len(rows)} of {len(images)}] {image}: {row.get('error', 'done')}", file=sys.stderr)
            with written_aside(self.output / REPORT_FILE) as aside:
                aside.write_text(json.dumps([rows[each] for each in images if each in rows], indent=1) + "\n")
        if failed := [str(image) for image in images if "error" in rows[image]]:
            raise OutputError(
                f"{len(failed)} of {len(rows)} images failed ({', '.join(failed)}); {self.output / REPORT_FILE} says "
                "why, and --resume tries them again"
            )

    def _rows(self, images: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
        generator = self.open()
        for image in images:
            yield image, report_row(self, generator, image, self.output / image.stem)

    def _rows_by_ray(self, images: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
        from hi3d_jax.cluster import run_on_ray
        from hi3d_jax.pretrained import read_networks, stage_folders

        for folder in stage_folders(self.model):
            # Better one error now than one for each image.
            read_networks(folder)
        command = dataclasses.replace(self, model=_seen_from_anywhere(self.model))
        work = {image: (command, image.resolve(), self.output.resolve() / image.stem) for image in images}
        yield from run_on_ray(
            row_by_worker,
            work,
            address=self.ray_address,
            cpus=self.cpus_per_image,
            use_gpu=True,
            died=lambda image, error: {"image": str(image), "error": f"{type(error).__name__}: {error}"},
        )


def report_row(command: Generate, generator: ImageTo3D, image: Path, folder: Path) -> dict[str, Any]:
    """What became of one image, as report.json says it."""
    started, row = time.perf_counter(), {"image": str(image)}
    try:
        row["meshes"] = command.one(generator, image, folder)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        row["error"] = explained(error) or f"{type(error).__name__}: {error}"
    let_go_of_programs()
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def row_by_worker(command: Generate, image: Path, folder: Path) -> dict[str, Any]:
    """`report_row` in a process that Ray started, which keeps its model for the next image."""
    keep_compiled_programs()
    model = command.model, command.dtype, command.memory_budget, command.num_devices
    if model not in _OPENED:
        _OPENED.clear()
        _OPENED[model] = command.open()
    # What a dead worker began is gone on with.
    return report_row(dataclasses.replace(command, resume=True), _OPENED[model], image, folder)


_OPENED: dict[tuple, ImageTo3D] = {}


def _seen_from_anywhere(model: str) -> str:
    """The model's folder with its whole path: workers may stand elsewhere."""
    from hi3d_jax.pretrained import PACKAGED

    return str(Path(model).resolve()) if model not in PACKAGED and Path(model).is_dir() else model


def pictures(sources: Sequence[Path]) -> list[Path]:
    """The pictures that `sources` name, folders opened. Raises `OutputError` where two would share a folder."""
    from hi3d_jax.video import PICTURE_SUFFIXES

    found: list[Path] = []
    for source in sources:
        if "://" in str(source) or str(source).startswith(("http:/", "https:/")):
            address = re.sub(":/+", "://", str(source), count=1)
            raise OutputError(f"{address} is an address; download the picture first and give its file")
        if source.is_dir():
            inside = sorted(
                path
                for path in source.iterdir()
                if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
            )
            if not inside:
                raise OutputError(f"{source} holds no pictures ({' '.join(PICTURE_SUFFIXES)})")
            found += inside
        else:
            found.append(source)
    by_name: dict[str, Path] = {}
    for path in found:
        # Some file systems do not tell capitals from small letters.
        other = by_name.setdefault(path.stem.casefold(), path)
        if other is not path:
            raise OutputError(f"{other} and {path} would both be written to {path.stem}/; rename one")
    return found
