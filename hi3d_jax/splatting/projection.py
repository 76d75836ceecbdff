"""Projects 3D Gaussians to the image plane (EWA splatting: Zwicker et al. 2001; Kerbl et al. 2023, eq. 5).

Camera axes: OpenCV (x right, y down, z forward). Pixels: centres at +0.5. As in the original, the local affine
approximation is taken no further outside the image than 30 % of its field of view, and a low-pass filter of 0.3 pixels²
is added to every footprint. Everything but `half_extents` is differentiable in the Gaussians.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hi3d_jax.splatting import spherical_harmonics
from hi3d_jax.splatting.gaussians import Gaussians

# Variance in pixels² added to each footprint, so that none falls between the pixel centres (Kerbl et al. 2023).
LOW_PASS = 0.3
# Centres nearer than this along the optical axis, or behind the camera, are not drawn (world units).
NEAR = 0.01
# The affine approximation is clamped this share of the field of view outside the image.
FRUSTUM_MARGIN = 0.3
# A Gaussian does not touch pixels where its alpha would be below one step of an 8-bit image.
MIN_ALPHA = 1 / 255


class Footprints(NamedTuple):
    """Gaussians on the image plane.

    `means2d`: centres in pixels. `whitening`: (p, q, r) of the upper triangular matrix [[p, q], [0, r]] whose product
    with its transpose (transpose first) is the inverse 2D covariance; an offset (dx, dy) from the centre has the
    squared Mahalanobis length (p dx + q dy)² + (r dy)², which cannot turn negative by rounding as the usual conic can.
    `depths`: z along the optical axis. `opacities`: in (0, 1). `colours`: sRGB >= 0. `half_extents`: half width and
    height, in pixels, of the box around the pixels where alpha reaches MIN_ALPHA; negative where nothing is drawn.
    """

    means2d: Float[Array, "n 2"]
    whitening: Float[Array, "n 3"]
    depths: Float[Array, " n"]
    opacities: Float[Array, " n"]
    colours: Float[Array, "n 3"]
    half_extents: Float[Array, "n 2"]


def project(
    gaussians: Gaussians, w2c: Float[Array, "4 4"], K: Float[Array, "3 3"], width: int, height: int
) -> Footprints:
    """Footprints of all Gaussians in a camera of `width` x `height` pixels."""
    x, y, depths = _rows(gaussians.means @ w2c[:3, :3].T + w2c[None, :3, 3])
    in_front = depths > NEAR
    # Divisions below see 1 where the Gaussian is not drawn: gradients stay finite, and are zero through `opacities`.
    z = jnp.where(in_front, depths, 1.0)
    x, y = jnp.where(in_front, x, 0.0), jnp.where(in_front, y, 0.0)
    means2d = jnp.stack([K[0, 0] * x / z + K[0, 1] * y / z + K[0, 2], K[1, 1] * y / z + K[1, 2]], axis=1)
    row_x, row_y = _image_plane_axes(_axes(gaussians) @ w2c[:3, :3].T, x, y, z, K, width, height)
    whitening, variances = _whiten(row_x, row_y)
    opacities = jnp.where(in_front, gaussians.opacities, 0.0)
    # Where alpha = opacity · exp(-m²/2) falls to MIN_ALPHA, m² is this; an ellipse's box has sides m · sqrt(variance).
    reach = 2 * jnp.log(jnp.maximum(opacities, 1e-30) / MIN_ALPHA)
    extents = jnp.where(reach[:, None] > 0, jnp.sqrt(jnp.maximum(reach, 0.0)[:, None] * variances), -1.0)
    return Footprints(
        means2d=means2d,
        whitening=whitening,
        depths=depths,
        opacities=opacities,
        colours=spherical_harmonics.colours(gaussians.sh, _directions(gaussians.means, w2c)),
        half_extents=jax.lax.stop_gradient(extents),
    )


def rotations(quats: Float[Array, "n 4"]) -> Float[Array, "n 3 3"]:
    """Rotation matrices of quaternions (w, x, y, z) of any length; the zero quaternion gives the identity."""
    length_squared = (quats * quats).sum(axis=1, keepdims=True)
    w, x, y, z = _rows(quats * jax.lax.rsqrt(jnp.maximum(length_squared, 1e-24)))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=1) for row in rows], axis=1)


def _axes(gaussians: Gaussians) -> Float[Array, "n 3 3"]:
    """The scaled axes of each Gaussian in the world, one per row: covariance = transpose · axes."""
    return rotations(gaussians.quats).swapaxes(1, 2) * gaussians.scales[:, :, None]


def _image_plane_axes(axes, x, y, z, K, width, height) -> tuple[Float[Array, "n 3"], Float[Array, "n 3"]]:
    """The three camera-space axes of each Gaussian under the Jacobian of the projection: x and y parts, pixels."""
    x = z * _clamp_to_frustum(x / z, K[0, 0], K[0, 2], width)
    y = z * _clamp_to_frustum(y / z, K[1, 1], K[1, 2], height)
    along_x, along_y, along_z = axes[..., 0], axes[..., 1], axes[..., 2]
    inverse_z = (1 / z)[:, None]
    across = along_x - along_z * (x / z)[:, None]
    down = along_y - along_z * (y / z)[:, None]
    return (K[0, 0] * across + K[0, 1] * down) * inverse_z, K[1, 1] * down * inverse_z


def _clamp_to_frustum(slope, focal, centre, size):
    margin = FRUSTUM_MARGIN * size / (2 * focal)
    return jnp.clip(slope, -centre / focal - margin, (size - centre) / focal + margin)


def _whiten(row_x, row_y):
    """`whitening` and the diagonal of the 2D covariance from its square root, low-pass filter included."""
    variance_x, variance_y = (row_x * row_x).sum(axis=1), (row_y * row_y).sum(axis=1)
    covariance = (row_x * row_y).sum(axis=1)
    # Lagrange's identity: |a|²|b|² - (a·b)² = |a x b|², without the cancellation that ruins needles.
    cross = jnp.cross(row_x, row_y)
    determinant = (cross * cross).sum(axis=1) + LOW_PASS * (variance_x + variance_y) + LOW_PASS**2
    variance_x, variance_y = variance_x + LOW_PASS, variance_y + LOW_PASS
    p = jnp.sqrt(variance_y / determinant)
    r = jax.lax.rsqrt(variance_y)
    q = -covariance * r * jax.lax.rsqrt(determinant)
    return jnp.stack([p, q, r], axis=1), jnp.stack([variance_x, variance_y], axis=1)


def _directions(means, w2c) -> Float[Array, "n 3"]:
    """Unit vectors from the camera centre to the Gaussians; zero for one that sits in the centre."""
    offsets = means + (w2c[:3, :3].T @ w2c[:3, 3])[None]
    length_squared = (offsets * offsets).sum(axis=1, keepdims=True)
    return offsets * jax.lax.rsqrt(jnp.maximum(length_squared, 1e-24))


def _rows(values):
    return tuple(values[:, i] for i in range(values.shape[1]))
