"""`hi3d evaluate` from the command line: tables, report, resuming, and what cannot be scored."""

import csv
import dataclasses
import functools
import json
import re
import sys

import numpy as np
import pytest
import trimesh

from experiments import evaluate as experiment
from hi3d_jax import cli
from hi3d_jax.data import normalise, render_orbit
from hi3d_jax.evaluation import EvaluationError, self_consistency, view_scores
from hi3d_jax.evaluation.baselines import copy_input, hull
from hi3d_jax.evaluation.results import Result
from hi3d_jax.evaluation.runs import score_all
from hi3d_jax.evaluation.scoring import Scored, to_size
from hi3d_jax.evaluation.tables import Row
from hi3d_jax.images import resize, write_png
from hi3d_jax.mesh import Mesh, write_mesh
from hi3d_jax.video import Orbit, write_orbit
from hi3d_jax.visual_hull import colours_at

# A name that would run a script where a report did not escape it.
HOSTILE = "<script>alert(1)<script>"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("HI3D_CACHE", "off")


def solid(shape) -> Mesh:
    vertices = shape.vertices.astype(np.float32)
    colours = (0.2 + 0.6 * (vertices - vertices.min(0)) / np.ptp(vertices, axis=0)).astype(np.float32)
    return normalise(Mesh(vertices, shape.faces.astype(np.int32), colours=colours))


@pytest.fixture(scope="module")
def meshes() -> dict[str, Mesh]:
    return {
        "cone": solid(trimesh.creation.cone(0.4, 0.9)),
        HOSTILE: solid(trimesh.creation.torus(0.4, 0.15)),
    }


@pytest.fixture(scope="module")
def orbits(meshes) -> dict[str, Orbit]:
    made = {}
    for name, mesh in meshes.items():
        renders, cameras = render_orbit(mesh, elevation_deg=30.0, width=48, light="unlit", supersample=3)
        made[name] = Orbit(renders.views, renders.alphas, cameras)
    return made


@pytest.fixture
def truth(tmp_path, meshes):
    folder = tmp_path / "truth"
    folder.mkdir()
    for name, mesh in meshes.items():
        write_mesh(folder / f"{name}.glb", mesh)
    return folder


def evaluate(*words) -> int:
    return cli.main(["evaluate", *map(str, words)])


def rows_of(folder):
    with (folder / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def test_views_of_several_seeds_make_tables_and_a_report(tmp_path, truth, orbits, capsys):
    generator = np.random.default_rng(0)
    for name, true in orbits.items():
        for seed, noise in ((0, 0.0), (1, 0.1)):
            views = np.clip(true.views + generator.normal(0, noise, true.views.shape), 0, 1).astype(np.float32)
            made = Orbit(views, np.ones_like(true.alphas), true.cameras)
            write_orbit(tmp_path / "results" / name / f"seed_{seed}", made)
    out = tmp_path / "out"
    assert evaluate("views", tmp_path / "results", truth, "-o", out, "--size", 48, "--metrics") == 0
    rows = rows_of(out)
    assert [(row["object"], row["seed"]) for row in rows] == [(n, s) for n in sorted(orbits) for s in "01"]
    # The truth is drawn anew from the GLB, whose colours and vertices went through the file.
    assert all(float(row["psnr"]) > 45 for row in rows[::2])
    assert all(18 < float(row["psnr"]) < 24 for row in rows[1::2])
    summary = json.loads((out / "scores.json").read_text())["summary"]["psnr"]
    assert summary["best"] > summary["mean"] > summary["low"]
    assert "| PSNR (dB) ↑ |" in capsys.readouterr().out
    report = (out / "report.html").read_text()
    assert HOSTILE not in report
    assert "&lt;script&gt;" in report
    assert not re.search(r"https?://|<script|<link|<iframe", report)
    assert report.count("data:image/jpeg;base64,") == 4


def test_meshes_are_scored_by_both_protocols_and_what_is_bad_does_not_stop_the_rest(tmp_path, truth, meshes, capsys):
    results = tmp_path / "results"
    results.mkdir()
    write_mesh(results / f"{HOSTILE}.ply", meshes[HOSTILE])
    far = dataclasses.replace(meshes["cone"], vertices=meshes["cone"].vertices + np.float32([9, 0, 0]))
    write_mesh(results / "cone.ply", far)
    for protocol, metric in (("syncdreamer", "chamfer"), ("strict", "f_score_01")):
        out = tmp_path / protocol
        assert evaluate("meshes", results, truth, "-o", out, "--protocol", protocol) == 2
        assert "1 of 2 could not be scored" in capsys.readouterr().err
        good, bad = rows_of(out)
        assert (good["object"], bad["object"]) == (HOSTILE, "cone")
        assert good[metric]
        assert "lies elsewhere" in bad["error"]
        assert bad[metric] == ""
        assert "lies elsewhere" in (out / "report.html").read_text()
    write_mesh(results / "cone.ply", meshes["cone"])
    assert evaluate("meshes", results, truth, "-o", out, "--protocol", "strict", "--resume") == 0
    assert all(float(row["f_score_01"]) > 0.99 for row in rows_of(out))


def test_a_run_is_scored_with_and_without_truth(tmp_path, truth, meshes, orbits):
    run = tmp_path / "cone"
    write_orbit(run, orbits["cone"])
    write_mesh(run / "mesh.glb", meshes["cone"])
    assert evaluate("asset", run, truth / "cone.glb", "-o", tmp_path / "a", "--size", 48, "--metrics") == 0
    [row] = rows_of(tmp_path / "a")
    assert float(row["chamfer"]) < 0.001
    assert float(row["psnr"]) > 45
    assert float(row["silhouette_iou"]) > 0.97
    assert row["watertight"] == "1"
    assert evaluate("asset", run, "-o", tmp_path / "b") == 0
    [row] = rows_of(tmp_path / "b")
    assert "psnr" not in row
    assert float(row["mesh_psnr"]) > 25


def test_consistent_views_agree_with_themselves_and_others_do_not(tmp_path, orbits, monkeypatch):
    good, coarse_hull = orbits["cone"], functools.partial(hull, resolution=48)

    def painted(views):
        mesh = coarse_hull(views)
        colours = colours_at(mesh.vertices, views.views, views.alphas, views.cameras)
        return dataclasses.replace(mesh, colours=colours)

    # Views of another object in every second place.
    mixed = dataclasses.replace(good, views=good.views.copy(), alphas=good.alphas.copy())
    mixed.views[1::2], mixed.alphas[1::2] = orbits[HOSTILE].views[1::2], orbits[HOSTILE].alphas[1::2]
    agreeing, contradicting = (self_consistency(views, painted) for views in (good, mixed))
    assert agreeing.scores["iou"] > contradicting.scores["iou"] + 0.2
    assert agreeing.scores["chamfer"] < contradicting.scores["chamfer"] / 2
    assert agreeing.scores["mesh_psnr"] > contradicting.scores["mesh_psnr"] + 3
    write_orbit(tmp_path / "cone", good)
    out = tmp_path / "out"
    monkeypatch.setattr("hi3d_jax.cli.evaluate.reconstruct_by", lambda way: coarse_hull)
    words = ("--protocol", "self-consistency", "--reconstruct-by", "hull")
    assert evaluate("views", tmp_path / "cone", "-o", out, *words) == 0
    assert float(rows_of(out)[0]["iou"]) == pytest.approx(agreeing.scores["iou"], abs=0.05)
    with pytest.raises(EvaluationError, match="4 views are too few"):
        self_consistency(Orbit(good.views[:4], good.alphas[:4], good.cameras[:4]), hull)


def test_copying_the_input_is_exact_only_where_it_looks(orbits):
    views = orbits["cone"].views
    copied = copy_input(views)
    np.testing.assert_array_equal(copied[7], views[0])
    assert copied.shape == views.shape


def test_baselines_are_made_scored_and_compared(tmp_path, truth, meshes, monkeypatch, capsys):
    (truth / f"{HOSTILE}.glb").unlink()
    (tmp_path / "results").mkdir()
    write_mesh(tmp_path / "results" / "cone.ply", meshes["cone"])
    monkeypatch.setattr("experiments.evaluate.hull", functools.partial(hull, resolution=48))
    for what, system, baselines in (
        ("meshes", True, ("hull", "silhouette", "floor")),
        ("views", False, ("copy_input",)),
    ):
        words = [what, str(truth), "-o", str(tmp_path / what), "--baselines", *baselines, "--size", "48", "--metrics"]
        words += ["--systems", f"exact={tmp_path / 'results'}"] if system else []
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        experiment.main()
        table = capsys.readouterr().out
        assert all(f"| {baseline} |" in table for baseline in baselines)
        assert table.strip() == (tmp_path / what / "comparison.md").read_text().strip()
        systems_found = json.loads((tmp_path / what / "comparison.json").read_text())["systems"]
        scores = {name: found["summary"] for name, found in systems_found.items()}
        if system:
            names = "exact", "floor", "hull", "silhouette"
            exact, floor, carved, cone = (scores[name]["chamfer"]["mean"] for name in names)
            assert exact < floor < carved < 0.05 < cone
        else:
            # The first view is the input itself.
            assert scores["copy_input"]["psnr"]["mean"] > scores["copy_input"]["psnr_without_first"]["mean"] > 10


def test_a_resumed_run_keeps_what_it_has_and_refuses_other_settings(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    results, calls = [Result(name, None, tmp_path / f"{name}.mp4") for name in ("a", "b")], []

    def score(result):
        calls.append(result.object_name)
        if result.object_name == "b" and len(calls) == 2:
            raise EvaluationError("not yet")
        return Scored(Row(result.object_name, None, {"psnr": float(len(calls))}))

    def run(size, resume=True):
        return score_all(results, score, tmp_path / "out", "t", {"size": size}, resume=resume, progress=False)

    assert [row.error is None for row in run(1, resume=False)] == [True, False]
    assert [row.scores["psnr"] for row in run(1)] == [1, 3]
    assert calls == ["a", "b", "b"]
    (tmp_path / "a.mp4").write_bytes(b"changed")
    assert [row.scores["psnr"] for row in run(1)] == [4, 3]
    with pytest.raises(EvaluationError, match="begun with size = 1, not 2"):
        run(2)
    with pytest.raises(EvaluationError, match="would be called a_b; rename"):
        score_all([Result("a b", None, tmp_path), Result("a_b", None, tmp_path)], score, tmp_path, "t", {})


def test_scores_that_are_no_numbers_are_errors(tmp_path):
    score = lambda result: Scored(Row("a", None, {"psnr": float("nan")}))  # noqa: E731
    [row] = score_all([Result("a", None, tmp_path)], score, tmp_path, "t", {}, progress=False)
    assert "psnr came out as NaN" in row.error


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("views", "RESULTS", "-o", "OUT"), "protocol syncdreamer needs a TRUTH"),
        (("meshes", "RESULTS", "-o", "OUT", "--protocol", "self-consistency"), "starts from views"),
        (("views", "RESULTS", "TRUTH", "-o", "OUT", "--protocol", "self-consistency"), "looks at no truth"),
        (("views", "RESULTS", "TRUTH", "-o", "OUT", "--metrics"), "fewer than the 256 .*--size 48"),
        (("views", "RESULTS", "TRUTH", "-o", "OUT", "--metrics", "--size", "48"), "15 views against 16 true ones: 1 m"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(tmp_path, capsys, orbits, words, complaint):
    (tmp_path / "results" / "cone").mkdir(parents=True)
    for index, view in enumerate(orbits["cone"].views[:15]):
        write_png(tmp_path / "results" / "cone" / f"{index:03d}.png", view)
    write_orbit(tmp_path / "truth" / "cone", orbits["cone"])
    places = {"RESULTS": tmp_path / "results", "TRUTH": tmp_path / "truth", "OUT": tmp_path / "out"}
    assert evaluate(*(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert re.search(complaint, error)
    assert len(error.strip().splitlines()) == 1


def test_smaller_views_can_be_enlarged_first(tmp_path, orbits):
    write_orbit(tmp_path / "truth" / "cone", orbits["cone"])
    views = np.stack([resize(view, 24, 24) for view in orbits["cone"].views])
    (tmp_path / "results" / "cone").mkdir(parents=True)
    for index, view in enumerate(views):
        write_png(tmp_path / "results" / "cone" / f"{index:03d}.png", view)
    words = ("--size", 48, "--metrics", "--upscaler", "bicubic")
    assert evaluate("views", tmp_path / "results", tmp_path / "truth", "-o", tmp_path / "out", *words) == 0
    [row] = rows_of(tmp_path / "out")
    doubled = np.repeat(np.repeat(views, 2, axis=1), 2, axis=2)
    assert float(row["psnr"]) > view_scores(doubled, orbits["cone"].views).psnr
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["upscaler"] == "bicubic"


def test_larger_views_are_reduced_by_area_means():
    views = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(to_size(views, 4, "views"), views.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)), atol=1e-6)
