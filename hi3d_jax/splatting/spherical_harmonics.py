"""Colour as real spherical harmonics of the viewing direction, degrees 0 to 3, with the signs and order of 3DGS.

The order within a degree is m = -l ... l; the basis follows the Condon-Shortley phase, as in Kerbl et al. 2023, so that
.ply files of either side show the same colours. A colour is basis · coefficients + 0.5, cut at zero.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

MAX_DEGREE = 3

# sqrt((2l+1)/(4 pi) (l-|m|)!/(l+|m|)!), times sqrt(2) for m != 0, times the constants of the Legendre polynomials.
DEGREE_0 = 0.28209479177387814
DEGREE_1 = 0.4886025119029199
DEGREE_2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
DEGREE_3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


def num_coefficients(degree: int) -> int:
    """Coefficients per colour channel. Raises `ValueError` outside degrees 0 to 3."""
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"spherical harmonics of degree {degree} are not supported; choose 0 to {MAX_DEGREE}")
    return (degree + 1) ** 2


def degree_of(coefficients: int) -> int:
    """The inverse of `num_coefficients`. Raises `ValueError` where no degree has that many."""
    for degree in range(MAX_DEGREE + 1):
        if coefficients == num_coefficients(degree):
            return degree
    raise ValueError(f"{coefficients} spherical harmonics coefficients per channel; expected 1, 4, 9 or 16")


def basis(directions: Float[Array, "n 3"], degree: int) -> list[Float[Array, " n"]]:
    """The basis functions at unit `directions`, one array per coefficient."""
    x, y, z = directions[:, 0], directions[:, 1], directions[:, 2]
    values = [jnp.full_like(x, DEGREE_0)]
    if degree > 0:
        values += [-DEGREE_1 * y, DEGREE_1 * z, -DEGREE_1 * x]
    if degree > 1:
        c1, c0, c2 = DEGREE_2
        values += [c1 * x * y, -c1 * y * z, c0 * (3 * z * z - 1), -c1 * x * z, c2 * (x * x - y * y)]
    if degree > 2:
        c3, c2, c1, c0, c2_even = DEGREE_3
        values += [
            -c3 * y * (3 * x * x - y * y),
            c2 * x * y * z,
            -c1 * y * (5 * z * z - 1),
            c0 * z * (5 * z * z - 3),
            -c1 * x * (5 * z * z - 1),
            c2_even * z * (x * x - y * y),
            -c3 * x * (x * x - 3 * y * y),
        ]
    return values


def colours(sh: Float[Array, "n k 3"], directions: Float[Array, "n 3"]) -> Float[Array, "n 3"]:
    """sRGB colours >= 0 seen along unit `directions` (from the camera to each Gaussian)."""
    values = jnp.stack(basis(directions, degree_of(sh.shape[1])), axis=1)
    return jnp.maximum((values[:, :, None] * sh).sum(axis=1) + 0.5, 0.0)
