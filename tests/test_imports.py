"""The layering of the package (imports run one way), and its size limits, read off the syntax trees."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hi3d_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each part may import the parts named here (and itself). Parts in one layer do not know each other.
BASE = {"atomic", "cameras", "cluster", "images", "video", "visual_hull"}
NETWORKS_AND_GEOMETRY = {"models", "diffusion", "splatting", "neus", "mesh", "stereo"}
ALLOWED = {
    "atomic": set(),
    "cameras": {"atomic"},
    "cluster": set(),
    "images": {"atomic", "cameras"},
    "video": {"atomic", "cameras", "images"},
    "visual_hull": {"cameras", "images"},
    "models": BASE,
    "pretrained": BASE | {"models"},
    "diffusion": BASE,
    "splatting": BASE,
    "neus": BASE,
    "mesh": BASE,
    "stereo": BASE,
    "evaluation": BASE | {"mesh", "models", "pretrained"},
    "stages": BASE | NETWORKS_AND_GEOMETRY | {"pretrained", "evaluation"},
    "data": BASE | NETWORKS_AND_GEOMETRY | {"stages"},
    "training": BASE | NETWORKS_AND_GEOMETRY | {"pretrained", "stages", "data"},
    "cli": BASE | NETWORKS_AND_GEOMETRY | {"pretrained", "stages", "data", "evaluation"},
    "__init__": BASE | NETWORKS_AND_GEOMETRY | {"pretrained", "stages", "data", "evaluation"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            assert top not in ("experiments", "converters", "tests"), f"{path} imports {name}"
            if top == "hi3d_jax" and rest:
                parts.add(rest.split(".")[0])
    return parts


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} has no place in the layering of this test: give it one"
    assert imported_parts(path) - {part} <= ALLOWED[part]


@pytest.mark.parametrize("path", sorted(p for p in ROOT.rglob("*.py") if ".venv" not in p.parts), ids=lambda p: str(p))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_the_package_touches_no_device_and_no_torch():
    program = (
        "import sys, hi3d_jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was initialised'\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
