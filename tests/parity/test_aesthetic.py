"""The aesthetic predictor against the official embedder's recorded numbers."""

import jax
import numpy as np
from filled import FIXTURES, filled, jitted, manifest, nchw, nhwc
from hashed import weight

from converters import aesthetic as table
from hi3d_jax.models.aesthetic import AestheticConfig, AestheticPredictor, aesthetic_input

STORED = np.load(FIXTURES / "aesthetic.npz")


def test_clip_sees_the_squeezed_and_cropped_frame():
    seen = jax.jit(aesthetic_input)(nhwc(STORED["u8"]).astype(np.float32) / 255 * 2 - 1)
    assert seen.shape == (2, 224, 224, 3)
    # Measured 6e-6 in values of +-2.
    np.testing.assert_allclose(nchw(seen)[:, :, ::4, ::4], STORED["clip_input"], atol=2e-5)


def test_scores_agree_and_ignore_the_embedding_length():
    shapes = manifest(table.SGM_PREFIX)
    weights = {key: weight(key, shape, "matrix" if len(shape) > 1 else "vector") for key, shape in shapes.items()}
    predictor = jitted(filled(AestheticPredictor, AestheticConfig.laion(), weights, table.RULES, table.IGNORE))
    scores = predictor(STORED["features"])
    np.testing.assert_allclose(scores, STORED["score"][:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(predictor(7 * STORED["features"]), scores, rtol=1e-5)
