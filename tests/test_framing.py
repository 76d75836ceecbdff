"""How input images are brought to the network's size: the official code's pixels, and the object's size in them."""

from pathlib import Path

import numpy as np
import pytest

from hi3d_jax import images
from hi3d_jax.stages.framing import frame_image, opencv_bilinear, resize_view, to_network
from hi3d_jax.stages.recipe import Recipe

STORED = np.load(Path(__file__).parent / "fixtures" / "preprocess.npz")
OFFICIAL = Recipe.from_dict({"name": "official", "stage": 1, "image_size": 64})
PAPER = Recipe.from_dict({"name": "paper", "stage": 1, "image_size": 64})


@pytest.mark.parametrize("name", ["wide", "tall_up"])
def test_pixels_are_those_of_the_official_pipelines(name):
    cut = STORED[f"{name}_rgba"].astype(np.float32) / 255
    np.testing.assert_array_equal(frame_image(cut, OFFICIAL), STORED[f"{name}_stage1_u8"])
    white = images.to_bytes(images.over_white(cut))
    np.testing.assert_array_equal(resize_view(white, 64, 64, OFFICIAL), STORED[f"{name}_stage2_u8"])


def test_halving_is_a_mean_of_four():
    """As cv2 does it, checked against opencv-python-headless 5.0.0 when this was written."""
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    four = np.stack([image[i::2, j::2].astype(int) for i in (0, 1) for j in (0, 1)]).sum(0)
    np.testing.assert_array_equal(opencv_bilinear(image, 3, 4), (four + 2) // 4)


@pytest.mark.parametrize(("height", "width"), [(40, 33), (300, 200)])
def test_the_object_comes_to_the_size_that_training_showed(height, width):
    cut = np.zeros((height, width, 4), np.float32)
    middle = height // 2
    cut[middle - 5 : middle + 5, 20:25, 3] = 1
    seen = frame_image(cut, PAPER)
    assert seen.shape == (64, 64, 3)
    rows = np.flatnonzero((seen < 128).any((1, 2)))
    assert abs(len(rows) - PAPER.foreground_ratio * 64) <= 2
    assert abs(rows.mean() - 31.5) <= 1
    kept = frame_image(cut, PAPER, keep_framing=True)
    assert abs((kept < 128).any((1, 2)).sum() - 10 * 64 / width) <= 2


def test_network_range():
    np.testing.assert_array_equal(to_network(np.array([[[0, 255, 51]]], np.uint8)), [[[-1, 1, np.float32(-0.6)]]])
