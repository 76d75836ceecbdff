"""The paper's ablations from the command line: made object by object, resumed, scored, held against each other."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import trimesh

from experiments import ablations
from hi3d_jax.data import normalise
from hi3d_jax.evaluation.baselines import hull
from hi3d_jax.mesh import Mesh, write_mesh
from hi3d_jax.splatting import from_points, write_ply
from hi3d_jax.stages.checks import StageError
from hi3d_jax.stages.random_model import write_random_model
from hi3d_jax.stages.recipe import Recipe


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("HI3D_CACHE", "off")


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    for name, shape in (("ball", trimesh.creation.icosphere(2)), ("torus", trimesh.creation.torus(0.4, 0.15))):
        colours = np.full((len(shape.vertices), 3), 0.5, np.float32)
        mesh = Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32), colours=colours)
        write_mesh(folder / f"{name}.glb", normalise(mesh))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models: both stages, and a second stage without depth."""
    folder, common = tmp_path_factory.mktemp("models"), {"num_views": 2, "num_steps": 1}
    refined = dataclasses.replace(Recipe.paper(2), image_size=96, **common)
    write_random_model(folder / "both/stage1", dataclasses.replace(Recipe.paper(1), image_size=48, **common))
    write_random_model(folder / "both/stage2", refined)
    write_random_model(folder / "no_depth", dataclasses.replace(refined, concat=("coarse_latents",)))
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield folder
    jax.config.update("jax_disable_most_optimizations", before)
    ablations.stage.cache_clear()


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, words)])
    ablations.main()


def comparison(folder, protocol="syncdreamer") -> dict:
    return json.loads((folder / protocol / "comparison.json").read_text())["systems"]


def test_objects_are_chosen_evenly_and_more_contain_fewer():
    truths = {f"{number:02d}": None for number in range(25)}
    few, more, all_of_them = (ablations.chosen(truths, limit) for limit in (4, 7, None))
    assert few == ["00", "08", "16", "24"]
    assert set(few) < set(more) < set(all_of_them) == set(truths)
    assert ablations.chosen(truths, None, ["07", "03"]) == ["03", "07"]


def test_table_4_goes_on_where_it_stopped(monkeypatch, tmp_path, objects, capsys):
    """Hulls stand for meshes: the finer, the larger M."""
    made = []

    def finer_hull(orbit, folder, config, resume, progress, gaussians):
        assert gaussians is None
        made.append((folder.parent.name, config.num_interpolated))
        if folder.parent.name == "torus" and len(made) < 5:
            raise StageError("interrupted")
        folder.mkdir(parents=True)
        write_mesh(folder / "mesh.glb", hull(orbit, 20 + config.num_interpolated))

    monkeypatch.setattr(ablations, "reconstruct", finer_hull)
    monkeypatch.setattr(ablations, "RECONSTRUCTED_SIZE", 48)
    words = ("table4", objects, "-o", tmp_path / "out", "--num-interpolated", 0, 16)
    run(monkeypatch, *words)
    assert "torus, M=16: interrupted" in capsys.readouterr().err
    assert len(comparison(tmp_path / "out")["M=0"]["rows"]) == 1
    run(monkeypatch, *words)
    assert made == [("ball", 0), ("ball", 16), ("torus", 0), ("torus", 16), ("torus", 0), ("torus", 16)]
    found = comparison(tmp_path / "out")["M=0"]
    assert found["summary"]["iou"]["objects"] == 2
    difference = found["differences"]["chamfer"]
    assert (difference["objects"], difference["better"]) == (2, 0)
    assert difference["low"] > 0
    assert "f_score_01" in comparison(tmp_path / "out", "strict")["M=16"]["summary"]
    assert "data:image/jpeg" in (tmp_path / "out/strict/comparison.html").read_text()
    with pytest.raises(SystemExit, match=r"begun with elevation_deg = 20\.0, not 10\.0"):
        run(monkeypatch, *words, "--elevation-deg", 10)


def test_gaussians_are_fitted_once_for_all_values_of_m(monkeypatch, tmp_path):
    given, fitted = [], from_points(np.eye(3), np.ones((3, 3)))

    def reconstructed(orbit, folder, config, resume, progress, gaussians):
        given.append((config.num_interpolated, gaussians is not None))
        folder.mkdir(parents=True)
        (folder / "mesh.glb").touch()
        if config.num_interpolated:
            write_ply(folder / "splats.ply", fitted)

    monkeypatch.setattr(ablations, "reconstruct", reconstructed)
    monkeypatch.setattr(ablations.Results, "orbit", lambda self, name, seed: None)
    results = ablations.Results(ablations.Ablation("table4", tmp_path, tmp_path), {})
    for m in (0, 16, 32, 48):
        results.meshes(m, "ball")
    assert given == [(0, False), (16, False), (32, True), (48, True)]


def test_table_3_and_figure_6_on_models(monkeypatch, tmp_path, objects, models):
    common = (objects, "--model", models / "both", "--limit", 1, "--metrics", "--protocols", "syncdreamer")
    words = ("--without-depth", models / "no_depth", "--upscalers", "bicubic", "-o", tmp_path / "table3")
    run(monkeypatch, "table3", *common, *words)
    found = comparison(tmp_path / "table3")
    assert list(found) == ["refined", "without depth", "coarse, bicubic"]
    assert len({system["summary"]["psnr"]["mean"] for system in found.values()}) == 3
    assert all(row["error"] is None for system in found.values() for row in system["rows"])

    # True views, halved, are nearer to the truth than anything that random numbers draw.
    run(monkeypatch, "table3", *common, *words[:4], "--views", "true", "-o", tmp_path / "true")
    true = comparison(tmp_path / "true")
    assert true["coarse, bicubic"]["summary"]["psnr"]["mean"] > true["refined"]["summary"]["psnr"]["mean"] + 10

    run(monkeypatch, "figure6", *common, "--seeds", 0, 3, "-o", tmp_path / "figure6")
    seeds = comparison(tmp_path / "figure6")["seeds"]
    assert [row["seed"] for row in seeds["rows"]] == [0, 3]
    assert seeds["summary"]["psnr"]["best"] > seeds["summary"]["psnr"]["mean"]
    # Seed 0 of any ablation is the same.
    assert seeds["rows"][0]["scores"] == pytest.approx(found["refined"]["rows"][0]["scores"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("table3",), "give a folder that holds one with --model"),
        (("figure6",), "give one with --model"),
        (("table4", "--views", "generated"), "no stage 1 to generate views with"),
        (("table4", "--split", "val"), "no manifest.jsonl"),
        (("table4", "--ids", "torus", "mug"), "no objects mug; names are like ball"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, tmp_path, objects, words, complaint):
    with pytest.raises(SystemExit, match=complaint):
        run(monkeypatch, words[0], objects, "-o", tmp_path / "out", *words[1:])
    assert not (tmp_path / "out").exists()
