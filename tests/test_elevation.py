"""The elevation that a model fits best, with true views of the toy rocket in place of drawn ones."""

import dataclasses
import json

import numpy as np
import pytest

from hi3d_jax import cameras
from hi3d_jax.data import example_mesh, render_orbit
from hi3d_jax.stages import elevation, pipeline
from hi3d_jax.stages.checks import StageError
from hi3d_jax.stages.elevation import (
    candidate_elevations,
    estimate_elevation,
    read_estimate,
    silhouette_agreement,
    write_estimate,
)
from hi3d_jax.stages.orbit_files import recipe_cameras
from hi3d_jax.stages.pipeline import Hi3DPipeline, Options
from hi3d_jax.stages.random_model import write_random_model
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.video import Orbit

RECIPE = dataclasses.replace(Recipe.paper(1), num_views=8, image_size=96)


@pytest.fixture(scope="module")
def rocket():
    """Views of a slightly tilted rocket by elevation, bytes on white."""
    mesh, made = example_mesh(), {}
    tilt = np.radians(35)
    turn = np.array([[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]], np.float32)
    mesh = dataclasses.replace(mesh, vertices=mesh.vertices @ turn.T)
    for degrees in candidate_elevations(RECIPE):
        renders, _ = render_orbit(
            mesh, azimuths_deg=[45.0 * view for view in range(8)], elevation_deg=degrees, width=96, supersample=1
        )
        made[degrees] = np.round(255 * renders.views).astype(np.uint8)
    return made


@pytest.mark.parametrize("true", [0.0, 20.0])
@pytest.mark.parametrize("draws", ["what the picture shows", "what it was told"])
def test_the_true_elevation_is_preferred(rocket, true, draws):
    """Whether a model trusts the picture more than the number it is told, or the number more than the picture."""

    def draw(told, steps):
        assert steps == round(0.3 * RECIPE.num_steps)
        return rocket[true] if draws == "what the picture shows" else np.append(rocket[true][:1], rocket[told][1:], 0)

    estimate = estimate_elevation(RECIPE, draw, progress=False)
    assert estimate.candidates_deg == (-10, 0, 10, 20, 30, 40)
    assert abs(estimate.elevation_deg - true) <= 5
    assert np.argmax(estimate.agreements) == estimate.candidates_deg.index(true)
    assert max(estimate.agreements) > 0.97


def test_agreement_is_how_much_of_the_masks_their_hull_fills():
    """Discs, one of them moved aside, against all points of space that project into all masks."""
    rig = recipe_cameras(RECIPE, 10.0)
    x, y = np.meshgrid(np.arange(96) + 0.5, np.arange(96) + 0.5)
    discs = np.tile((np.hypot(x - 48, y - 48) < 24).astype(np.float32), (8, 1, 1))
    moved = np.concatenate([np.roll(discs[:1], 12, axis=2), discs[1:]])
    axis = np.linspace(-0.4, 0.4, 100, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    pixels = np.clip(np.floor(cameras.project(points, rig)[0]), 0, 95).astype(int)

    def filled(masks):
        inside = np.all([mask[p[:, 1], p[:, 0]] > 0 for mask, p in zip(masks, pixels, strict=True)], axis=0)
        hull = np.zeros_like(masks)
        for view, p in zip(hull, pixels, strict=True):
            view[p[inside, 1], p[inside, 0]] = 1
        return np.mean(hull.sum((1, 2)) / masks.sum((1, 2)))

    agreement = {name: silhouette_agreement(orbit_of(masks, rig)) for name, masks in (("d", discs), ("m", moved))}
    assert filled(discs) > 0.97 < agreement["d"]
    assert filled(moved) < 0.95
    assert agreement["m"] == pytest.approx(filled(moved), abs=0.03)
    # What no solid can cast, and what shows nothing.
    elsewhere = (np.hypot(x - 6, y - 6) < 5).astype(np.float32)[None]
    assert silhouette_agreement(orbit_of(np.concatenate([elsewhere, discs[1:]]), rig)) == 0
    assert silhouette_agreement(orbit_of(np.append(discs[:-1], np.zeros_like(discs[:1]), 0), rig)) == 0


def orbit_of(masks, rig):
    return Orbit(np.ones((*masks.shape, 3), np.float32), masks, rig)


def test_candidates_are_what_the_model_was_trained_on():
    assert candidate_elevations(Recipe.official(1)) == [-10, 0, 10, 20, 30, 40]
    assert candidate_elevations(dataclasses.replace(RECIPE, elevation_range_deg=(5.0, 5.0))) == [5, 5]
    assert candidate_elevations(dataclasses.replace(RECIPE, elevation_range_deg=(0.0, 45.0))) == [
        0,
        11.25,
        22.5,
        33.75,
        45,
    ]


def test_views_that_show_nothing_are_said_to():
    with pytest.raises(StageError, match=r"elevation: the views .* show no object, .*; give --elevation-deg"):
        estimate_elevation(RECIPE, lambda told, steps: np.full((8, 96, 96, 3), 255, np.uint8), progress=False)


def test_a_run_estimates_once_and_keeps_it(rocket, tmp_path, monkeypatch):
    """The pipeline asks for each candidate with few steps, draws with the estimate, and asks no more on resuming."""
    write_random_model(tmp_path / "model", RECIPE)
    generator = Hi3DPipeline.from_pretrained(tmp_path / "model")
    drawn = []

    def multiview(model, image, *, elevation_deg, num_steps, **others):
        drawn.append((elevation_deg, num_steps))
        return rocket[20.0]

    monkeypatch.setattr(pipeline, "multiview", multiview)
    picture = rocket[20.0][0].astype(np.float32) / 255
    options = Options(resume=True, progress=False)
    (variant,) = generator(picture, tmp_path / "out", elevation_deg="auto", num_steps=10, options=options)
    assert drawn[:-1] == [(degrees, 4) for degrees in (-10, 0, 10, 20, 30, 40)]
    assert drawn[-1][0] == pytest.approx(20, abs=5)
    np.testing.assert_allclose(cameras.elevations_deg(variant.orbit.cameras), drawn[-1][0], atol=1e-3)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["elevation_deg"] == "auto"
    assert run["results"]["elevation"]["elevation_deg"] == drawn[-1][0]
    assert len(run["results"]["elevation"]["agreements"]) == 6
    drawn.clear()
    generator(picture, tmp_path / "out", elevation_deg="auto", num_steps=10, options=options)
    assert drawn == []
    assert json.loads((tmp_path / "out/run.json").read_text())["results"] == run["results"]


def test_a_kept_estimate_comes_back_or_is_said_to_be_damaged(tmp_path):
    estimate = elevation.ElevationEstimate(17.0, (10.0, 20.0), (0.5, 0.75))
    write_estimate(tmp_path / "elevation.json", estimate)
    assert read_estimate(tmp_path / "elevation.json") == estimate
    (tmp_path / "elevation.json").write_text('{"elevation_deg": 1')
    with pytest.raises(StageError, match=r"elevation.json is damaged .* delete it and continue"):
        read_estimate(tmp_path / "elevation.json")
