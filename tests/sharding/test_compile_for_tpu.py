"""Programs compile for TPUs that are not there, and what each device holds is told."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "experiments" / "compile_for_tpu.py"), "--tiny", "--config=stage1"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
def test_a_tiny_program_compiles_for_chips_that_are_not_there():
    made = run("--program=image_token", "--topology=v6e:2x2", "--devices=2")
    assert made.returncode == 0, made.stderr
    numbers = json.loads(made.stdout)
    assert (numbers["devices"], numbers["memory_gib"]) == (2, 31.25)
    assert 0 < numbers["total_gib"] < 1
    assert numbers["headroom_percent"] > 95
    refused = run("--devices=5")
    assert refused.returncode != 0
    assert "v5e:2x2 has 4 chips" in refused.stderr


def test_chips_that_are_not_known_are_refused():
    refused = run("--topology=v3:2x2")
    assert refused.returncode != 0
    assert "the chip v3 is unknown; there are v5e, v5p, v6e" in refused.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
def test_a_training_step_takes_the_changes_that_training_takes():
    tiny = ("--config=autoencoder_tiny", "--mode=train", "--trace-only", "--data.image-size=64", "--task.crop=32")
    changed = ("--mesh.data=1", "--mesh.fsdp=4", "--data.batch-size=16")
    whole, spread = (json.loads(run(*tiny, *changes).stdout) for changes in ((), changed))
    # Parameters, two moments and their average: a quarter of each on each of four chips.
    assert spread["arguments_gib"] < 0.3 * whole["arguments_gib"]
    # Twice the orbits are twice the work.
    rate = "videos_per_second_at_40_percent"
    assert spread[rate] == pytest.approx(whole[rate], rel=1e-5)
    assert spread["tflops"] > whole["tflops"] > 0
    refused = run(*tiny, "--data.batch-size=6")
    assert refused.returncode == 1
    assert "make the batch larger" in refused.stderr


def test_fields_are_only_changed_for_training():
    refused = run("--data.batch-size=6")
    assert refused.returncode != 0
    assert "--mode=train" in refused.stderr
