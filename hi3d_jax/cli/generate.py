"""`hi3d generate`: images become textured meshes (all three stages)."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from hi3d_jax.cli.models import ByRecipe, Dtype, MemoryBudget, Model, open_pipeline
from hi3d_jax.cli.output import Output, OutputError, explained, prepare_output
from hi3d_jax.cli.reconstruct import ByQuality

REPORT_FILE = "report.json"


@dataclasses.dataclass(frozen=True)
class Generate:
    """Turn images of objects into textured meshes (all three stages of the paper).

    IMAGE is a still picture of one object, upright, not cut off at the border; a folder stands for the pictures in it.
    Several images are done one after the other, each in a folder of its own name; one that fails does not stop the
    others, and report.json tells at the end what became of each.

    examples:
      hi3d generate photo.png -o out --model models/hi3d
      hi3d generate photo.png -o out --model models/hi3d --elevation-deg 20 --quality draft
      hi3d generate photos/ -o meshes --model models/hi3d          # meshes/NAME/mesh.glb for each picture
      hi3d generate photo.png -o out --model models/hi3d --resume  # after Ctrl-C or a full disk

    FOLDER will hold mesh.glb, contact_sheet.png (look at this first) and turntable.mp4, with all that `hi3d
    reconstruct` writes; generated/ holds what `hi3d views` and `hi3d refine` write.
    """

    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE [IMAGE ...]")]
    """PNG, JPEG, WebP, TIFF or BMP of any size and colour mode, or folders of them."""
    output: Output
    """New folder for the results."""
    model: Model = "tiny"
    """Folder with stage1/ and perhaps stage2/ in it, or one model folder, or a Hugging Face repository (owner/name)."""
    elevation_deg: float = 0.0
    """How far above the horizon the pictures were taken, in degrees."""
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

    def run(self) -> None:
        images = pictures(self.images)
        prepare_output(self.output, self.resume, images[0])
        from hi3d_jax.stages.image_to_3d import ImageTo3D

        generator = ImageTo3D(open_pipeline(self.model, self.dtype, self.memory_budget, self.num_devices))
        if len(images) == 1:
            self._one(generator, images[0], self.output)
        else:
            self._many(generator, images)

    def _one(self, generator: Any, image: Path, folder: Path) -> list[str]:
        """Makes the meshes of one image in `folder` and returns their files."""
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
        files = []
        for number, asset in enumerate(assets):
            files.append(str((folder if len(assets) == 1 else folder / f"variant_{number}") / "mesh.glb"))
            scores, report = asset.reconstruction.scores, asset.reconstruction.report
            print(
                f"{files[-1]}: {report.faces} faces, {'watertight' if report.watertight else 'not watertight'}; "
                f"against the generated views silhouette IoU {scores.silhouette_iou:.3f}, PSNR {scores.psnr:.1f} dB"
            )
        return files

    def _many(self, generator: Any, images: Sequence[Path]) -> None:
        """Each image in a folder of its name. Raises `OutputError` at the end if any failed."""
        from hi3d_jax.atomic import written_aside

        rows = []
        for number, image in enumerate(images, 1):
            print(f"[{number} of {len(images)}] {image}", file=sys.stderr)
            started, row = time.perf_counter(), {"image": str(image)}
            try:
                row["meshes"] = self._one(generator, image, self.output / image.stem)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                row["error"] = explained(error) or f"{type(error).__name__}: {error}"
                print(f"hi3d: {image}: {row['error']}", file=sys.stderr)
            rows.append({**row, "seconds": round(time.perf_counter() - started, 1)})
            with written_aside(self.output / REPORT_FILE) as aside:
                aside.write_text(json.dumps(rows, indent=1) + "\n")
        if failed := [row["image"] for row in rows if "error" in row]:
            raise OutputError(
                f"{len(failed)} of {len(rows)} images failed ({', '.join(failed)}); {self.output / REPORT_FILE} says "
                "why, and --resume tries them again"
            )


def pictures(sources: Sequence[Path]) -> list[Path]:
    """The pictures that `sources` name, folders opened. Raises `OutputError` where two would share a folder."""
    from hi3d_jax.video import PICTURE_SUFFIXES

    found: list[Path] = []
    for source in sources:
        if "://" in str(source) or str(source).startswith(("http:/", "https:/")):
            raise OutputError(f"{source} is an address; download the picture first and give its file")
        if source.is_dir():
            inside = sorted(path for path in source.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
            if not inside:
                raise OutputError(f"{source} holds no pictures ({' '.join(PICTURE_SUFFIXES)})")
            found += inside
        else:
            found.append(source)
    by_name: dict[str, Path] = {}
    for path in found:
        if path.stem in by_name:
            raise OutputError(f"{by_name[path.stem]} and {path} would both be written to {path.stem}/; rename one")
        by_name[path.stem] = path
    return found
