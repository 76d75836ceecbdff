"""What counts as a result, which truth belongs to it, and how other systems' files become orbits."""

import json
import re

import numpy as np
import pytest

from hi3d_jax.cameras import orbit
from hi3d_jax.evaluation import EvaluationError
from hi3d_jax.evaluation.importers import read_views
from hi3d_jax.evaluation.results import find_results, find_truths, pair_up
from hi3d_jax.images import ImageError, write_png
from hi3d_jax.video import Orbit, write_mp4, write_orbit


def views(count=16, size=16):
    """Views that differ: grey levels, with a mark in the top left corner."""
    made = np.linspace(0.2, 0.8, count, dtype=np.float32)[:, None, None, None] * np.ones((1, size, size, 3), np.float32)
    made[:, :4, :4, 0] = 1
    return made


def pictures(folder, made):
    folder.mkdir(parents=True)
    for index, view in enumerate(made):
        write_png(folder / f"{index:03d}.png", view)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_orbits_of_other_systems_come_out_alike(tmp_path):
    made = views()
    pictures(tmp_path / "ours" / "cup", made)
    write_orbit(tmp_path / "posed" / "cup", Orbit(made, np.ones((16, 16, 16), np.float32), orbit(width=16)))
    row = made.transpose(1, 0, 2, 3).reshape(16, 256, 3)
    grid = made.reshape(4, 4, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(64, 64, 3)
    (tmp_path / "syncdreamer" / "cup").mkdir(parents=True)
    write_png(tmp_path / "syncdreamer" / "cup" / "0.png", row)
    write_png(tmp_path / "syncdreamer" / "cup" / "1.png", grid)
    for folder, layout, count in (("ours", "hi3d", 1), ("posed", "hi3d", 1), ("syncdreamer", "syncdreamer", 2)):
        results = find_results(tmp_path / folder, "views", layout)
        assert [(r.object_name, r.seed) for r in results] == [("cup", s if count > 1 else None) for s in range(count)]
        for result in results:
            found = read_views(result.path, layout)
            np.testing.assert_allclose(found.views, made, atol=1 / 255)
            np.testing.assert_allclose(found.azimuths_deg, np.arange(16) * 22.5)
    assert read_views(tmp_path / "posed" / "cup").cameras.width == 16
    turned = read_views(tmp_path / "ours" / "cup", reverse=True).views
    np.testing.assert_allclose(turned[[0, 1, 15]], made[[0, 15, 1]], atol=1 / 255)


def test_videos_of_other_systems_come_out_with_the_input_first(tmp_path):
    sv3d, official = views(21, 32), views(18, 32)
    (tmp_path / "sv3d" / "cup").mkdir(parents=True)
    write_mp4(tmp_path / "sv3d" / "cup" / "000000.mp4", np.roll(sv3d, -1, axis=0))
    (tmp_path / "official" / "cup" / "first_step").mkdir(parents=True)
    write_mp4(tmp_path / "official" / "cup" / "first_step" / "first.mp4", official)
    [result] = find_results(tmp_path / "sv3d", "views", "sv3d")
    assert result.seed == 0
    found = read_views(result.path, "sv3d")
    np.testing.assert_allclose(found.azimuths_deg[1], 360 / 21)
    np.testing.assert_allclose(found.views.mean((1, 2, 3)), sv3d.mean((1, 2, 3)), atol=0.02)
    [result] = find_results(tmp_path / "official", "views", "hi3d-official")
    found = read_views(result.path, "hi3d-official")
    np.testing.assert_allclose(found.views.mean((1, 2, 3)), official[2:].mean((1, 2, 3)), atol=0.02)


def test_seeds_and_single_results_find_their_truths(tmp_path):
    for seed in (0, 3):
        touch(tmp_path / "results" / "cup" / f"seed_{seed}" / "mesh.glb")
    touch(tmp_path / "results" / "jug.glb")
    for name in ("cup", "jug"):
        touch(tmp_path / "truth" / f"{name}.glb")
    pairs = pair_up(tmp_path / "results", tmp_path / "truth", "meshes")
    assert [(p.object_name, p.seed, p.truth.name) for p in pairs] == [
        ("cup", 0, "cup.glb"),
        ("cup", 3, "cup.glb"),
        ("jug", None, "jug.glb"),
    ]
    [alone] = pair_up(tmp_path / "results" / "jug.glb", tmp_path / "truth" / "cup.glb", "meshes")
    assert (alone.object_name, alone.truth.name) == ("cup", "cup.glb")


def test_a_manifest_chooses_a_split_and_stays_in_its_folder(tmp_path):
    lines = [{"id": "cup", "file": "a.glb", "split": "val"}, {"id": "jug", "file": "b.glb", "split": "train"}]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert find_truths(tmp_path, "val") == {"cup": tmp_path.resolve() / "a.glb"}
    with pytest.raises(EvaluationError, match="no objects of the split 'test'; it has train, val"):
        find_truths(tmp_path, "test")
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"id": "cup", "file": "../../etc/a.glb"}))
    with pytest.raises(EvaluationError, match="lie outside"):
        find_truths(tmp_path)


def test_what_has_no_partner_is_named(tmp_path):
    for name in ("cup", "jug", "pot"):
        touch(tmp_path / "truth" / f"{name}.glb")
    touch(tmp_path / "results" / "cup.glb")
    touch(tmp_path / "results" / "jug.glb")
    with pytest.raises(EvaluationError, match=r"1 of 3 objects .* no result .*: pot; add them, .*--allow-missing"):
        pair_up(tmp_path / "results", tmp_path / "truth", "meshes")
    assert len(pair_up(tmp_path / "results", tmp_path / "truth", "meshes", allow_missing=True)) == 2
    touch(tmp_path / "results" / "vase.glb")
    with pytest.raises(EvaluationError, match=r"1 objects .* no truth .*: vase; .* which are cup, jug, pot"):
        pair_up(tmp_path / "results", tmp_path / "truth", "meshes")


def test_empty_and_strange_folders_are_refused(tmp_path):
    for kind, expected in (("views", "a folder of pictures"), ("meshes", "mesh.glb"), ("asset", "mesh.glb")):
        with pytest.raises(EvaluationError, match=f"holds no {kind} to score; expected .*{expected}"):
            find_results(tmp_path, kind)
    with pytest.raises(EvaluationError, match="holds no truths"):
        find_truths(tmp_path)
    with pytest.raises(EvaluationError, match="does not exist"):
        find_results(tmp_path / "nowhere", "views")
    touch(tmp_path / "both" / "cup.glb")
    touch(tmp_path / "both" / "cup.obj")
    with pytest.raises(EvaluationError, match="several results of one name: cup"):
        find_results(tmp_path / "both", "meshes")


def test_files_of_another_shape_are_refused(tmp_path):
    write_png(tmp_path / "odd.png", np.zeros((64, 96, 3), np.float32))
    with pytest.raises(EvaluationError, match=re.escape("96 x 64 pixels, neither a row of 16 square views nor")):
        read_views(tmp_path / "odd.png", "syncdreamer")
    write_mp4(tmp_path / "short.mp4", views(5, 32))
    with pytest.raises(EvaluationError, match="has 5 frames, SV3D makes 21"):
        read_views(tmp_path / "short.mp4", "sv3d")
    with pytest.raises(EvaluationError, match="has 5 frames"):
        read_views(tmp_path / "short.mp4", "hi3d-official")
    pictures(tmp_path / "cup", views(3))
    write_png(tmp_path / "cup" / "003.png", np.zeros((32, 32, 3), np.float32))
    with pytest.raises(ImageError, match=r"003.png is 32 x 32 pixels and the first view 16 x 16"):
        read_views(tmp_path / "cup")
