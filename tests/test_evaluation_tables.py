import csv
import io
import json

import numpy as np
import pytest

from hi3d_jax.evaluation.comparison import comparison_cells, differences, seed_cells, write_comparison
from hi3d_jax.evaluation.tables import (
    Row,
    as_csv,
    as_json,
    as_markdown,
    bootstrap_interval,
    summarise,
    summary_cells,
)

ROWS = [
    Row("chair", 0, {"psnr": 20.0, "lpips_vgg": 0.3}),
    Row("chair", 1, {"psnr": 24.0, "lpips_vgg": 0.1}),
    Row("mug", 0, {"psnr": 30.0, "lpips_vgg": 0.2}),
    Row("mug", 1, {"psnr": 28.0, "lpips_vgg": 0.2}, notes=("open",)),
    Row("=cmd()", 0, {}, error="no faces"),
]


def test_seeds_are_averaged_first_the_best_is_chosen_by_the_metric():
    psnr, lpips = (summarise(ROWS)[name] for name in ("psnr", "lpips_vgg"))
    assert (psnr.mean, psnr.best, psnr.objects) == (25.5, 27.0, 2)
    assert psnr.spread == pytest.approx((np.sqrt(8) + np.sqrt(2)) / 2)
    assert (lpips.mean, lpips.best) == (pytest.approx(0.2), pytest.approx(0.15))
    one_seed = summarise(ROWS[::2])["psnr"]
    assert one_seed.best is None
    assert one_seed.spread is None


def test_the_interval_of_many_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error * 4)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error * 4)
    assert bootstrap_interval(np.full(5, 0.7)) == (pytest.approx(0.7), pytest.approx(0.7))


def test_one_object_has_no_interval():
    summary = summarise(ROWS[:1])["psnr"]
    assert (summary.low, summary.high) == (None, None)
    assert summary_cells(summarise(ROWS[:1]))[1][:3] == ["PSNR (dB) ↑", "20.00", ""]


def test_tables_hold_every_row_and_no_formulas():
    lines = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    assert [line["object"] for line in lines] == ["chair", "chair", "mug", "mug", "'=cmd()"]
    assert (lines[1]["psnr"], lines[3]["notes"], lines[4]["psnr"], lines[4]["error"]) == ("24", "open", "", "no faces")
    document = json.loads(as_json(ROWS, {"protocol": "strict"}))
    assert document["protocol"] == "strict"
    assert document["summary"]["psnr"]["mean"] == 25.5
    assert len(document["rows"]) == 5


def test_the_better_system_is_marked_whichever_way_is_better():
    worse = [Row("chair", None, {"psnr": 10.0, "lpips_vgg": 0.9}), Row("mug", None, {"psnr": 12.0, "lpips_vgg": 0.9})]
    text = as_markdown(comparison_cells({"ours": ROWS, "a|b": worse})).splitlines()
    assert text[2].startswith("| ours | 2 | **25.50** (22.00 to 29.00) | **0.2000**")
    assert text[3].startswith("| a/b | 2 | 11.00")
    assert "**" not in text[3]


def test_systems_are_held_against_each_other_object_by_object():
    """Objects differ by 10 dB, systems by 1: the difference is certain where the means are not."""
    psnr = np.linspace(10, 40, 8)
    reference = [Row(f"o{k}", None, {"psnr": value}) for k, value in enumerate(psnr)]
    better = [Row(f"o{k}", None, {"psnr": value + 1 + 0.1 * (-1) ** k}) for k, value in enumerate(psnr[:6])]
    found = differences([*better, Row("only here", None, {"psnr": 90.0})], reference)["psnr"]
    assert (found.objects, found.better) == (6, 6)
    assert found.mean == pytest.approx(1.0)
    assert 0.9 <= found.low < found.mean < found.high <= 1.1
    assert differences([Row("elsewhere", 0, {"psnr": 1.0})], reference) == {}
    closer = differences([Row("o0", 0, {"psnr": 10.0}), Row("o0", 1, {"psnr": 6.0})], reference)["psnr"]
    assert (closer.mean, closer.low, closer.better) == (-2.0, None, 0)


def test_a_comparison_is_written_for_readers_and_for_programs(tmp_path):
    (tmp_path / "<b>/objects").mkdir(parents=True)
    (tmp_path / "<b>/objects/chair@views.jpg").write_bytes(b"picture")
    systems = {"ours": ROWS, "<b>": [Row("chair", None, {"psnr": 10.0, "lpips_vgg": 0.9})]}
    text = write_comparison(tmp_path, "t", {"protocol": "strict"}, systems, "ours")
    assert "| <b> - ours | -12.00 (0 of 1) | +0.7000 (0 of 1) |" in text
    assert seed_cells(systems)[1:] == [
        ["ours", "PSNR (dB) ↑", "25.50", "27.00", "2.12"],
        ["ours", "LPIPS vgg ↓", "0.2000", "0.1500", "0.0707"],
    ]
    assert text == (tmp_path / "comparison.md").read_text()
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert document["systems"]["<b>"]["differences"]["psnr"]["mean"] == -12
    lines = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [(line["system"], line["metric"], line["difference"]) for line in lines][2] == ("<b>", "psnr", "-12")
    report = (tmp_path / "comparison.html").read_text()
    assert "<b>" not in report
    assert "cGljdHVyZQ==" in report  # the picture itself
