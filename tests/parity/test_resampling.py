"""Resizing against torch, and what holds for any resize."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filled import nchw

from hi3d_jax.models.resampling import resize_bicubic, resize_bilinear

SIZES = [(13, 9, 26, 18), (13, 9, 5, 20), (7, 7, 7, 7), (1, 4, 3, 1), (400, 6, 150, 6)]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_bilinear_agrees_with_torch(size, align_corners):
    images = np.random.default_rng(0).normal(size=(2, *size[:2], 3)).astype(np.float32)
    ours = resize_bilinear(jnp.asarray(images), *size[2:], align_corners=align_corners)
    theirs = F.interpolate(torch.tensor(nchw(images)), size[2:], mode="bilinear", align_corners=align_corners)
    np.testing.assert_allclose(nchw(ours), theirs, atol=2e-6)


@pytest.mark.parametrize("size", [(13, 9, 26, 18), (7, 5, 7, 5), (2, 3, 9, 4)])
def test_bicubic_agrees_with_torch_where_nothing_shrinks(size):
    images = np.random.default_rng(1).normal(size=(1, *size[:2], 2)).astype(np.float32)
    theirs = F.interpolate(torch.tensor(nchw(images)), size[2:], mode="bicubic", align_corners=True)
    np.testing.assert_allclose(nchw(resize_bicubic(jnp.asarray(images), *size[2:])), theirs, atol=5e-6)


def test_constants_stay_and_shrinking_removes_what_the_grid_cannot_hold():
    constant = jnp.full((1, 90, 70, 1), 0.7)
    for resized in (resize_bilinear(constant, 31, 17), resize_bicubic(constant, 31, 17)):
        np.testing.assert_allclose(resized, 0.7, atol=1e-6)
    stripes = jnp.broadcast_to(jnp.arange(96) % 2, (1, 96, 96))[..., None].astype(jnp.float32)
    inner = resize_bicubic(stripes, 24, 24)[:, 2:-2, 2:-2]
    np.testing.assert_allclose(inner, 0.5, atol=0.02)


def test_half_precision_images_stay_half_precision():
    images = jnp.ones((1, 4, 4, 1), jnp.bfloat16)
    assert resize_bilinear(images, 8, 8).dtype == jnp.bfloat16
