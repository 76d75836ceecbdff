"""Kills without warning in the middle of a whole run; experiments/benchmarks/kill_generate.py does one in each step."""

import json

import numpy as np

from experiments.benchmarks.kill_generate import digest, finish, write_random_stages


def test_a_killed_run_ends_with_the_mesh_of_an_undisturbed_one(tmp_path):
    """While sampling stage 1, and before the fitted surface gets its name."""
    write_random_stages(tmp_path / "model", (1,))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(undisturbed, tmp_path / "model", None)
    sampling, writing = ("stage 1", "sampling"), ("surface", 1)
    finish(killed, tmp_path / "model", None, sampling)
    with np.load(killed / "generated/sampling.npz") as kept:
        assert kept["done"] == 2
    finish(killed, tmp_path / "model", None, writing)
    assert not (killed / "surface.npz").exists()
    assert list(killed.glob(".surface.*.part.npz"))
    steps = json.loads((killed / "run.json").read_text())["steps"]
    assert [name for name, step in steps.items() if step["finished"]] == ["views", "splats", "interpolated"]
    finish(killed, tmp_path / "model", None)
    assert digest(killed) == digest(undisturbed)
