"""What is written down of runs: experiments/training_log.py."""

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import training_log
from experiments.train import load_config
from hi3d_jax.data.records import OrbitRecord
from hi3d_jax.data.shards import write_records
from hi3d_jax.training.loop import store_config


@pytest.fixture
def sitting(tmp_path):
    """Makes a run with its data set, and the command that writes it down."""

    def make(name: str, objects: dict[str, str], *more: str) -> list[str]:
        run, dataset = tmp_path / name, tmp_path / f"{name}_orbits"
        config = load_config("autoencoder_tiny")
        run.mkdir()
        store_config(run, dataclasses.replace(config, folder=str(run), seed=7))
        lines = [{"split": "train", "step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in (10, 20)]
        lines[1]["seconds_per_step"] = 180.0
        lines.append({"split": "validation", "step": 20, "loss": 0.25, "psnr": 21.0})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        views = np.full((2, 8, 8, 4), 255, np.uint8)
        about = {"name": "a thing", "attribution": "somebody", "source": "somewhere"}
        records = [
            OrbitRecord(
                f"{key}/{orbit}", views, elevation_deg=0.0, about={**about, "object_id": key, "licence": licence}
            )
            for key, licence in objects.items()
            for orbit in range(2)
        ]
        write_records(dataset, records, {})
        return [str(run), "-o", str(tmp_path / "log"), "--dataset", str(dataset), "--machine", "an abacus", *more]

    return make


def write(monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["training_log.py", *arguments])
    training_log.main()


def test_a_log_goes_on_with_another_sitting(sitting, tmp_path, monkeypatch):
    write(monkeypatch, sitting("first", {"cup": "CC0-1.0", "chair": "MIT"}))
    log = tmp_path / "log"
    row = "| first | 20 | 16 views of 128² | 0.001 | 1.00 | 7 | 4 orbits | an abacus | loss 0.25, psnr 21 |"
    assert row in (log / "training_log.md").read_text().splitlines()
    before = np.asarray(Image.open(log / "training_log.png"))
    write(monkeypatch, sitting("second", {"chair": "MIT", "shoe": "MIT"}, "--append"))
    text = (log / "training_log.md").read_text()
    assert text.splitlines().index(row) + 1 == text.splitlines().index(row.replace("first", "second"))
    assert "3 objects. Licences: MIT 2, CC0-1.0 1" in text
    after = np.asarray(Image.open(log / "training_log.png"))
    np.testing.assert_array_equal(after[: len(before)], before)
    assert len(after) == 2 * len(before)
    assert (after[len(before) :] < 128).any()
    named = list(csv.DictReader((log / "attributions.csv").read_text().splitlines()))
    assert [line["object_id"] for line in named] == ["cup", "chair", "shoe"]


def test_a_log_with_other_columns_is_not_gone_on_with(sitting, tmp_path, monkeypatch):
    (tmp_path / "log").mkdir()
    (tmp_path / "log/training_log.md").write_text("| run | hours |\n| --- | --- |\n| old | 3 |\n")
    with pytest.raises(SystemExit, match="write a new log, without --append"):
        write(monkeypatch, sitting("run", {"cup": "MIT"}, "--append"))
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["training_log.md"]
