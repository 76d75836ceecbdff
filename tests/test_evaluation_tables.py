import csv
import io
import json

import numpy as np
import pytest

from hi3d_jax.evaluation.tables import (
    Row,
    as_csv,
    as_json,
    as_markdown,
    bootstrap_interval,
    comparison_cells,
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
    assert text[2].startswith("| ours | **25.50** (22.00 to 29.00) | **0.2000**")
    assert text[3].startswith("| a/b | 11.00")
    assert "**" not in text[3]
