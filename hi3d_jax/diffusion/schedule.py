"""The noise levels that sampling goes through (Karras et al. 2022, eq. 5)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def karras_sigmas(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0
) -> Float[np.ndarray, " {num_steps}+1"]:
    """From `sigma_max` down to `sigma_min` in `num_steps` levels, evenly spaced in sigma^(1/rho), then 0; float32.

    The defaults are those of SVD and Hi3D (HI3D.md section 4). Raises `ValueError` for levels that do not descend.
    """
    if num_steps < 1:
        raise ValueError(f"{num_steps} sampling steps: at least 1 is needed, 25 are usual")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"noise levels from {sigma_max} down to {sigma_min}: give 0 < sigma_min < sigma_max")
    levels = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho
    return np.append(levels, 0).astype(np.float32)
