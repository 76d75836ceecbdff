"""Sinusoidal embeddings against the official ones' recorded numbers, and their convention spelled out."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hi3d_jax.models.embeddings import aesthetic_vector, scalar_vector, sinusoidal_embedding

STORED = np.load(Path(__file__).parent / "fixtures" / "embeddings.npz")


@pytest.mark.parametrize(
    ("values", "expected"),
    [("elevation_deg", "elevation_emb"), ("cond_aug", "cond_aug_emb"), ("nd_in", "nd_emb")],
)
def test_vectors_of_scalars(values, expected):
    scalars = jnp.asarray(STORED[values]).reshape(len(STORED[values]), -1)
    # The angles reach 40 radians, whose float32 spacing is 4e-6.
    np.testing.assert_allclose(scalar_vector(scalars), STORED[expected], atol=1e-5)


@pytest.mark.parametrize("name", ["c_noise", "frame"])
def test_embeddings_inside_the_unet(name):
    values = STORED["c_noise" if name == "c_noise" else "frame_index"]
    np.testing.assert_allclose(sinusoidal_embedding(jnp.asarray(values), 320), STORED[f"{name}_emb_320"], atol=2e-6)


def test_aesthetic_vector():
    made = aesthetic_vector(jnp.asarray(STORED["aes_score"][:, 0]))
    # The angles reach 600 radians, where one step of float32 is 6e-5: measured 5.5e-5.
    np.testing.assert_allclose(made, STORED["aes_emb"], atol=1e-4)
    np.testing.assert_array_equal(made[:, 0], STORED["aes_score"][:, 0])
    np.testing.assert_array_equal(made[:, -1], 0)


def test_cosines_come_first_and_odd_dimensions_end_in_zero():
    made = np.asarray(sinusoidal_embedding(jnp.array([[0.5], [2.0]]), 5))
    slow = 10_000**-0.5
    for row, value in enumerate((0.5, 2.0)):
        expected = [np.cos(value), np.cos(value * slow), np.sin(value), np.sin(value * slow), 0]
        np.testing.assert_allclose(made[row, 0], expected, atol=1e-6)


def test_whole_degrees_may_be_integers():
    degrees = jnp.array([[-10], [40]])
    np.testing.assert_array_equal(scalar_vector(degrees), scalar_vector(degrees.astype(jnp.float32)))
