"""JPEG's losses without its bit stream: the quantisation that the degradation of stage 2 trains against.

Colour transform, halved chroma, 8 x 8 cosine transform and rounding as in the standard; tables are scaled by the
quality without being rounded to whole numbers, as the released code's DiffJPEG does (HI3D.md section 6).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import fft

# ITU-T T.81, tables K.1 and K.2; the luma table transposed, as the released code has it: rows and columns of the
# frequencies are swapped there, and pictures of a model trained with it should be judged by the same.
LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
).T
CHROMA_TABLE = np.full((8, 8), 99, np.float32)
CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# JFIF: luma and the two chroma differences, chroma around 128.
TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]],
    np.float32,
)
FROM_YCC = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]], np.float32)


def jpeg(image: Float[np.ndarray, "h w 3"], quality: float) -> Float[np.ndarray, "h w 3"]:
    """An sRGB image in [0, 1] as it comes out of a JPEG of this quality (1 to 100)."""
    height, width, _ = image.shape
    factor = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
    # Sides become multiples of 16, by black pixels as in the released code.
    canvas = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)))
    ycc = (canvas * np.float32(255)) @ TO_YCC.T
    luma = _quantised(ycc[..., 0] - np.float32(128), LUMA_TABLE * np.float32(factor)) + np.float32(128)
    chroma = [_quantised(_halved(ycc[..., c]), CHROMA_TABLE * np.float32(factor)) for c in (1, 2)]
    decoded = np.stack([luma, *(part.repeat(2, axis=0).repeat(2, axis=1) for part in chroma)], axis=-1) @ FROM_YCC.T
    return np.clip(decoded[:height, :width] / np.float32(255), 0, 1)


def _halved(plane: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h2 w2"]:
    return (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]) / np.float32(4)


def _quantised(plane: Float[np.ndarray, "h w"], table: Float[np.ndarray, "8 8"]) -> Float[np.ndarray, "h w"]:
    """The plane (around 0) after its blocks' cosine coefficients were rounded to multiples of the table."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8)
    steps = table[:, None, :]
    coefficients = fft.dctn(blocks, axes=(1, 3), norm="ortho")
    return fft.idctn(np.round(coefficients / steps) * steps, axes=(1, 3), norm="ortho").reshape(height, width)
